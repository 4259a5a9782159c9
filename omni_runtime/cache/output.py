"""The output site: whole denoising steps are skipped, and the scheduler steps with a forecast.

The guided model output is cached: the tensor that a pipeline passes to `scheduler.step`, which is as small as the
latents. At a skipped step the transformer runs in no CFG branch. Each of its calls returns what the same call returned
last, because the pipeline's guidance needs an input. The scheduler then steps with the forecast instead of the guided
result. For flow matching the output is a velocity (MeanCache, Gao et al. 2026, arXiv:2601.19961, caches it on a
schedule, too). The next computed output shows the error of the forecasts, and a `Corrector` compensates for it.
Where the scheduler draws new noise at each step, the clean latents that it predicts are cached instead of the output
(`omni_runtime.cache.schedulers`).

A schedule chooses the skipped steps, or a gate does so from the expected change of the output
(`omni_runtime.cache.signals.ExpectedChange`). There is one decision per step, for all CFG branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from omni_kernels import ops
from omni_runtime.cache.contract import tensors_of
from omni_runtime.cache.forecasters import Forecaster, make_forecaster, newton
from omni_runtime.cache.gates import EveryStep, Gate, Plan, RehearsalGate, Verdict
from omni_runtime.cache.history import History, history_of
from omni_runtime.cache.lifecycle import Branch, Request, Sampling
from omni_runtime.cache.models import depth
from omni_runtime.cache.replay import Replays
from omni_runtime.cache.schedulers import check_scheduler, clean_latents, draws_noise, steps_along, why_twice
from omni_runtime.cache.session import GRADIENT, Args, CacheSession, Kwargs, differentiates
from omni_runtime.cache.sharing import SHARING
from omni_runtime.cache.signals import ExpectedChange

#: What to use where whole steps cannot be skipped, although the scheduler itself makes each step.
BLOCKS_WORK = ". A cache of blocks (cache_dit, first_block_cache) does not skip whole steps"
#: The default order of the `Corrector`.
CORRECTOR_ORDER = 2


class Corrector:
    """Compensates, at a computed step, for the forecast error of the skipped steps before it.

    The skipped steps have moved the latents by Σ (σ_{i+1} − σ_i)·forecast_i. Forecasts extrapolate. Once the next
    output is computed, each v_i can be interpolated between outputs on both sides, which is several times closer. The
    difference of the two sums is added to the move of the current step, by changing the output that the scheduler
    steps with. This costs no further forward, and one launch. Correcting without another forward is UniPC's idea
    (UniC: Zhao et al. 2023, arXiv:2302.04867). UniPC corrects the integral; the `Corrector` corrects the sum that the
    steps of the full run would give.

    Args:
        order: the order of the interpolation (Newton's divided differences in σ), which uses order + 1 outputs.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._levels: list[float] = []
        self._moves: list[tuple[float, float, Sequence[float]]] = []

    def clear(self) -> None:
        """Discard all recorded outputs and moves."""
        self._levels.clear()
        self._moves.clear()

    def skipped(self, level: float, length: float, weights: Sequence[float]) -> None:
        """Record a skipped step.

        Args:
            level: σ of the step.
            length: the change of σ over the step.
            weights: of the newest outputs, newest first. The latents were moved by length · (their weighted sum).
        """
        self._moves.append((level, length, weights))

    def computed(self, level: float, length: float) -> list[float]:
        """Record a computed step.

        Args:
            level: σ of the step.
            length: the change of σ over the step.

        Returns:
            One weight for the new output and for each earlier one, newest first. The scheduler steps with their
            weighted sum.
        """
        repeated = level in self._levels[:1]  # of two outputs at the same σ, the later one counts
        self._levels = [level] if repeated else [level, *self._levels[: self._order]]
        if not self._moves or not length or repeated:
            self._moves.clear()
            return [1.0]
        # Weights of the total move: the step's own, plus each skipped step's interpolation minus its forecast.
        found = [length] + [0.0] * max(self._order, *(len(weights) for _, _, weights in self._moves))
        for at, moved, weights in self._moves:
            for place, weight in enumerate(newton(self._levels, at)):
                found[place] += moved * weight
            for place, weight in enumerate(weights, 1):  # from 1: the newest output came after that forecast
                found[place] -= moved * weight
        self._moves.clear()
        return [weight / length for weight in found]


class Chosen(NamedTuple):
    """A method's choices for one request.

    Attributes:
        gate: decides which steps are computed.
        reach: how far a forecast may extrapolate beyond the newest snapshot, in units of the distance between the two
            newest. Farther out, the forecast stays at its value there: extrapolating over a long gap is worse than
            not extrapolating.
        corrector_order: order of the `Corrector`, if the scheduler allows one; 0 for none. Ignored with `residual`.
    """

    gate: Gate
    reach: float = 1.0
    corrector_order: int = CORRECTOR_ORDER


@dataclass(frozen=True)
class OutputSite:
    """A method's choices at the output site.

    Attributes:
        choose: request → the choices for the request, with a fresh gate; raises ValueError if the
            request is not supported.
        forecaster: computes the missing model output.
        fitted_for: as `Parts.fitted_for`.
        signal: makes a fresh signal for each request; None if the gate measures nothing.
        residual: if true, the model output minus the latents at the start of the step is cached and forecast, and the
            latents are added back. Otherwise the output itself is.
        drift_tolerance: as `Parts.drift_tolerance`.
    """

    choose: Callable[[Request], Chosen]
    forecaster: Forecaster
    fitted_for: Mapping[str, Any] | None = None
    signal: Callable[[], ExpectedChange] | None = None
    residual: bool = False
    drift_tolerance: float | None = None


class StandIn:
    """The last result of one CFG branch's transformer call, returned again where the call is skipped.

    A single tensor is returned unchanged: pipelines only use it for guidance, and the scheduler does not step with the
    result. If a call returns several tensors (LTX-2: video and audio), another scheduler may step with the others, so
    each one is forecast. If that scheduler is a copy of the pipeline's, an `OutputSteps` corrects what it steps with.

    Attributes:
        shape: the number of samples in the call, and the shapes of its tensors.
        transformer: the transformer that was called.
    """

    def __init__(self, shape: tuple[Any, ...], transformer: Any, forecaster: Forecaster, reach: float) -> None:
        self.shape = shape
        self.transformer = transformer
        self._forecaster = forecaster
        self._reach = reach
        self._returned: Any = None
        self._histories: list[History] = []

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held."""
        return tensors_of(self._returned) + [t for history in self._histories for t in history.tensors()]

    def record(self, returned: Any, position: float) -> None:
        """Record the result of a computed call."""
        self._returned = returned
        found = _floating(returned)
        if len(found) < 2 or any(tensor.requires_grad for tensor in found):
            self._histories = []
            return
        if len(self._histories) != len(found):
            self._histories = [history_of(self._forecaster) for _ in found]
        for history, tensor in zip(self._histories, found, strict=True):
            history.record(tensor, None, position)

    def returned(self, position: float) -> Any:
        """The stand-in for the result of a skipped call."""
        if not self._histories:
            return self._returned
        histories = iter(self._histories)

        def forecast(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            history = next(histories)
            return history.forecast(None, reached(history.positions, position, self._reach))

        return with_tensors(self._returned, forecast)


class OutputSteps:
    """The steps of one request: decides which are computed, and forecasts the others.

    Args:
        site: the method's choices.
        request: the request.
        chosen: the site's choices for this request.
        scheduler: the scheduler that takes the steps.
        leading: the steps of the scheduler that this one is a copy of, which decide for both.
    """

    def __init__(
        self, site: OutputSite, request: Request, chosen: Chosen, scheduler: Any, leading: OutputSteps | None = None
    ) -> None:
        self._request = request
        self._scheduler = scheduler
        self._leading = leading
        self._several = False
        self.chosen = chosen
        self.gate = chosen.gate
        self._noisy = draws_noise(scheduler)
        if self._noisy:
            request.notes.append(
                f"{type(scheduler).__name__} draws new noise at each step: skipped steps reuse the clean latents that "
                "it predicted last, and forecast nothing"
            )
        self._by_step = site.forecaster.axis == "step"
        self._reach = chosen.reach
        order = 0 if site.residual else chosen.corrector_order
        self._corrector = Corrector(order) if order and steps_along(scheduler) else None
        keep = None if self._corrector is None else max(site.forecaster.snapshots, order) + 1
        # What new noise does to the clean latents is random. A forecast of a higher order only amplifies it.
        self._history = history_of(make_forecaster("reuse") if self._noisy else site.forecaster, keep)
        self._new_signal = site.signal
        self._signal = None if site.signal is None else site.signal()
        self._residual = site.residual
        self._forecaster = site.forecaster
        self._step = -1
        self._verdict = Verdict(True, "")

    @property
    def corrects_others(self) -> bool:
        """Whether what a copy of the scheduler steps with is corrected, too: transformer calls return several tensors.

        Without a corrector, the forecasts of the stand-ins serve it as well.
        """
        return self._several and self._corrector is not None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held between steps."""
        watched = [] if self._signal is None else self._signal.tensors()
        return self._history.tensors() + watched + self.gate.tensors()

    def verdict(
        self, branch: Branch, shape: tuple[Any, ...], transformer: Any = None, differentiated: bool = False
    ) -> Verdict:
        """Whether the current step is computed. This is decided at the first transformer call of the step.

        Args:
            branch: the branch of the call.
            shape: the number of samples in the call, and the shapes of its tensors.
            transformer: the transformer that is called.
            differentiated: whether the call needs a gradient.
        """
        if self._step != self._request.step:
            self._step = self._request.step
            if differentiated:
                self._verdict = Verdict(True, GRADIENT)
            elif branch.kept is not None and branch.kept.transformer is not transformer:
                # Wan 2.2: what one transformer returned says little of what the next one will return.
                self._forget()
                self._verdict = Verdict(True, "another transformer")
            elif branch.kept is not None and branch.kept.shape[:1] != shape[:1]:
                # Guidance has ended or begun (Z-Image's cfg_truncation): earlier outputs cannot be used any more.
                self._forget()
                self._verdict = Verdict(True, "another batch")
            elif branch.kept is not None and branch.kept.shape != shape:
                self._verdict = Verdict(True, "another shape")
            elif self._history.shape is not None:
                self.gate.enters(self._history.shape)
                plan, reason = self.gate.plan(self._step)
                self._verdict = self._judged() if plan is Plan.MEASURE else Verdict(plan is Plan.COMPUTE, reason)
            else:
                self._verdict = Verdict(True, "nothing cached yet")
            self.gate.settle(self._verdict.computed)
        return self._verdict

    def _judged(self) -> Verdict:
        """The gate's verdict from the measured distances.

        A change that is made to the latents between two steps is seen one step later.
        """
        latents = self._request.sample
        if self._signal is not None and latents is not None:
            sums, sharing = self._signal.observe(latents), SHARING.get()
            if sums is not None and sharing is not None:
                sums = sharing.agreed(sums)
            if sums is not None and self.gate.reads:
                pairs = sums.tolist()  # the only transfer to the host for this decision
                return self.gate.judge(pairs, latents.numel() // len(pairs))
            if sums is not None:
                return self.gate.keep(sums, latents.numel(), self._request.images)
        return Verdict(True, "nothing to compare with")

    def remember(self, branch: Branch, shape: tuple[Any, ...], transformer: Any, returned: Any) -> None:
        """Record the result of a transformer call of this step, whose arguments have these shapes."""
        kept, found = branch.kept, _floating(returned)
        self._several = len(found) > 1
        if self._noisy and len({tensor.shape for tensor in found}) > 1:
            raise ValueError(
                f"{type(self._scheduler).__name__} draws new noise at each step, and {type(transformer).__name__} "
                "returns tensors of several shapes, for another scheduler, too: whole steps cannot be skipped"
            )
        if kept is None or kept.shape != shape or kept.transformer is not transformer:
            branch.kept = StandIn(shape, transformer, self._forecaster, self._reach)
        branch.kept.record(returned, self._position())

    def _forget(self) -> None:
        self._history.clear()
        if self._corrector is not None:
            self._corrector.clear()
        self._signal = None if self._new_signal is None else self._new_signal()

    def stand_in(self, branch: Branch, shape: tuple[Any, ...]) -> Any:
        """The stand-in for a call's result; None if no call of this branch with this shape was recorded."""
        kept: StandIn | None = branch.kept
        return None if kept is None or kept.shape != shape else kept.returned(self._position())

    def _position(self) -> float:
        return float(self._step) if self._by_step else self._request.sigma

    def output(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler steps with: `output` (corrected) at a computed step, the forecast at a skipped one."""
        # A computed output is recorded, and corrected for the forecasts before it. For a skipped step, `output` is only
        # what the pipeline's guidance made of stand-ins, and a forecast replaces it. Both are weighted sums of recorded
        # outputs, so each takes one launch.
        if self._leading is not None:
            self._step, self._verdict = self._leading._step, self._leading._verdict
        if self._step != self._request.step:  # no transformer was called in this step
            return output
        if output.requires_grad:
            self._forget()
            return output
        if self._noisy:
            return self._by_clean_latents(output, sample)
        if self._residual and output.shape != sample.shape:
            raise ValueError(
                f"the model output has the shape {tuple(output.shape)}, the latents {tuple(sample.shape)}: there is no "
                "difference of them to cache. velocity_cache caches the output itself"
            )
        position, computed = self._position(), self._verdict.computed
        if self._signal is not None:
            self._signal.leave(sample, output if computed else None)
        # Use the wider of the two dtypes: pipelines may keep latents in fp32 while the model is in bf16.
        base = sample.to(torch.promote_types(sample.dtype, output.dtype)) if self._residual else None
        return self._recorded(output, base, position) if computed else self._forecast(output, base, position)

    def _by_clean_latents(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """As `output`, for a scheduler that draws new noise: x0 = a·sample + b·output is cached in fp32 and reused."""
        scheduler = type(self._scheduler).__name__
        if self._request.by_token or output.shape != sample.shape:
            raise ValueError(
                f"{scheduler} draws new noise at each step, and "
                + ("has a noise level for each token" if self._request.by_token else "the model predicts more than it")
                + ": whole steps cannot be skipped"
            )
        found = clean_latents(self._scheduler, self._request.sigma)
        if self._verdict.computed:
            if found is None:  # the next step is computed, too
                self._history.clear()
                return output
            clean = ops.linear_forecast(None, [sample.float(), output.float()], found)
            self._history.record(clean, None, self._position())
            return output
        self._check_shape(output)
        if found is None:
            raise RuntimeError(f"{scheduler} is back at pure noise in a skipped step: whole steps cannot be skipped")
        a, b = found
        clean = self._history.forecast(None, self._position())
        return ops.linear_forecast(None, [clean, sample.float()], (1.0 / b, -a / b)).to(output.dtype)

    def _recorded(self, output: torch.Tensor, base: torch.Tensor | None, position: float) -> torch.Tensor:
        """Record the output of a computed step, and correct it for the skipped steps before it."""
        corrector = self._corrector
        # Moves cannot be summed if the shape has changed, or if each token has its own step length.
        if corrector is not None and (self._history.shape != output.shape or self._request.by_token):
            corrector.clear()
        self._history.record(output if base is None else output.to(base.dtype), base, position)
        return output if corrector is None else self._corrected(output, corrector)

    def _forecast(self, output: torch.Tensor, base: torch.Tensor | None, position: float) -> torch.Tensor:
        """The forecast for a skipped step. `output` was made from stand-ins: only its shape and dtype are used."""
        self._check_shape(output)
        # No farther than `reach`: extrapolating over a long gap is worse than not extrapolating.
        position = reached(self._history.positions, position, self._reach)
        weights = None if self._corrector is None else self._history.weights(position)
        if weights is not None and self._corrector is not None:
            self._corrector.skipped(*self._step_along(), weights)
            return self._history.combined(weights)
        forecast = self._history.forecast(base, position)
        return forecast if base is None else forecast.to(output.dtype)

    def _check_shape(self, output: torch.Tensor) -> None:
        if self._history.shape != output.shape:
            raise RuntimeError(
                f"the model output has the shape {tuple(output.shape)} in a skipped step, {self._history.shape} in the "
                "last computed one: whole steps of this pipeline cannot be skipped"
            )

    def _corrected(self, output: torch.Tensor, corrector: Corrector) -> torch.Tensor:
        """The output of a computed step, plus the correction for the skipped steps before it."""
        weights = corrector.computed(*self._step_along())
        return output if len(weights) == 1 else self._history.combined(weights[: len(self._history)])

    def _step_along(self) -> tuple[float, float]:
        """σ of the current step, and the change of σ over it."""
        request = self._request
        place = request.begin + request.step
        return request.sigma, request.sigmas[place + 1] - request.sigma


def reached(positions: Sequence[float], x: float, reach: float) -> float:
    """Limit `x` to at most `reach` times the distance between the two newest positions, from the newest one.

    `positions` are those of the snapshots, newest first. With fewer than two, `x` is returned unchanged.
    """
    if len(positions) < 2:
        return x
    newest = positions[0]
    farthest = reach * abs(newest - positions[1])
    return newest + math.copysign(min(abs(x - newest), farthest), x - newest)


def with_tensors(value: Any, made: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with `made(tensor)` in place of each tensor, in the order of `tensors_of`."""
    if isinstance(value, torch.Tensor):
        return made(value)
    if type(value) is dict:  # a cache of the model's own, such as keys and values
        return value
    if isinstance(value, Mapping):  # diffusers' outputs are mappings, and are constructed from keyword arguments
        return type(value)(**{key: with_tensors(one, made) for key, one in value.items()})
    if hasattr(value, "_fields"):
        return type(value)(*(with_tensors(one, made) for one in value))
    return type(value)(with_tensors(one, made) for one in value) if type(value) in (tuple, list) else value


def _floating(value: Any) -> list[torch.Tensor]:
    """The tensors for which `with_tensors` calls `made`, if they are of numbers that can be forecast."""
    found: list[torch.Tensor] = []

    def made(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, made)
    return [tensor for tensor in found if tensor.is_floating_point()]


class OutputSession(CacheSession):
    """A session of a method that skips whole steps. It needs no model row for the transformer's class.

    Args:
        output: the method's choices.
        may_compute_all: whether a pipeline that takes a step of its scheduler twice is run without a skipped step, and
            a note says so. Otherwise it is an error.
    """

    def __init__(self, name: str, pipe: Any, output: OutputSite, may_compute_all: bool = False) -> None:
        super().__init__(name, pipe)
        self._may_compute_all = may_compute_all
        self.blocks = depth(self.transformer)
        self._site = output
        self.fitted_for = output.fitted_for
        self.forecaster = output.forecaster
        if output.drift_tolerance is not None:
            self.replays = Replays(output.drift_tolerance)

    def check(self) -> None:
        """See `CacheSession.check`."""
        why = None if self._may_compute_all else why_twice(type(self.pipe))
        if why is not None:
            raise ValueError(why + BLOCKS_WORK)
        check_scheduler(self.pipe.scheduler, self._site.residual)
        super().check()

    def call(
        self, sampling: Sampling, request: Request, transformer: Any, call: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """See `CacheSession.call`."""
        steps: OutputSteps = request.outputs
        if steps is None:
            check_scheduler(sampling.scheduler, self._site.residual)
            steps = request.outputs = OutputSteps(self._site, request, self._chosen(request), sampling.scheduler)
        branch = request.branch(sampling.context)
        shape = self.shape_of(*args, *kwargs.values())
        verdict = steps.verdict(branch, shape, transformer, differentiates(transformer, args, kwargs))
        answer = None if verdict.computed else steps.stand_in(branch, shape)
        if answer is None:
            answer = call(*args, **kwargs)
            steps.remember(branch, shape, transformer, answer)
            request.blocks_run += self.blocks
            if not verdict.computed:
                verdict = Verdict(True, "no stand-in for this call")
        request.calls += 1
        request.blocks_total += self.blocks
        branch.decide(verdict)
        return answer

    def shape_of(self, *arguments: Any) -> tuple[Any, ...]:
        """The number of samples in a call, by its first argument (None if unknown), and its tensors' shapes."""
        first = arguments[0] if arguments else None
        counted = isinstance(first, (list, tuple)) or (isinstance(first, torch.Tensor) and first.dim())
        batch = len(first) if first is not None and counted else None
        return batch, *[tuple(one.shape) for one in arguments if isinstance(one, torch.Tensor)]

    def _chosen(self, request: Request) -> Chosen:
        measures = self._site.signal is not None
        if self.rehearsing:
            return Chosen(RehearsalGate(measures))
        chosen = self._site.choose(request)
        return chosen._replace(gate=self.gate_for(lambda: chosen.gate, measures, request, ""))

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `CacheSession.stepped_with`."""
        return output if request.outputs is None else request.outputs.output(output, sample)

    def stepped_beside(
        self, request: Request, own: Request, scheduler: Any, output: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """See `CacheSession.stepped_beside`. Only the last step of a copy comes when the request has ended."""
        leading: OutputSteps | None = request.outputs
        if own.outputs is None:
            if leading is None or not leading.corrects_others:
                return output
            site = replace(self._site, signal=None)
            own.outputs = OutputSteps(site, own, leading.chosen, scheduler, leading)
        return own.outputs.output(output, sample)

    def repeated(self, request: Request) -> None:
        """See `CacheSession.repeated`. The forecast for the first step would not fit the second.

        It is noticed in the first step of a request, which is always computed.
        """
        steps: OutputSteps | None = request.outputs
        if steps is None or isinstance(steps.gate, EveryStep):
            return
        why = f"{type(self.pipe).__name__} takes a step of its scheduler twice: whole steps cannot be skipped"
        if not self._may_compute_all:
            raise ValueError(why + BLOCKS_WORK)
        steps.gate = EveryStep()
        request.notes.append(f"{self.name}: every step is computed, because {why}")

    def stepped_by_copies(self, request: Request) -> None:
        """See `CacheSession.stepped_by_copies`. Where no step need be skipped, nothing is, and a warning says so."""
        if not self._may_compute_all:
            super().stepped_by_copies(request)

    def gates_of(self, request: Request) -> Sequence[tuple[Gate, list[Any]]]:
        """See `CacheSession.gates_of`."""
        return [] if request.outputs is None else [(request.outputs.gate, list(request.decisions.values()))]
