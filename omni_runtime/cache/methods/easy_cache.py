"""EasyCache (Zhou et al. 2025, arXiv:2507.02860): skip whole steps while the output is expected to change little.

The last two computed steps give the rate at which the output v changes with the latents x. The rate times the change
of the latents is the expected change of v (`omni_runtime.cache.signals.ExpectedChange`). The expected changes are
summed, and a step is computed when the sum reaches `thresh`. The first `ret_steps` steps and the last one are always
computed. A skipped step gets its own x plus v − x of the last computed step, so what the model adds to the latents is
reused.

Names and defaults are those of the authors' code for Wan 2.1. That code decides by the conditional branch and adds
each branch's own difference; here the guided output is used. If guidance is linear in the branches' outputs, both give
the same skipped output. (Qwen-Image's guidance rescales, so it is not linear.)

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
    chosen_forecaster,
    drift_tolerance,
)
from omni_runtime.cache.output import Chosen, OutputSite
from omni_runtime.cache.signals import ExpectedChange


def _output(config: Config) -> OutputSite:
    def choose(request: Request) -> Chosen:
        first, last = config["ret_steps"], request.steps - 1
        forced = tuple(int(step < first or step == last) for step in range(request.steps))
        gate = AccumulatedPolynomialGate(Limits(warmup=first, mask=forced), config["thresh"], (1.0, 0.0))
        return Chosen(gate, config["reach"])

    return OutputSite(
        choose=choose,
        forecaster=chosen_forecaster(config),
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
        keys.number(
            "reach", 1.0, "longest extrapolation, in distances between the two newest computed steps", above=0.0
        ),
    ),
    output=_output,
)
