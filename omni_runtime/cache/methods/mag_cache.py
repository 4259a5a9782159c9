"""MagCache (Ma et al. 2025, arXiv:2506.09045): skip all blocks while calibrated ratios say that little has changed.

γ_t is the factor by which the magnitude of the residual of all blocks changes from step t − 1 to t. The factors are
fitted to a model by `omni calibrate mag_cache` (`omni_runtime.cache.magnitudes`), or published for its class. Steps
are skipped while Σ |1 − Πγ| since the last computed step is at most `threshold`, and at most `max_skip_steps` in a
row. The first steps, a share of `retention_ratio`, are always computed. Nothing is measured in a request. All this is
as in diffusers' `MagCacheConfig`.

site: all blocks · signal: nothing · gate: calibrated ratios, under limits · forecaster: reuse, or another
"""

from __future__ import annotations

from typing import Any

from omni_runtime.cache import config as keys
from omni_runtime.cache import magnitudes
from omni_runtime.cache.gates import Limits, MagnitudeRatioGate
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods.method import Config, Method
from omni_runtime.cache.methods.shared_keys import (
    FORECASTER_KEYS,
    TOLD_STEPS,
    calibrated_key,
    calibrated_numbers,
    chosen_forecaster,
    warn_of_told_steps,
)
from omni_runtime.cache.models import ModelRow
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.signals import Nothing


def _parts(config: Config, row: ModelRow, blocks: int) -> Parts:
    numbers, fitted_for, note = calibrated_numbers("mag_ratios", config["mag_ratios"], row.mag_ratios)
    ratios = numbers["mag_ratios"]
    if ratios is None:
        raise ValueError(
            "no MagCache ratios are known for this transformer: give them as the key 'mag_ratios', or find them with "
            "`omni calibrate mag_cache`"
        )

    def gate(request: Request) -> MagnitudeRatioGate:
        warn_of_told_steps(config, request)
        scheduled = request.begin + request.steps
        # Rounded as diffusers does: 28 steps at 0.2 retain 6.
        retained = int(config["retention_ratio"] * request.steps + 0.5)
        limits = Limits(warmup=retained, longest_run=config["max_skip_steps"])
        return MagnitudeRatioGate(limits, config["threshold"], magnitudes.resized(ratios, scheduled)[request.begin :])

    return Parts(
        first=0,
        last=blocks,
        signal=Nothing(),
        gate=gate,
        forecaster=chosen_forecaster(config),
        fitted_for=fitted_for,
        note=note,
    )


def _calibrate_key() -> keys.Key:
    def convert(value: Any) -> bool:
        if keys.plain(value) is True:
            raise keys.SaidInFullError("ratios are found by `omni calibrate mag_cache`, and given as mag_ratios")
        if keys.plain(value) is not False:
            raise TypeError
        return False

    return keys.Key("mag_calibrate", False, "bool", "False", "not needed: see `omni calibrate mag_cache`", convert)


MAG_CACHE = Method(
    name="mag_cache",
    summary="MagCache: skip all blocks while calibrated ratios say that the residual's magnitude has changed little",
    keys=(
        keys.number("threshold", 0.06, "accumulated error of the magnitude up to which steps are skipped"),
        keys.integer("max_skip_steps", 3, 0, None, "most steps skipped in a row"),
        keys.fraction("retention_ratio", 0.2, "share of the steps, the first ones, that are always computed"),
        calibrated_key(
            "mag_cache",
            keys.positives("mag_ratios", "ratio of each step, for any number of steps; None: the model's own"),
        ),
        _calibrate_key(),
        TOLD_STEPS,
        *FORECASTER_KEYS,
    ),
    parts=_parts,
    spellings={
        "mag_threshold": "threshold",
        "mag_max_skip_steps": "max_skip_steps",
        "mag_retention_ratio": "retention_ratio",
    },
    calibrated_by="mag_ratios",
)
