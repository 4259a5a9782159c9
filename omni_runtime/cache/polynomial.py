"""TeaCache's polynomial for one model, and how it is fitted.

A point is a pair of distances (x, y) between two consecutive denoising steps of a run without a cache, for one image
in one CFG branch. x is the distance of block 0's modulated input, which the gate can measure. y is the distance of
what a skipped step would reuse. Both are mean|now − then| / (mean|then| + 1e-8). The polynomial predicts y from x
(TeaCache, Liu et al. 2024, arXiv:2411.19108).

The original uses the change of the model's output as y. But a skipped step, there as here, adds the *residual* of all
blocks at the last computed step to its own, new input. Its error is the change of the residual since then. The output
also changes with the input, but a skipped step does follow that. So here y is the distance of the residual of all
blocks. Where both were measured, the residual was also the better fit: on the first weights of the embedded
Qwen-Image, R² was 0.43 for the residual and 0.39 for the last block's output (1274 points of 13 prompts, 50 steps).
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
#: A constant polynomial, whose R² is 0, computes steps at fixed intervals. A fit must be clearly better than that.
MIN_R_SQUARED = 0.25
#: The least range of the distances, relative to the largest one: with less, the powers of x do not differ enough.
MIN_VARIATION = 0.01


@dataclass(frozen=True)
class Fit:
    """A polynomial y ≈ poly(x), and how good the fit is.

    Attributes:
        coefficients: 5 numbers, highest power first.
        degree: the degree of the polynomial: 4, or less if only a lower degree stays positive.
        range: the smallest and the largest x.
        output_range: the smallest and the largest y.
        r_squared: the share of y's variance that the polynomial explains.
        spread: the standard deviation of y − poly(x).
        points: the number of points.
        rises: whether the polynomial never falls within the range.
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
        """The fields that the calibration file holds."""
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
        """The fit in two sentences, followed by the coefficients."""
        (low, high), (least, most) = self.range, self.output_range
        falls = "" if self.rises else " (not everywhere rising)"
        return (
            f"{self.points} points: the modulated input moves by {low:.4g} to {high:.4g} a step, the residual by "
            f"{least:.4g} to {most:.4g}. A polynomial of degree {self.degree}{falls} explains {self.r_squared:.0%} of "
            f"the residual's variance (R² {self.r_squared:.3f}); its errors have a standard deviation of "
            f"{self.spread:.2g}.\ncoefficients {', '.join(f'{one:.6g}' for one in self.coefficients)}"
        )


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Fit a polynomial of degree 4 to the points by least squares.

    The gate sums the polynomial's values as distances, so they must be positive in the whole range. If they are not
    for degree 4, a lower degree is used. Fitted in float64 on x scaled to [−1, 1].

    Raises:
        UselessFitError: there are fewer points than MIN_POINTS, values are not finite or do not vary, R² is below
            MIN_R_SQUARED, or no degree stays positive.
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
                f"the {name} moves by the same {values.max():.4g} at every step: it cannot distinguish steps, "
                "and a fixed schedule does as well"
            )
    degree, polynomial, values = _positive(inputs, outputs)
    errors = outputs - polynomial(inputs)
    r_squared = 1.0 - float(np.sum(errors**2) / np.sum((outputs - outputs.mean()) ** 2))
    if r_squared < MIN_R_SQUARED:
        raise UselessFitError(
            f"the polynomial explains {max(r_squared, 0.0):.0%} of how much the residual moves (R² {r_squared:.3f}, at "
            f"least {MIN_R_SQUARED} is wanted): with this model and these settings, the modulated input hardly "
            "predicts it"
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
    """The highest degree whose polynomial is positive over the range, that polynomial, and its values on a grid."""
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
