"""The output site: whole denoising steps are skipped, and what the scheduler steps with is forecast.

What is cached is the guided model output, the tensor that a pipeline hands to `scheduler.step`: a few latents. At a
skipped step no transformer runs, in no CFG branch; each of its calls is answered with what the same call returned last,
so that the pipeline's guidance has something to work on, and the scheduler steps with the forecast instead. For flow
matching the output is a velocity (MeanCache, Gao et al. 2026, arXiv:2601.19961, caches it on a schedule, too).

Which steps those are is a schedule's to say, or a gate's that is shown how much the output is expected to have changed
(`omni_runtime.cache.signals.ExpectedChange`): one decision a step, for all CFG branches.
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
from omni_runtime.cache.signals import ExpectedChange

#: Schedulers that evaluate the model once a step, on the latents that they gave out: class → what `σ` is measured by.
SCHEDULERS: dict[str, str] = {
    "FlowMatchEulerDiscreteScheduler": "sigmas",
    "FlowMatchLCMScheduler": "sigmas",
    "UniPCMultistepScheduler": "sigmas",
    "DPMSolverMultistepScheduler": "sigmas",
    "EulerDiscreteScheduler": "sigmas",
    "DDIMScheduler": "timesteps",
}


def check_scheduler(scheduler: Any, residual: bool = False) -> None:
    """Raise ValueError for a scheduler that whole steps cannot be skipped of, by name.

    Args:
        scheduler: the pipeline's.
        residual: whether what is cached is the model output less the latents (`OutputSite.residual`): that is near to
            constant where the model predicts a flow, and not where it predicts the noise.
    """
    name = type(scheduler).__name__
    if name in SCHEDULERS:
        predicts = getattr(scheduler.config, "prediction_type", None)
        if residual and not name.startswith("FlowMatch") and predicts != "flow_prediction":
            raise ValueError(
                f"{name} with prediction_type {predicts!r}: what a model adds to the latents can be reused where it "
                "predicts a flow alone. velocity_cache works with it"
            )
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
        signal: what is watched, fresh for each request; None for a gate that measures nothing.
        residual: whether what is remembered and forecast is the model output less the latents that the step begins
            with, to which it is added again, and not the output itself.
        drift_tolerance: as `Parts.drift_tolerance`.
    """

    gate: Callable[[Request, str], Gate]
    forecaster: Forecaster
    reach: float
    fitted_for: Mapping[str, Any] | None = None
    signal: Callable[[], ExpectedChange] | None = None
    residual: bool = False
    drift_tolerance: float | None = None


class OutputSteps:
    """The steps of one request: which are computed, and what stands in for the others.

    Args:
        site: the method's choices.
        request: the request.
        gate: the site's, for this request.
    """

    def __init__(self, site: OutputSite, request: Request, gate: Gate) -> None:
        self._request = request
        self.gate = gate
        self._by_step = site.forecaster.axis == "step"
        self._reach = site.reach
        self._history = history_of(site.forecaster)
        self._new_signal = site.signal
        self._signal = None if site.signal is None else site.signal()
        self._residual = site.residual
        self._returned: dict[str, tuple[int | None, Any]] = {}
        self._step = -1
        self._verdict = Verdict(True, "")

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is held between steps."""
        watched = [] if self._signal is None else self._signal.tensors()
        return (
            self._history.tensors()
            + watched
            + self.gate.tensors()
            + _tensors_of([returned for _, returned in self._returned.values()])
        )

    def verdict(self, name: str, batch: int | None) -> Verdict:
        """Whether the step under way is computed; settled at its first transformer call, `name` of so many samples."""
        if self._step != self._request.step:
            self._step = self._request.step
            if self._returned.get(name, (batch,))[0] != batch:
                # Guidance has ended, or begun (Z-Image's cfg_truncation): what was guided otherwise is no guide.
                self._history.clear()
                self._signal = None if self._new_signal is None else self._new_signal()
                self._verdict = Verdict(True, "another batch")
            elif self._history.shape is not None:
                self.gate.enters(self._history.shape)
                plan, reason = self.gate.plan(self._step)
                self._verdict = self._judged() if plan is Plan.MEASURE else Verdict(plan is Plan.COMPUTE, reason)
            else:
                self._verdict = Verdict(True, "nothing cached yet")
            self.gate.settle(self._verdict.computed)
        return self._verdict

    def _judged(self) -> Verdict:
        """The gate's judgement; what is done to the latents between two steps is seen one step later."""
        latents = self._request.sample
        if self._signal is not None and latents is not None:
            sums = self._signal.observe(latents)
            if sums is not None and self.gate.reads:
                pairs = sums.tolist()  # the decision's one transfer to the host
                return self.gate.judge(pairs, latents.numel() // len(pairs))
            if sums is not None:
                return self.gate.keep(sums, latents.numel(), self._request.images)
        return Verdict(True, "nothing to compare with")

    def remember(self, name: str, batch: int | None, returned: Any) -> None:
        """What a transformer call of this step, of so many samples, returned."""
        self._returned[name] = batch, returned

    def stand_in(self, name: str, batch: int | None) -> Any:
        """What that call returned last; None where it was never made, or of other samples."""
        before, returned = self._returned.get(name, (batch, None))
        return returned if before == batch else None

    def output(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler steps with: `output` at a computed step, at a skipped one its forecast."""
        if self._step != self._request.step:  # no transformer was called in this step
            return output
        if self._residual and output.shape != sample.shape:
            raise ValueError(
                f"the model output has the shape {tuple(output.shape)}, the latents {tuple(sample.shape)}: there is no "
                "difference of them to cache; velocity_cache needs none"
            )
        position = float(self._step) if self._by_step else self._request.sigma
        computed = self._verdict.computed
        if self._signal is not None:
            self._signal.leave(sample, output if computed else None)
        # In the wider of the two dtypes: pipelines may keep latents in fp32 beside a model in bf16.
        base = sample.to(torch.promote_types(sample.dtype, output.dtype)) if self._residual else None
        if computed:
            self._history.record(output if base is None else output.to(base.dtype), base, position)
            return output
        if self._history.shape != output.shape:
            raise RuntimeError(
                f"the model output has the shape {tuple(output.shape)} in a skipped step, {self._history.shape} in the "
                "last computed one: whole steps of this pipeline cannot be skipped"
            )
        forecast = self._history.forecast(base, reached(self._history.positions, position, self._reach))
        return forecast if base is None else forecast.to(output.dtype)


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
