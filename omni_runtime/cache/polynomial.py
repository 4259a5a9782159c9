"""TeaCache's polynomial for one model, and how it is fitted.

A point is a pair of distances between two consecutive denoising steps of a run without a cache, of one image in one
CFG branch: x of block 0's modulated input, which the gate can see, and y of what a skipped step would reuse, both
mean|now − then| / (mean|then| + 1e-8). The polynomial predicts y from x (TeaCache, Liu et al. 2024, arXiv:2411.19108).

Which y? The original fits the movement of the model's output. But a skipped step, there as here, adds the *residual* of
all blocks at the last computed step to its own, new input: what goes wrong is what the residual has moved since, while
the output also moves by the input's own step, which a skipped step does make. So y is of the residual of all blocks.
It was also the better fitted of the two where both were measured: on the first weights of the embedded Qwen-Image, R²
was 0.43 for the residual and 0.39 for the last block's output (1274 points of 13 prompts, 50 steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_runtime.cache.calibration import UselessFitError

DEGREE = 4
#: Ten points for each of the coefficients.
MIN_POINTS = 10 * (DEGREE + 1)
#: A constant polynomial, whose R² is 0, computes every so many steps. A fit must know clearly more than that.
MIN_R_SQUARED = 0.25
#: Of the largest distance: with less between the smallest and the largest, powers of x tell nothing apart.
MIN_VARIATION = 0.01


@dataclass(frozen=True)
class Fit:
    """A polynomial y ≈ poly(x), and how good it is.

    Attributes:
        coefficients: 5, highest power first.
        degree: of the polynomial: 4, or less where only a lower one stays positive.
        range: the smallest and the largest x.
        output_range: the smallest and the largest y.
        r_squared: the share of y's variance that the polynomial explains.
        spread: standard deviation of y − poly(x).
        points: how many there were.
        rises: whether a larger x never gives a smaller value within the range.
    """

    coefficients: tuple[float, ...]
    degree: int
    range: tuple[float, float]
    output_range: tuple[float, float]
    r_squared: float
    spread: float
    points: int
    rises: bool

    method = "tea_cache"

    def fields(self) -> dict[str, Any]:
        """What the file holds of it."""
        return {
            "coefficients": list(self.coefficients),
            "range": list(self.range),
            "r_squared": self.r_squared,
            "spread": self.spread,
            "points": self.points,
            "degree": self.degree,
            "output_range": list(self.output_range),
        }

    def words(self) -> str:
        """The fit in two sentences, and its numbers."""
        (low, high), (least, most) = self.range, self.output_range
        falls = "" if self.rises else ", not everywhere rising"
        return (
            f"{self.points} points: the modulated input moves by {low:.4g} to {high:.4g} a step, the residual by "
            f"{least:.4g} to {most:.4g}. A polynomial of degree {self.degree}{falls} explains {self.r_squared:.0%} of "
            f"the residual's variance (R² {self.r_squared:.3f}); its errors have a standard deviation of "
            f"{self.spread:.2g}.\ncoefficients {', '.join(f'{one:.6g}' for one in self.coefficients)}"
        )


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The polynomial of degree 4 that is nearest to the points in the mean of squares.

    The gate accumulates its values as movements, so they must be positive in the whole range: where those of degree 4
    are not, a lower degree is taken. Fitted in float64 on x scaled to [−1, 1].

    Raises:
        UselessFitError: fewer than MIN_POINTS, values that are not finite or do not vary, an R² below MIN_R_SQUARED, no
            degree that stays positive.
    """
    inputs, outputs = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(inputs) < MIN_POINTS:
        raise UselessFitError(
            f"{len(inputs)} points are too few for {DEGREE + 1} coefficients, which need {MIN_POINTS}: calibrate with "
            "more prompts, seeds or steps"
        )
    finite = np.isfinite(inputs) & np.isfinite(outputs)
    if not finite.all():
        raise UselessFitError(
            f"{np.count_nonzero(~finite)} of {len(inputs)} recorded distances are not finite: the model gives "
            "infinities or NaN with these settings"
        )
    for values, name in ((inputs, "modulated input"), (outputs, "residual")):
        if np.ptp(values) <= MIN_VARIATION * values.max():
            raise UselessFitError(
                f"the {name} moves by the same {values.max():.4g} at every step: there is nothing to tell steps apart "
                "by, and a fixed schedule does as well"
            )
    degree, polynomial, values = _positive(inputs, outputs)
    errors = outputs - polynomial(inputs)
    r_squared = 1.0 - float(np.sum(errors**2) / np.sum((outputs - outputs.mean()) ** 2))
    if r_squared < MIN_R_SQUARED:
        raise UselessFitError(
            f"the polynomial explains {max(r_squared, 0.0):.0%} of how much the residual moves (R² {r_squared:.3f}, at "
            f"least {MIN_R_SQUARED} is wanted): with this model and these settings, the modulated input hardly tells"
        )
    powers = polynomial.convert().coef[::-1]
    return Fit(
        coefficients=(0.0,) * (DEGREE - degree) + tuple(map(float, powers)),
        degree=degree,
        range=(float(inputs.min()), float(inputs.max())),
        output_range=(float(outputs.min()), float(outputs.max())),
        r_squared=r_squared,
        spread=float(np.std(errors)),
        points=len(inputs),
        rises=bool((np.diff(values) >= 0).all()),
    )


def _positive(inputs: np.ndarray, outputs: np.ndarray) -> tuple[int, np.polynomial.Polynomial, np.ndarray]:
    """The highest degree whose polynomial is positive over the range, that polynomial, and its values there."""
    grid = np.linspace(inputs.min(), inputs.max(), 1001)
    for degree in range(DEGREE, 0, -1):
        polynomial = np.polynomial.Polynomial.fit(inputs, outputs, degree)
        values = polynomial(grid)
        if values.min() > 0 and len(polynomial.convert().coef) == degree + 1:
            return degree, polynomial, values
    raise UselessFitError(
        "no polynomial of degree 4 or less stays positive over the distances that were seen: a few steps move far more "
        "than all others, which a threshold on the sum cannot follow"
    )
