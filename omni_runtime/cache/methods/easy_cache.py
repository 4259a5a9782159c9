"""EasyCache (Zhou et al. 2025, arXiv:2507.02860): skip whole steps while the output is expected to change little.

How much the output v answers to a change of the latents x is taken from the last two computed steps; times how far the
latents have moved since, that is how much v is expected to have changed (`omni_runtime.cache.signals.ExpectedChange`).
These are summed, and the step is computed when the sum reaches `thresh`; the first `ret_steps` and the last step always
are. A skipped step is given x + (v − x) of the last computed one: what the model adds to the latents is reused. Names
and defaults are those of the authors' code for Wan 2.1, which decides by the conditional branch; here it is the guided
output. Where guidance is linear in the branches' outputs, that is what adding each branch's own difference, as the
authors do, would give. (Qwen-Image's guidance rescales, and is not.)

site: whole steps · signal: expected change · gate: accumulated distance, under limits · forecaster: reuse, or another
within `reach`
"""

from __future__ import annotations

from omni_runtime.cache import config as keys
from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods.method import Config, Method
from omni_runtime.cache.methods.shared_keys import (
    DECISION_KEYS,
    FORECASTER_KEYS,
    REACH_KEY,
    chosen_forecaster,
    drift_tolerance,
)
from omni_runtime.cache.output import OutputSite
from omni_runtime.cache.signals import ExpectedChange


def _output(config: Config) -> OutputSite:
    def gate(request: Request, transformer: str) -> AccumulatedPolynomialGate:
        first, last = config["ret_steps"], request.steps - 1
        forced = tuple(int(step < first or step == last) for step in range(request.steps))
        return AccumulatedPolynomialGate(Limits(warmup=first, mask=forced), config["thresh"], (1.0, 0.0))

    return OutputSite(
        gate=gate,
        forecaster=chosen_forecaster(config),
        reach=config["reach"],
        signal=ExpectedChange,
        residual=True,
        drift_tolerance=drift_tolerance(config),
    )


EASY_CACHE = Method(
    name="easy_cache",
    summary="EasyCache: skip whole steps while the guided model output is expected to have changed little",
    keys=(
        keys.number("thresh", 0.05, "accumulated expected change at which a step is computed", above=0.0),
        keys.integer("ret_steps", 10, 0, None, "first steps, always computed"),
        *DECISION_KEYS,
        *FORECASTER_KEYS,
        REACH_KEY,
    ),
    output=_output,
)
