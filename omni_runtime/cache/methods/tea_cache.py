"""TeaCache (Liu et al. 2024, arXiv:2411.19108): skip all blocks while block 0's modulated input has changed little.

The input of block 0's attention, normalised and modulated for the timestep, is known before any block has run. Its
distance to the step before is r = mean|x − y| / (mean|y| + 1e-8). A polynomial turns r into the expected change of the
residual of all blocks. These changes are summed, Σ |poly(r)|. When the sum reaches `rel_l1_thresh`, the step is
computed and the sum is reset to 0. A skipped step adds the residual of the last computed step.

site: all blocks · signal: block 0's modulated input · gate: accumulated polynomial · forecaster: reuse, or another

The polynomials of known classes are in their `ModelRow`s. `omni calibrate tea_cache` fits one to any model
(`omni_runtime.cache.polynomial`).
"""

from __future__ import annotations

import math

from omni_runtime.cache import config as keys
from omni_runtime.cache import polynomial
from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits
from omni_runtime.cache.methods.method import Config, Method
from omni_runtime.cache.methods.shared_keys import (
    DECISION_KEYS,
    FORECASTER_KEYS,
    calibrated_key,
    calibrated_numbers,
    chosen_forecaster,
    drift_tolerance,
)
from omni_runtime.cache.models import ModelRow
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.signals import ModulatedInput


def _parts(config: Config, row: ModelRow, blocks: int) -> Parts:
    if row.modulation is None:
        raise ValueError(
            "tea_cache watches block 0's modulated input: the transformer's ModelRow gives no modulation. "
            "velocity_cache, cache_dit and first_block_cache need none"
        )
    numbers, fitted_for, note = calibrated_numbers("coefficients", config["coefficients"], row.tea_coefficients)
    coefficients, fitted = numbers["coefficients"], numbers.get("range", (-math.inf, math.inf))
    if coefficients is None:
        raise ValueError("no TeaCache coefficients are known for this transformer: give them as the key 'coefficients'")
    return Parts(
        first=0,
        last=blocks,
        signal=ModulatedInput(row.modulation),
        gate=lambda request: AccumulatedPolynomialGate(Limits(), config["rel_l1_thresh"], coefficients, fitted),
        forecaster=chosen_forecaster(config),
        fitted_for=fitted_for,
        note=note,
        drift_tolerance=drift_tolerance(config),
    )


TEA_CACHE = Method(
    name="tea_cache",
    summary="TeaCache: skip all blocks while the accumulated change of block 0's modulated input is small",
    keys=(
        keys.number("rel_l1_thresh", 0.2, "accumulated distance at which a step is computed", above=0.0, none=True),
        calibrated_key(
            "tea_cache",
            keys.numbers(
                "coefficients",
                polynomial.DEGREE + 1,
                "polynomial of the distance, highest power first; None: the model's own",
            ),
        ),
        *DECISION_KEYS,
        *FORECASTER_KEYS,
    ),
    parts=_parts,
    calibrated_by="coefficients",
)
