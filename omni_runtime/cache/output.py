"""The output site: whole denoising steps are skipped, and what the scheduler steps with is forecast.

What is cached is the guided model output, the tensor that a pipeline hands to `scheduler.step`: a few latents. At a
skipped step no transformer runs, in no CFG branch; each of its calls is answered with what the same call returned last,
so that the pipeline's guidance has something to work on, and the scheduler steps with the forecast instead. For flow
matching the output is a velocity (MeanCache, Gao et al. 2026, arXiv:2601.19961, caches it on a schedule, too).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.patching.backends import nearest
from omni_runtime.cache.forecasters import Forecaster
from omni_runtime.cache.gates import Gate, Plan, Verdict
from omni_runtime.cache.history import history_of
from omni_runtime.cache.lifecycle import Request

#: Schedulers that evaluate the model once a step, on the latents that they gave out: class → what `σ` is measured by.
SCHEDULERS: dict[str, str] = {
    "FlowMatchEulerDiscreteScheduler": "sigmas",
    "FlowMatchLCMScheduler": "sigmas",
    "UniPCMultistepScheduler": "sigmas",
    "DPMSolverMultistepScheduler": "sigmas",
    "EulerDiscreteScheduler": "sigmas",
    "DDIMScheduler": "timesteps",
}


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError for a scheduler that whole steps cannot be skipped of, by name."""
    name = type(scheduler).__name__
    if name in SCHEDULERS:
        return
    if getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"{name} evaluates the model {scheduler.order} times a step, at points of its own: whole steps cannot be "
            "skipped. Use a scheduler with one evaluation a step, such as FlowMatchEulerDiscreteScheduler"
        )
    raise ValueError(
        f"no cache of whole steps knows the scheduler {name!r} yet: {nearest(name, SCHEDULERS)}. One that evaluates "
        "the model once a step can be added as a row of omni_runtime.cache.output.SCHEDULERS"
    )


@dataclass(frozen=True)
class OutputSite:
    """A method's choices at the output site.

    Attributes:
        gate: (request, transformer class) → a fresh gate for the request; raises ValueError for one that it cannot
            serve.
        forecaster: what stands in for the missing model output.
        reach: how far a forecast goes at most beyond the newest snapshot, in distances between the two newest: farther
            out it stays what it is there. Extrapolation over a long gap is worse than none.
        fitted_for: as `Parts.fitted_for`.
    """

    gate: Callable[[Request, str], Gate]
    forecaster: Forecaster
    reach: float
    fitted_for: Mapping[str, Any] | None = None


class OutputSteps:
    """The steps of one request: which are computed, and what stands in for the others."""

    def __init__(self, site: OutputSite, request: Request, transformer: str) -> None:
        self._request = request
        self._gate = site.gate(request, transformer)
        self._by_step = site.forecaster.axis == "step"
        self._reach = site.reach
        self._history = history_of(site.forecaster)
        self._returned: dict[str, Any] = {}
        self._step = -1
        self._verdict = Verdict(True, "")

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is held between steps."""
        return self._history.tensors() + _tensors_of(self._returned)

    def verdict(self) -> Verdict:
        """Whether the step under way is computed; settled at its first transformer call."""
        if self._step != self._request.step:
            self._step = self._request.step
            if len(self._history):
                plan, reason = self._gate.plan(self._step)
                self._verdict = Verdict(plan is not Plan.SKIP, reason)
            else:
                self._verdict = Verdict(True, "nothing cached yet")
            self._gate.settle(self._verdict.computed)
        return self._verdict

    def remember(self, name: str, returned: Any) -> None:
        """What a transformer call of this step returned."""
        self._returned[name] = returned

    def stand_in(self, name: str) -> Any:
        """What that call returned last; None where it was never made."""
        return self._returned.get(name)

    def output(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler steps with: `output` at a computed step, at a skipped one its forecast."""
        if self._step != self._request.step:  # no transformer was called in this step
            return output
        position = float(self._step) if self._by_step else self._request.sigma
        if self._verdict.computed:
            self._history.record(output, None, position)
            return output
        if self._history.shape != output.shape:
            raise RuntimeError(
                f"the model output has the shape {tuple(output.shape)} in a skipped step, {self._history.shape} in the "
                "last computed one: whole steps of this pipeline cannot be skipped"
            )
        return self._history.forecast(None, reached(self._history.positions, position, self._reach))


def reached(positions: Sequence[float], x: float, reach: float) -> float:
    """`x`, or where a forecast ends on the way there: `reach` times the two newest positions' distance.

    `positions` are the snapshots', newest first; with fewer than two, there is nothing to extrapolate.
    """
    if len(positions) < 2:
        return x
    newest = positions[0]
    farthest = reach * abs(newest - positions[1])
    return newest + math.copysign(min(abs(x - newest), farthest), x - newest)


def _tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for one in value for t in _tensors_of(one)] if isinstance(value, (tuple, list)) else []
