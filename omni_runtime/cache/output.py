"""The output site: whole denoising steps are skipped, and what the scheduler steps with is forecast.

What is cached is the guided model output, the tensor that a pipeline hands to `scheduler.step`: a few latents. At a
skipped step no transformer runs, in no CFG branch; each of its calls is answered with what the same call returned last,
so that the pipeline's guidance has something to work on, and the scheduler steps with the forecast instead. For flow
matching the output is a velocity (MeanCache, Gao et al. 2026, arXiv:2601.19961, caches it on a schedule, too). The
next computed output tells how far off the forecasts were, and a `Corrector` makes up for it.

Which steps those are is a schedule's to say, or a gate's that is shown how much the output is expected to have changed
(`omni_runtime.cache.signals.ExpectedChange`): one decision a step, for all CFG branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.patching import Patch
from omni_kernels.patching.backends import nearest
from omni_runtime.cache.forecasters import Forecaster, newton
from omni_runtime.cache.gates import Gate, Plan, Verdict
from omni_runtime.cache.history import History, history_of
from omni_runtime.cache.lifecycle import Branch, Request, Sampling
from omni_runtime.cache.models import MODELS, block_lists
from omni_runtime.cache.replay import Replays
from omni_runtime.cache.session import GRADIENT, Args, CacheSession, Kwargs, differentiates
from omni_runtime.cache.signals import ExpectedChange

#: Schedulers that evaluate the model once a step, on the latents that they gave out: class → what `σ` is measured by.
#: (`steps_along` says which of them a `Corrector` works with.)
SCHEDULERS: dict[str, str] = {
    "FlowMatchEulerDiscreteScheduler": "sigmas",
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
    if _draws_noise(scheduler):
        raise ValueError(
            f"{name} as it is set here draws new noise at each step, so that the last model output says little of the "
            "next one: whole steps cannot be skipped. A cache of blocks (cache_dit, tea_cache) works with it"
        )
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


def _draws_noise(scheduler: Any) -> bool:
    """Whether each step replaces the noise in the latents by fresh noise."""
    config = scheduler.config
    return (
        type(scheduler).__name__ == "FlowMatchLCMScheduler"
        or bool(getattr(config, "stochastic_sampling", False))
        or str(getattr(config, "algorithm_type", "")).startswith("sde")
    )


def steps_along(scheduler: Any) -> bool:
    """Whether a step moves the latents by (σ_{i+1} − σ_i)·v_i, with v_i the model output and nothing else."""
    return type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not _draws_noise(scheduler)


class Corrector:
    """Makes up, at a computed step, for how far off the forecasts of the skipped steps before it were.

    These steps have moved the latents by Σ (σ_{i+1} − σ_i)·forecast_i. Forecasts extrapolate; once the next output is
    there, each v_i can be interpolated between outputs on both sides, which is several times as near. The difference of
    both sums is added to the move of the step under way, through what the scheduler is given for its output: no forward
    more, and one launch. To correct without another forward is UniPC's idea (UniC: Zhao et al. 2023, arXiv:2302.04867);
    there it is for the integral, here for the sum that the full run's own steps make.

    Args:
        order: of the interpolation by Newton's divided differences in σ, which takes order + 1 outputs.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._levels: list[float] = []
        self._moves: list[tuple[float, float, Sequence[float]]] = []

    def clear(self) -> None:
        """Forget all outputs."""
        self._levels.clear()
        self._moves.clear()

    def skipped(self, level: float, length: float, weights: Sequence[float]) -> None:
        """A step at this σ, this much long, has moved the latents by its length times the newest outputs, weighed."""
        self._moves.append((level, length, weights))

    def computed(self, level: float, length: float) -> list[float]:
        """A step at this σ is computed: the weights, of its output and those before it, of what it is to step with."""
        repeated = level in self._levels[:1]  # of two outputs at one σ, the later one counts
        self._levels = [level] if repeated else [level, *self._levels[: self._order]]
        if not self._moves or not length or repeated:
            self._moves.clear()
            return [1.0]
        found = [length] + [0.0] * max(self._order, *(len(weights) for _, _, weights in self._moves))
        for at, moved, weights in self._moves:
            for place, weight in enumerate(newton(self._levels, at)):
                found[place] += moved * weight
            for place, weight in enumerate(weights, 1):  # when these were the newest, this output was not there
                found[place] -= moved * weight
        self._moves.clear()
        return [weight / length for weight in found]


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
        corrector_order: of the `Corrector`, where the scheduler allows one; 0 for none. With `residual` there is none.
        residual: whether what is remembered and forecast is the model output less the latents that the step begins
            with, to which it is added again, and not the output itself.
        drift_tolerance: as `Parts.drift_tolerance`.
    """

    gate: Callable[[Request, str], Gate]
    forecaster: Forecaster
    reach: float
    fitted_for: Mapping[str, Any] | None = None
    signal: Callable[[], ExpectedChange] | None = None
    corrector_order: int = 0
    residual: bool = False
    drift_tolerance: float | None = None


class StandIn:
    """What one CFG branch's transformer call returned, to answer that call with where it is skipped.

    A single tensor is given as it was: pipelines guide with it, and what they make of it is not stepped with. Where a
    call returns several (LTX-2: video and audio), another scheduler may step with the others, so each is forecast.

    Attributes:
        batch: of how many samples the call is.
    """

    def __init__(self, batch: int | None, forecaster: Forecaster, reach: float) -> None:
        self.batch = batch
        self._forecaster = forecaster
        self._reach = reach
        self._returned: Any = None
        self._histories: list[History] = []

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is held."""
        return _tensors_of(self._returned) + [t for history in self._histories for t in history.tensors()]

    def record(self, returned: Any, position: float) -> None:
        """What a computed call returned."""
        self._returned = returned
        found = [tensor for tensor in _tensors_of(returned) if tensor.is_floating_point()]
        if len(found) < 2 or any(tensor.requires_grad for tensor in found):
            self._histories = []
            return
        if len(self._histories) != len(found):
            self._histories = [history_of(self._forecaster) for _ in found]
        for history, tensor in zip(self._histories, found, strict=True):
            history.record(tensor, None, position)

    def returned(self, position: float) -> Any:
        """What stands in for what a skipped call would return."""
        if not self._histories:
            return self._returned
        histories = iter(self._histories)

        def forecast(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            history = next(histories)
            return history.forecast(None, reached(history.positions, position, self._reach))

        return _with_tensors(self._returned, forecast)


class OutputSteps:
    """The steps of one request: which are computed, and what stands in for the others.

    Args:
        site: the method's choices.
        request: the request.
        gate: the site's, for this request.
        scheduler: what steps.
    """

    def __init__(self, site: OutputSite, request: Request, gate: Gate, scheduler: Any) -> None:
        self._request = request
        self.gate = gate
        self._by_step = site.forecaster.axis == "step"
        self._reach = site.reach
        order = 0 if site.residual else site.corrector_order
        self._corrector = Corrector(order) if order and steps_along(scheduler) else None
        keep = None if self._corrector is None else max(site.forecaster.snapshots, order) + 1
        self._history = history_of(site.forecaster, keep)
        self._new_signal = site.signal
        self._signal = None if site.signal is None else site.signal()
        self._residual = site.residual
        self._forecaster = site.forecaster
        self._step = -1
        self._verdict = Verdict(True, "")

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is held between steps."""
        watched = [] if self._signal is None else self._signal.tensors()
        return self._history.tensors() + watched + self.gate.tensors()

    def verdict(self, branch: Branch, batch: int | None, differentiated: bool = False) -> Verdict:
        """Whether the step under way is computed; settled at its first transformer call, of so many samples.

        Args:
            differentiated: whether a gradient is asked for in it.
        """
        if self._step != self._request.step:
            self._step = self._request.step
            if differentiated:
                self._verdict = Verdict(True, GRADIENT)
            elif branch.kept is not None and branch.kept.batch != batch:
                # Guidance has ended, or begun (Z-Image's cfg_truncation): what was guided otherwise is no guide.
                self._forget()
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

    def remember(self, branch: Branch, batch: int | None, returned: Any) -> None:
        """What a transformer call of this step, of so many samples, returned."""
        if branch.kept is None or branch.kept.batch != batch:
            branch.kept = StandIn(batch, self._forecaster, self._reach)
        branch.kept.record(returned, self._position())

    def _forget(self) -> None:
        self._history.clear()
        self._signal = None if self._new_signal is None else self._new_signal()

    def stand_in(self, branch: Branch, batch: int | None) -> Any:
        """What stands in for what that call would return; None where it was never made, or of other samples."""
        kept: StandIn | None = branch.kept
        return None if kept is None or kept.batch != batch else kept.returned(self._position())

    def _position(self) -> float:
        return float(self._step) if self._by_step else self._request.sigma

    def output(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler steps with: `output` at a computed step, at a skipped one its forecast."""
        if self._step != self._request.step:  # no transformer was called in this step
            return output
        if output.requires_grad:
            self._forget()
            return output
        if self._residual and output.shape != sample.shape:
            raise ValueError(
                f"the model output has the shape {tuple(output.shape)}, the latents {tuple(sample.shape)}: there is no "
                "difference of them to cache; velocity_cache needs none"
            )
        position, computed = self._position(), self._verdict.computed
        if self._signal is not None:
            self._signal.leave(sample, output if computed else None)
        # In the wider of the two dtypes: pipelines may keep latents in fp32 beside a model in bf16.
        base = sample.to(torch.promote_types(sample.dtype, output.dtype)) if self._residual else None
        return self._recorded(output, base, position) if computed else self._forecast(output, base, position)

    def _recorded(self, output: torch.Tensor, base: torch.Tensor | None, position: float) -> torch.Tensor:
        """A computed step: its output is remembered, and makes up for the skipped steps before it."""
        corrector = self._corrector
        # Moves of another shape, or of tokens that have each a length of their own, cannot be added up.
        if corrector is not None and (self._history.shape != output.shape or self._request.by_token):
            corrector.clear()
        self._history.record(output if base is None else output.to(base.dtype), base, position)
        return output if corrector is None else self._corrected(output, corrector)

    def _forecast(self, output: torch.Tensor, base: torch.Tensor | None, position: float) -> torch.Tensor:
        """A skipped step: the output is only what guidance has made of stand-ins. Its shape and dtype count."""
        if self._history.shape != output.shape:
            raise RuntimeError(
                f"the model output has the shape {tuple(output.shape)} in a skipped step, {self._history.shape} in the "
                "last computed one: whole steps of this pipeline cannot be skipped"
            )
        # No farther than `reach`: a line drawn over a long gap is worse than none.
        position = reached(self._history.positions, position, self._reach)
        weights = None if self._corrector is None else self._history.weights(position)
        if weights is not None and self._corrector is not None:
            self._corrector.skipped(*self._step_along(), weights)
            return self._history.combined(weights)
        forecast = self._history.forecast(base, position)
        return forecast if base is None else forecast.to(output.dtype)

    def _corrected(self, output: torch.Tensor, corrector: Corrector) -> torch.Tensor:
        """What a computed step is stepped with: its output, and what the skipped steps before it are short of."""
        weights = corrector.computed(*self._step_along())
        return output if len(weights) == 1 else self._history.combined(weights[: len(self._history)])

    def _step_along(self) -> tuple[float, float]:
        """σ of the step under way, and how far it goes in σ."""
        request = self._request
        place = request.begin + request.step
        return request.sigma, request.sigmas[place + 1] - request.sigma


def reached(positions: Sequence[float], x: float, reach: float) -> float:
    """`x`, or where a forecast ends on the way there: `reach` times the two newest positions' distance.

    `positions` are the snapshots', newest first; with fewer than two, there is nothing to extrapolate.
    """
    if len(positions) < 2:
        return x
    newest = positions[0]
    farthest = reach * abs(newest - positions[1])
    return newest + math.copysign(min(abs(x - newest), farthest), x - newest)


def _with_tensors(value: Any, made: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with another tensor in the place of each, in the order of `_tensors_of`."""
    if isinstance(value, torch.Tensor):
        return made(value)
    if isinstance(value, Mapping):  # diffusers' outputs are mappings with a constructor of their own
        return type(value)(**{key: _with_tensors(one, made) for key, one in value.items()})
    return type(value)(_with_tensors(one, made) for one in value) if type(value) in (tuple, list) else value


def _tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for one in value for t in _tensors_of(one)] if isinstance(value, (tuple, list)) else []


class OutputSession(CacheSession):
    """A method that skips whole steps: it needs no row of the model's class.

    Args:
        output: its choices.
    """

    def __init__(self, name: str, pipe: Any, output: OutputSite) -> None:
        super().__init__(name, pipe)
        # A pipeline may change to a second transformer for the last steps (Wan 2.2).
        second = getattr(pipe, "transformer_2", None)
        self.transformers += [] if second is None else [second]
        row = MODELS.get(type(self.transformer).__name__)
        self.blocks = 0 if row is None else sum(map(len, block_lists(self.transformer, row)))
        self._site = output
        self.fitted_for = output.fitted_for
        self.forecaster = output.forecaster
        if output.drift_tolerance is not None:
            self.replays = Replays(output.drift_tolerance)

    def take(self, sampling: Sampling, seams: Patch) -> None:
        """See `CacheSession.take`."""
        check_scheduler(self.pipe.scheduler, self._site.residual)
        super().take(sampling, seams)

    def call(
        self, sampling: Sampling, request: Request, transformer: Any, call: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """See `CacheSession.call`."""
        steps: OutputSteps = request.outputs
        if steps is None:
            check_scheduler(sampling.scheduler, self._site.residual)
            gate = self.gate_for(self._gate_of(request), self._site.signal is not None, request, "")
            steps = request.outputs = OutputSteps(self._site, request, gate, sampling.scheduler)
        branch = request.branch(sampling.context)
        batch = _batch_of(*args, *kwargs.values())
        verdict = steps.verdict(branch, batch, differentiates(transformer, args, kwargs))
        answer = None if verdict.computed else steps.stand_in(branch, batch)
        if answer is None:
            answer = call(*args, **kwargs)
            steps.remember(branch, batch, answer)
            request.blocks_run += self.blocks
            if not verdict.computed:
                verdict = Verdict(True, "no stand-in for this call")
        request.calls += 1
        request.blocks_total += self.blocks
        branch.decide(verdict)
        return answer

    def _gate_of(self, request: Request) -> Callable[[], Gate]:
        return lambda: self._site.gate(request, type(self.transformer).__name__)

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `CacheSession.stepped_with`."""
        return output if request.outputs is None else request.outputs.output(output, sample)

    def repeated(self, request: Request) -> None:
        """See `CacheSession.repeated`; what the second step is taken with is not what was forecast for the first."""
        if request.outputs is not None:
            raise ValueError(
                f"{type(self.pipe).__name__} takes a step of its scheduler twice: whole steps cannot be skipped. A "
                "cache of blocks (cache_dit, first_block_cache) works with it"
            )

    def gates_of(self, request: Request) -> Sequence[tuple[Gate, list[Any]]]:
        """See `CacheSession.gates_of`."""
        return [] if request.outputs is None else [(request.outputs.gate, list(request.decisions.values()))]


def _batch_of(*arguments: Any) -> int | None:
    """Of how many samples a transformer call is: its first argument is a tensor or a list of them."""
    return len(arguments[0]) if arguments and isinstance(arguments[0], (torch.Tensor, list, tuple)) else None
