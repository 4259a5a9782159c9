"""Keys that several methods share: for the forecaster, for measuring or replaying, for the reach, for calibrations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from omni_runtime.cache import calibration
from omni_runtime.cache import config as keys
from omni_runtime.cache.forecasters import FORECASTERS, Forecaster, make_forecaster
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods.method import Config

#: For every method that skips blocks, and for those that skip whole steps and reuse by default.
FORECASTER_KEYS = (
    keys.choice("forecaster", None, tuple(FORECASTERS), "what replaces a skipped residual; None: reuse"),
    keys.integer(
        "forecaster_order",
        1,
        0,
        3,
        "order of taylorseer, newton and hermite, which keep one snapshot more than that; from 2 on, rounding in "
        "bfloat16 and float16 may cost more than the order gains",
    ),
)


def chosen_forecaster(config: Config) -> Forecaster:
    """The forecaster chosen by FORECASTER_KEYS."""
    return make_forecaster(config["forecaster"] or "reuse", config["forecaster_order"])


#: For methods that have this key in other projects.
TOLD_STEPS = keys.integer(
    "num_inference_steps", None, 1, None, "not needed: a request's steps are read from its scheduler"
)


def warn_of_told_steps(config: Config, request: Request) -> None:
    """Warn if the configuration gives another number of steps than the request has."""
    told = config["num_inference_steps"]
    if told is not None and told != request.steps:
        warnings.warn(
            f"cache_config says num_inference_steps={told}, but the request has {request.steps} steps, and "
            "the request's number is used",
            stacklevel=4,
        )


#: For every method that decides by measured distances.
DECISION_KEYS = (
    keys.choice(
        "decision",
        "measure",
        ("measure", "replay"),
        "measure: each request decides for itself; replay: it follows the first request of its kind",
    ),
    keys.number(
        "drift_tolerance",
        0.1,
        "largest drift of a replay, as a share of the threshold; beyond it, the next request decides for itself",
        low=0.0,
    ),
)


def drift_tolerance(config: Config) -> float | None:
    """The `Parts.drift_tolerance` chosen by DECISION_KEYS."""
    return config["drift_tolerance"] if config["decision"] == "replay" else None


def calibrated_key(method: str, numbers: keys.Key) -> keys.Key:
    """A key that takes numbers, or a method's calibration as a file of `omni calibrate` or as the parsed file."""

    def convert(value: Any) -> Any:
        if not isinstance(value, str | os.PathLike | Mapping):
            return numbers.convert(value)
        try:
            return calibration.read(value, method)
        except (OSError, ValueError) as error:
            raise keys.SaidInFullError(str(error)) from None

    allowed = f"{numbers.allowed}, or a file of `omni calibrate`, by its path or parsed"
    return keys.Key(numbers.name, None, f"{numbers.type_name} or a file", allowed, numbers.doc, convert)


def calibrated_numbers(key: str, given: Any, published: Any) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, str]:
    """The numbers, the runs that they were fitted to, and a note for the report.

    Args:
        key: the configuration key.
        given: its value: a calibration, the numbers themselves, or None for the published ones.
        published: the numbers published for the transformer's class.

    Returns:
        A mapping that has the numbers under `key`, with the other fields of a calibration; the runs, or None if they
        are not known; the note.
    """
    if isinstance(given, Mapping):
        return given, given["calibrated_for"], f"{key}: calibrated on {calibration.summary(given)}"
    if given is None:
        return {key: published}, None, f"{key}: those published for the transformer's class"
    return {key: given}, None, f"{key}: given as numbers"
