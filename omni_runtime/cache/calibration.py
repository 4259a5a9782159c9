"""Calibrations: numbers of a method that were fitted to one model. Their file, and the runs that they are valid for.

The fits are in `polynomial` (TeaCache), `magnitudes` (MagCache) and `omni_runtime.calibrate.search` (the velocity
cache). `KINDS` is the table of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omni_kernels.patching.backends import shown
from omni_runtime import files
from omni_runtime.cache.config import MOST, entries, finite

VERSION = 1
#: A schedule's measured speedup may be above its share of computed steps by this factor, the noise of the measurement.
SLACK = 1.05


class UselessFitError(ValueError):
    """The recorded runs give no usable numbers. The message says why, and what may help."""


class Fit(Protocol):
    """The numbers that were fitted for one method."""

    method: str

    def fields(self) -> dict[str, Any]:
        """The fields that the calibration file holds."""

    def words(self) -> str:
        """The fit in words."""


@dataclass(frozen=True)
class Kind:
    """The calibration of one method.

    Attributes:
        title: the method's name in words.
        key: the configuration key that takes the file.
        fields: a parsed file → the fields that a run needs; raises ValueError if they are broken.
        carries_over: whether the numbers may serve another transformer class. A schedule may: it only names steps.
        otherwise: what is used without a calibration, in words.
    """

    title: str
    key: str
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    carries_over: bool = False
    otherwise: str = "those published for its transformer"


def _polynomial(parsed: Mapping[str, Any]) -> dict[str, Any]:
    coefficients, ends = _numbers(parsed.get("coefficients"), 5), _numbers(parsed.get("range"), 2)
    if coefficients is None:
        raise ValueError(f"coefficients must be 5 finite numbers, not {shown(parsed.get('coefficients'))}")
    if ends is None or not 0 <= ends[0] < ends[1]:
        raise ValueError(f"range must be the smallest and the largest distance seen, not {shown(parsed.get('range'))}")
    return {"coefficients": coefficients, "range": ends}


def _ratios(parsed: Mapping[str, Any]) -> dict[str, Any]:
    ratios = _numbers(parsed.get("mag_ratios"))
    if not ratios or min(ratios) <= 0:
        raise ValueError(
            f"mag_ratios must be finite numbers > 0, one for each step, not {shown(parsed.get('mag_ratios'))}"
        )
    return {"mag_ratios": ratios}


def _schedules(parsed: Mapping[str, Any]) -> dict[str, Any]:
    rows = parsed.get("schedules")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"schedules must be a list of schedules, not {shown(rows)}")
    return {"schedules": [_schedule(row) for row in rows]}


def _schedule(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"a schedule must be an object, not {shown(row)}")
    steps, computed, sigmas, psnr = (row.get(key) for key in ("steps", "computed", "sigmas", "psnr"))
    whole = isinstance(steps, int) and isinstance(computed, list) and all(isinstance(step, int) for step in computed)
    if not whole or not 1 <= steps <= MOST or computed != sorted({0, steps - 1, *computed}):  # type: ignore[operator,misc]
        raise ValueError(f"computed must be rising steps from 0 to steps − 1, not {shown(computed)} of {shown(steps)}")
    levels = _numbers(sigmas, steps)
    if levels is None:
        raise ValueError(f"sigmas must be the noise levels of {steps} steps, not {shown(sigmas)}")
    mean = _numbers([psnr.get("mean")]) if isinstance(psnr, Mapping) else None
    if mean is None:
        raise ValueError(f"psnr must have a mean, not {shown(psnr)}")
    needed: dict[str, Any] = {"steps": steps, "computed": computed, "sigmas": levels, "psnr": {"mean": mean[0]}}
    assert psnr is not None
    low, images = _numbers([psnr.get("p5")]), psnr.get("images")
    if low is not None and isinstance(images, int) and images > 0:
        needed["psnr"] |= {"p5": low[0], "images": images}
    for key in ("speedup", "reach"):
        given = None if row.get(key) is None else _numbers([row[key]]) or [math.nan]
        if given is not None:
            if not given[0] > 0:
                raise ValueError(f"{key} must be a number > 0, not {shown(row[key])}")
            needed[key] = given[0]
    if row.get("corrector_order") is not None:
        if row["corrector_order"] not in (0, 1, 2, 3):
            raise ValueError(f"corrector_order must be 0, 1, 2 or 3, not {shown(row['corrector_order'])}")
        needed["corrector_order"] = int(row["corrector_order"])
    if needed.get("speedup", 0.0) > SLACK * len(levels) / len(needed["computed"]):
        del needed["speedup"]  # no schedule is faster than its share of steps: the times were disturbed
    return needed


def _excluded(parsed: Mapping[str, Any]) -> dict[str, Any]:
    layers = parsed.get("exclude")
    if not isinstance(layers, list) or not all(isinstance(one, str) for one in layers):
        raise ValueError(f"exclude must be a list of layers' names, not {shown(layers)}")
    return {"exclude": layers}


#: method → its calibration
KINDS = {
    "tea_cache": Kind("TeaCache", "coefficients", _polynomial),
    "mag_cache": Kind("MagCache", "mag_ratios", _ratios),
    "velocity_cache": Kind("schedules", "calibration", _schedules, carries_over=True, otherwise="the default schedule"),
    "quantize_int8": Kind("quantisation in int8", "quantize", _excluded, otherwise="all wide layers"),
    "quantize_fp8": Kind("quantisation in fp8", "quantize", _excluded, otherwise="all wide layers"),
    "quantize_mxfp8": Kind("quantisation in mxfp8", "quantize", _excluded, otherwise="all wide layers"),
}


def file_name(method: str) -> str:
    """The name of a method's calibration file, which a model's folder may contain."""
    return f"{method}.json"


def kept_for(model: str, method: str) -> Path:
    """The file in the user's data directory where `omni calibrate` stores a model's calibration.

    Args:
        model: a directory, or a name on the hub.
    """
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    path = Path(model).expanduser()
    identity = str(path.resolve()) if path.is_dir() else model
    name = re.sub(r"[^\w.-]+", "--", path.resolve().name if path.is_dir() else model)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return data / "omni-kernels" / "calibrations" / f"{name}-{digest}" / file_name(method)


def own_file(model: str, method: str) -> Path | None:
    """The calibration file used for a model if none is given; None if there is none.

    A file in the user's data directory comes before one in the model's folder.
    """
    try:
        places = kept_for(model, method), Path(model).expanduser() / file_name(method)
        return next((place for place in places if place.is_file()), None)
    except (OSError, RuntimeError, ValueError):  # not a possible path, or no home directory: there is no file
        return None


# The file


def document(result: Fit, calibrated_for: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a calibration file.

    Args:
        result: the fit.
        calibrated_for: the runs as given by `describe`, and their `height` and `width` in pixels.
        provenance: how the calibration was made: `model`, prompts, seeds, versions, ...
    """
    return {
        "method": result.method,
        "version": VERSION,
        "model": provenance["model"],
        **result.fields(),
        "calibrated_for": dict(calibrated_for),
        "provenance": dict(provenance),
    }


def write(made: Mapping[str, Any], path: Path) -> None:
    """Write the document to `path`, and create the directory if needed. If writing fails, an old file is kept.

    Raises:
        files.WriteError: it could not be written.
    """
    files.make_directory(path.parent)
    files.write(path, json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(source: str | os.PathLike[str] | Mapping[str, Any], method: str) -> dict[str, Any]:
    """Read a method's calibration from a file, or from the parsed file.

    Returns:
        The fields that a run needs, without the provenance. The result can itself be passed to `read`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not a path, not JSON, not a calibration of the method, or a broken one. The message names the file
            and says what to do.
    """
    if isinstance(source, Mapping):
        return _checked(source, "this dict", method)
    try:
        path = Path(source).expanduser()
        there = path.is_file()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # too long, unknown user, bytes, a NUL character
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{shown(source)} is not a file path: {why}") from None
    if not there:
        raise FileNotFoundError(f"there is no file {shown(os.fspath(source))}")
    try:
        return _checked(files.read_json(path), str(path), method) | {"file": path.name}
    except ValueError as error:
        raise ValueError(f"{error}; `omni calibrate` writes a new one, or take the file away") from None


def _checked(parsed: Any, name: str, method: str) -> dict[str, Any]:
    kind = KINDS[method]
    if not isinstance(parsed, Mapping) or parsed.get("method") != method:
        raise ValueError(
            f'{name} is not a calibration of {kind.title} ("method": "{method}"), as `omni calibrate` writes it'
        )
    if parsed.get("version") != VERSION:
        raise ValueError(
            f"{name} is a calibration of version {shown(parsed.get('version'))}; this version of omni reads {VERSION}"
        )
    try:
        needed = kind.fields(parsed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    about = parsed.get("calibrated_for")
    if not isinstance(about, Mapping):
        raise ValueError(f"{name}: calibrated_for must say what was calibrated, not {shown(about)}")
    if not isinstance(about.get("scheduler_settings") or {}, Mapping):
        raise ValueError(f"{name}: scheduler_settings must be an object, not {shown(about['scheduler_settings'])}")
    kept = {key: parsed[key] for key in ("method", "version", "model", "r_squared", "file") if key in parsed}
    return kept | needed | {"calibrated_for": dict(about)}


def _numbers(value: Any, count: int | None = None) -> list[float] | None:
    """A list of `count` finite numbers, or of any number of them; None if `value` is anything else."""
    try:
        found = [finite(one) for one in entries(value)]
    except (TypeError, ValueError):
        return None
    return found if count is None or len(found) == count else None


def summary(calibration: Mapping[str, Any]) -> str:
    """A short description of a calibration: model, steps, size, and R² if it has one."""
    about = calibration["calibrated_for"]
    words = [str(calibration.get("model", "an unnamed model"))]
    if "steps" in about:
        words.append(f"{about['steps']} steps")
    if "width" in about and "height" in about:
        words.append(f"{about['width']}×{about['height']}")
    if isinstance(calibration.get("r_squared"), float):
        words.append(f"R² {calibration['r_squared']:.2f}")
    return ", ".join(words)


# The runs that a calibration is valid for


def describe(transformer: Any, blocks: int, scheduler: Any, steps: int, latents: Sequence[int]) -> dict[str, Any]:
    """What fitted numbers depend on: transformer class, depth, scheduler, steps, shape of one sample's latents."""
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
    """How a run, as given by `describe`, differs from the calibrated runs: one phrase for each difference."""
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


def check_class(method: str, given: Any, transformer: str, *bases: str) -> None:
    """Check that a calibration was made for this transformer class, unless it carries over or names no class.

    Args:
        method: the method that the calibration is of.
        given: the value of the method's key. Only a calibration is checked, not numbers without a file.
        transformer: the class of the pipeline's transformer.
        bases: its base classes: FSDP makes a subclass of the model's own class.

    Raises:
        ValueError: it was made for another class. The message names both classes and says what to do.
    """
    kind = KINDS[method]
    if kind.carries_over or not isinstance(given, Mapping):
        return
    then = given["calibrated_for"].get("transformer")
    if then is not None and then not in (transformer, *bases):
        raise ValueError(
            f"{kind.key}: {given.get('file', 'this dict')} was calibrated for the class {then}, but this transformer "
            f"is a {transformer}: calibrate for this model with `omni calibrate {method} --model MODEL`"
        )


_PHRASES = {
    "transformer": "a {now} instead of a {then}",
    "blocks": "{now} transformer blocks instead of {then}",
    "steps": "{now} steps instead of {then}",
    "scheduler": "the scheduler {now} instead of {then}",
    "latents": "latents of {now} instead of {then}",
}


def _text(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
