"""TeaCache's polynomial for one model: how it is fitted, the file that holds it, and the runs that it holds for.

A point is a pair of distances between two consecutive denoising steps of a run without a cache, of one sample in one
CFG branch: x of block 0's modulated input, which the gate can see, and y of what a skipped step would reuse, both
mean|now − then| / (mean|then| + 1e-8). The polynomial predicts y from x (TeaCache, Liu et al. 2024, arXiv:2411.19108).

Which y? The original fits the movement of the model's output. But a skipped step, there as here, adds the *residual* of
all blocks at the last computed step to its own, new input: what goes wrong is what the residual has moved since, while
the output also moves by the input's own step, which a skipped step does make. So y is of the residual of all blocks.
It was also the better fitted of the two where both were measured: on the first weights of the embedded Qwen-Image, R²
was 0.43 for the residual and 0.39 for the last block's output (1274 points of 13 prompts, 50 steps).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

METHOD, VERSION = "tea_cache", 1
DEGREE = 4
#: Ten points for each of the coefficients.
MIN_POINTS = 10 * (DEGREE + 1)
#: A constant polynomial, whose R² is 0, computes every so many steps. A fit must know clearly more than that.
MIN_R_SQUARED = 0.25
#: Of the largest distance: with less between the smallest and the largest, powers of x tell nothing apart.
MIN_VARIATION = 0.01

#: What a model's folder may bring, and what `omni calibrate` writes by default.
FILE_NAME = "tea_cache.json"


class UselessFitError(ValueError):
    """The recorded distances give no polynomial that a gate could go by; the text says why, and what may help."""


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

    def words(self) -> str:
        """The fit in two sentences."""
        (low, high), (least, most) = self.range, self.output_range
        falls = "" if self.rises else ", not everywhere rising"
        return (
            f"{self.points} points: the modulated input moves by {low:.4g} to {high:.4g} a step, the residual by "
            f"{least:.4g} to {most:.4g}. A polynomial of degree {self.degree}{falls} explains {self.r_squared:.0%} of "
            f"the residual's variance (R² {self.r_squared:.3f}); its errors have a standard deviation of "
            f"{self.spread:.2g}."
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


# The file


def document(result: Fit, calibrated_for: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds.

    Args:
        result: the fit.
        calibrated_for: what `describe` says of the runs, and their `height` and `width` in pixels.
        provenance: how it was made: `model`, prompts, seeds, versions, ...
    """
    return {
        "method": METHOD,
        "version": VERSION,
        "model": provenance["model"],
        "coefficients": list(result.coefficients),
        "range": list(result.range),
        "r_squared": result.r_squared,
        "spread": result.spread,
        "points": result.points,
        "degree": result.degree,
        "output_range": list(result.output_range),
        "calibrated_for": dict(calibrated_for),
        "provenance": dict(provenance),
    }


def write(made: Mapping[str, Any], path: Path) -> None:
    """Write the document, or, if that fails, leave what was there. The directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A calibration from its file or from the parsed file: all that a run needs of it, without its provenance.

    What `read` gave can be read again.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, no calibration of TeaCache, or a broken one.
    """
    content, name, file = parsed(source)
    return _checked(content, name) | file


def parsed(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Mapping[str, Any], str, dict[str, str]]:
    """What a calibration file holds, how messages call it, and {"file": its name}; a parsed one has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no JSON object.
    """
    if isinstance(source, Mapping):
        return source, "this dict", {}
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(source)!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return content if isinstance(content, Mapping) else {}, str(path), {"file": path.name}


def _checked(parsed: Any, name: str) -> dict[str, Any]:
    if not isinstance(parsed, Mapping) or parsed.get("method") != METHOD:
        raise ValueError(f'{name} is no calibration of TeaCache ("method": "{METHOD}"), as `omni calibrate` writes it')
    if parsed.get("version") != VERSION:
        raise ValueError(
            f"{name} is a calibration of version {parsed.get('version')!r}; this version of omni reads {VERSION}"
        )
    coefficients, ends, about = (parsed.get(key) for key in ("coefficients", "range", "calibrated_for"))
    if not _finite_numbers(coefficients, DEGREE + 1):
        raise ValueError(f"{name}: coefficients must be {DEGREE + 1} finite numbers, not {coefficients!r}")
    if not _finite_numbers(ends, 2) or not 0 <= ends[0] < ends[1]:  # type: ignore[index]
        raise ValueError(f"{name}: range must be the smallest and the largest distance seen, not {ends!r}")
    if not isinstance(about, Mapping):
        raise ValueError(f"{name}: calibrated_for must say what was calibrated, not {about!r}")
    kept = {key: parsed[key] for key in ("method", "version", "model", "r_squared", "file") if key in parsed}
    return kept | {
        "coefficients": [float(one) for one in coefficients],  # type: ignore[union-attr]
        "range": [float(one) for one in ends],  # type: ignore[union-attr]
        "calibrated_for": dict(about),
    }


def _finite_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value)
    )


def summary(calibration: Mapping[str, Any]) -> str:
    """What was calibrated, in a few words: model, steps, size, R²."""
    about = calibration["calibrated_for"]
    words = [str(calibration.get("model", "an unnamed model"))]
    if "steps" in about:
        words.append(f"{about['steps']} steps")
    if "width" in about and "height" in about:
        words.append(f"{about['width']}×{about['height']}")
    if isinstance(calibration.get("r_squared"), float):
        words.append(f"R² {calibration['r_squared']:.2f}")
    return ", ".join(words)


# The runs that it holds for


def describe(transformer: Any, blocks: int, scheduler: Any, steps: int, latents: Sequence[int]) -> dict[str, Any]:
    """What a polynomial hangs on, of a run: transformer class, depth, sampler, steps, shape of one sample's latents."""
    settings = {
        key: value
        for key, value in getattr(scheduler, "config", {}).items()
        if not key.startswith("_") and (value is None or isinstance(value, bool | int | float | str))
    }
    return {
        "transformer": type(transformer).__name__,
        "blocks": blocks,
        "steps": steps,
        "latents": list(latents),
        "scheduler": type(scheduler).__name__,
        "scheduler_settings": settings,
    }


def differences(calibrated_for: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """In what a run, as `describe` has it, differs from the runs that were calibrated: a phrase each, none if alike."""
    found = []
    for key, phrase in _PHRASES.items():
        then, now = calibrated_for.get(key), run[key]
        if then is not None and then != now:
            size = calibrated_for.get("width"), calibrated_for.get("height")
            pixels = f" ({_text(size)} pixels)" if key == "latents" and all(size) else ""
            found.append(phrase.format(now=_text(now), then=_text(then)) + pixels)
    if calibrated_for.get("scheduler") == run["scheduler"]:
        now_all, then_all = run["scheduler_settings"], calibrated_for.get("scheduler_settings") or {}
        found += [
            f"the scheduler's {key} {now_all[key]} instead of {then}"
            for key, then in then_all.items()
            if key in now_all and now_all[key] != then
        ]
    return found


_PHRASES = {
    "transformer": "a {now} instead of a {then}",
    "blocks": "{now} transformer blocks instead of {then}",
    "steps": "{now} steps instead of {then}",
    "scheduler": "the scheduler {now} instead of {then}",
    "latents": "latents of {now} instead of {then}",
}


def _text(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
