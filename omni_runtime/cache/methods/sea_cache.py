"""SeaCache (arXiv:2602.18993): TeaCache on block 0's modulated input, filtered for the noise level.

At noise level σ only a part of an image is signal. A Wiener filter over the grid of the tokens keeps this part of the
modulated input, for a signal whose spectrum falls as 1/|f|^p with p = `power_exp`
(`omni_runtime.cache.signals.FilteredModulatedInput`). The distances of the filtered input to the step before are
summed without a polynomial. A step is computed when the sum reaches `threshold`. The first and the last step are
always computed, and at most `max_consecutive_cached` steps are skipped in a row.

Defaults are those of vLLM-Omni, but for `residual_order`, which is 1 there. vLLM-Omni has the method for Cosmos 3
alone, and filters the latents, not block 0's modulated input. The paper filters that, and uses p = 2 for images.

site: all blocks · signal: block 0's modulated input, filtered · gate: accumulated distance, under limits ·
forecaster: reuse, or another
"""

from __future__ import annotations

from omni_runtime.cache import config as keys
from omni_runtime.cache.forecasters import Forecaster, make_forecaster, newton
from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods.method import Config, Method
from omni_runtime.cache.methods.shared_keys import (
    DECISION_KEYS,
    FORECASTER_KEYS,
    chosen_forecaster,
    drift_tolerance,
)
from omni_runtime.cache.models import ModelRow
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.signals import FilteredModulatedInput


def _forecaster(config: Config) -> Forecaster:
    order = config["residual_order"]
    if order is None:
        return chosen_forecaster(config)
    # In step indices; the forecaster "newton" takes σ.
    return Forecaster(newton, "step", order + 1, name="newton", order=order) if order else make_forecaster("reuse")


def _relations(config: Config, blocks: int | None, steps: int | None) -> None:
    if config["residual_order"] is not None and config["forecaster"] is not None:
        raise ValueError(f"residual_order contradicts forecaster={config['forecaster']!r}: give one of them")


def _parts(config: Config, row: ModelRow, blocks: int) -> Parts:
    if row.modulation is None or row.noise_grid is None:
        lacking = "modulation" if row.modulation is None else "noise_grid"
        raise ValueError(
            "sea_cache filters block 0's modulated input over the grid of its tokens: the transformer's ModelRow gives "
            f"no {lacking}. velocity_cache, cache_dit and first_block_cache need none"
        )

    def gate(request: Request) -> AccumulatedPolynomialGate:
        ends = tuple(int(step in (0, request.steps - 1)) for step in range(request.steps))
        limits = Limits(mask=ends, longest_run=config["max_consecutive_cached"] or -1)
        return AccumulatedPolynomialGate(limits, config["threshold"], (1.0, 0.0))

    return Parts(
        first=0,
        last=blocks,
        signal=FilteredModulatedInput(row.modulation, row.noise_grid, config["power_exp"]),
        gate=gate,
        forecaster=_forecaster(config),
        drift_tolerance=drift_tolerance(config),
    )


SEA_CACHE = Method(
    name="sea_cache",
    summary="SeaCache: TeaCache on block 0's modulated input, filtered for the step's noise level",
    keys=(
        keys.number("threshold", 0.25, "accumulated distance at which a step is computed", above=0.0),
        keys.integer("max_consecutive_cached", 2, -1, None, "most steps skipped in a row; 0 or −1: no limit"),
        keys.number("power_exp", 3.0, "p of the signal's spectrum 1/|f|^p that the filter assumes", above=0.0),
        keys.integer(
            "residual_order",
            None,
            0,
            3,
            "the residual is forecast by the polynomial of this order in step indices through the last ones; 0: reuse; "
            "None: `forecaster` decides. vLLM-Omni's default is 1",
        ),
        *DECISION_KEYS,
        *FORECASTER_KEYS,
    ),
    parts=_parts,
    relations=_relations,
    spellings={
        "sea_threshold": "threshold",
        "sea_max_consecutive_cached": "max_consecutive_cached",
        "sea_power_exp": "power_exp",
        "sea_residual_order": "residual_order",
    },
)
