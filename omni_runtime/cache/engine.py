"""The cache engine: one method's four choices, at work on one pipeline.

A `CacheSession` joins the seams. The scheduler's lifecycle opens and ends requests; each transformer call within one
goes through the `Passage` of its CFG branch over the model's blocks, which has the branch's gate, remembered signal and
history, and hangs on the request. A method that skips whole steps (`omni_runtime.cache.output`) answers the transformer
calls of those itself, before any passage, and has the scheduler step with its forecast.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from omni_kernels import ops
from omni_kernels.patching import Patch, PatchConflictError
from omni_kernels.patching.changes import describe
from omni_runtime.cache import calibration
from omni_runtime.cache.blocks import BlockCalls, BlockList, Passage
from omni_runtime.cache.forecasters import Forecaster
from omni_runtime.cache.gates import (
    REHEARSAL,
    REHEARSAL_ABOVE,
    REHEARSAL_BENEATH,
    Gate,
    Plan,
    RehearsalGate,
    Verdict,
    by_image,
)
from omni_runtime.cache.history import history_of
from omni_runtime.cache.lifecycle import Lifecycle, Request
from omni_runtime.cache.models import MODELS, Arguments, ModelRow, block_lists, row_of
from omni_runtime.cache.output import OutputSite, OutputSteps, check_scheduler
from omni_runtime.cache.ranks import Ranks, Shard, SplitCalls, ranks_of
from omni_runtime.cache.replay import ReplayGate, Replays
from omni_runtime.cache.report import BranchReport, CacheReport, Decision, StepEvent
from omni_runtime.cache.signals import Nothing, Signal, SituatedSignal

#: Of a transformer's attributes, the one by which `omni_runtime.cache.library` says that it works on it.
LIBRARY_MARK = "_omni_kernels_library"


@dataclass(frozen=True)
class Parts:
    """A method's four choices for the blocks of one model.

    Attributes:
        first, last: the site: what blocks [first, last) add to the hidden states is replaced at a skipped step.
        signal: what is watched.
        gate: a request → a fresh gate for one branch of it; raises ValueError for a request that it cannot serve.
        forecaster: what stands in for the missing residual.
        fitted_for: the runs that the method's numbers were fitted to, as `calibration.describe` has them; a request
            that differs is warned of. None where nothing was fitted.
        note: what the report should say of the choices.
        drift_tolerance: requests replay the schedule of the first of their kind until it has drifted farther than this
            (`omni_runtime.cache.replay`); None: each decides for itself.
    """

    first: int
    last: int
    signal: Signal
    gate: Callable[[Request], Gate]
    forecaster: Forecaster
    fitted_for: Mapping[str, Any] | None = None
    note: str | None = None
    drift_tolerance: float | None = None


class ResidualPassage(Passage):
    """One CFG branch of one request: what it remembers, and its forwards, computed or forecast as its gate decides.

    Nothing of it but the decisions outlives the request.
    """

    __slots__ = (
        "_by_step",
        "_count_noise",
        "_every_step",
        "_images",
        "_noise_tokens",
        "_position",
        "_shard",
        "_signal",
        "_using",
        "decisions",
        "encoder",
        "gate",
        "hidden",
        "remembered",
        "step",
    )

    def __init__(self, session: CacheSession, request: Request, name: str) -> None:
        parts = session.parts
        assert parts is not None  # there are passages only where a method has choices for the blocks
        super().__init__(session.calls, parts.first, parts.last)
        assert session.row is not None
        self._count_noise = session.row.noise_tokens if parts.signal.noise_only else None
        self._signal = parts.signal
        self._every_step = parts.signal.every_step
        self._by_step = parts.forecaster.axis == "step"
        self.step = -1
        if session.rehearsing:
            pattern = REHEARSAL if session._output is None else REHEARSAL_BENEATH
            gate: Gate = RehearsalGate(not isinstance(parts.signal, Nothing), pattern)
        else:
            gate = parts.gate(request)
            if session.replays is not None:
                gate = session.replays.gate(gate, request, name)
        self.gate = gate
        self.decisions: list[Decision] = []
        request.decisions[name] = self.decisions
        self.remembered: torch.Tensor | None = None
        self._shard = None if session.ranks is None else Shard(session.ranks)
        add = None if session.ranks is None else session.ranks.add
        self.hidden = history_of(parts.forecaster, add=add)
        # The text stream matters only to blocks that still run: with none behind the site, it is left alone.
        self.encoder = None if parts.last == session.blocks else history_of(parts.forecaster, add=add)

    def begin(self, request: Request, arguments: Arguments, stepwise: bool) -> None:
        """A forward of this step of the request begins, with these arguments of the transformer."""
        self.ran = 0
        self.stepwise = stepwise
        self._noise_tokens = None if self._count_noise is None else self._count_noise(arguments)
        self.step = request.step
        self._images = request.images
        self._position = float(request.step) if self._by_step else request.sigma
        if self._shard is not None and self._shard.reshaped(arguments):
            self.hidden.shape = None  # fits nothing, on any rank

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is held between forwards."""
        held = self.gate.tensors() if self.remembered is None else [self.remembered, *self.gate.tensors()]
        return held + self.hidden.tensors() + (self.encoder.tensors() if self.encoder else [])

    def _forget(self, hidden: torch.Tensor) -> None:
        """Drop what does not fit `hidden`: the batch, the resolution or the prompt's length has changed."""
        if self._shard is None:
            tokens = hidden.shape[1] if self._noise_tokens is None else self._noise_tokens
            self.gate.enters((hidden.shape[0], tokens, *hidden.shape[2:]))
        else:
            self.gate.enters(self._shard.measure(hidden, self._noise_tokens))
        self.remembered = None
        self.hidden.clear()
        if self.encoder is not None:
            self.encoder.clear()

    def enter(self, block: torch.nn.Module, base: Any, arguments: Arguments) -> bool:
        """See `Passage.enter`."""
        hidden, encoder = base
        gate, history = self.gate, self.encoder
        using = self._using = ops.trusted(hidden)
        verdict = None
        if hidden.shape == self.hidden.shape and (history is None or encoder is None or encoder.shape == history.shape):
            plan, reason = gate.plan(self.step)
            if plan is not Plan.MEASURE:
                verdict = Verdict(plan is Plan.COMPUTE, reason, None, gate.accumulated)
        else:
            verdict = Verdict(True, "shape changed" if len(self.hidden) else "nothing cached yet")
            self._forget(hidden)
        if verdict is None or verdict.computed or self._every_step:
            entered = hidden if self.entered is None else self.entered
            if self._noise_tokens is not None:
                noise = self._noise_tokens if self._shard is None else self._shard.part(self._noise_tokens)
                hidden, entered = hidden[:, :noise], entered[:, :noise]
            then = self.remembered if verdict is None else None
            now, sums = self._signal.observe(block, arguments, hidden, entered, then, using)
            if verdict is None and then is None:
                verdict = Verdict(True, "nothing to compare with")
            elif verdict is None:
                elements = now.numel() if self._shard is None else self._shard.add(sums)
                if gate.reads:
                    pairs = sums.tolist()  # the decision's one transfer to the host
                    if len(pairs) != self._images:
                        pairs = by_image(pairs, self._images)
                    verdict = gate.judge(pairs, elements // len(pairs))
                else:
                    verdict = gate.keep(sums, elements, self._images)
            if verdict.computed or self._every_step:
                self.remembered = now
        gate.settle(verdict.computed)
        self.decisions.append(Decision(self.step, *verdict))
        return verdict.computed

    def leave(self, hidden: torch.Tensor, encoder: torch.Tensor | None, base: Any) -> None:
        """See `Passage.leave`."""
        self.hidden.record(hidden, base[0], self._position)
        if self.encoder is not None and encoder is not None:
            self.encoder.record(encoder, base[1], self._position)

    def forecast(self, base: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Passage.forecast`."""
        hidden, encoder = base
        if self.encoder is not None and encoder is not None:
            encoder = self.encoder.forecast(encoder, self._position, self._using)
        return self.hidden.forecast(hidden, self._position, self._using), encoder


class SituatedPassage(ResidualPassage):
    """A branch with a signal of its own, which is told of each forward."""

    __slots__ = ("_situated",)

    def __init__(self, session: CacheSession, request: Request, name: str) -> None:
        super().__init__(session, request, name)
        self._signal = self._situated = cast(SituatedSignal, self._signal).fresh(self._shard)

    def begin(self, request: Request, arguments: Arguments, stepwise: bool) -> None:
        """See `ResidualPassage.begin`."""
        super().begin(request, arguments, stepwise)
        self._situated.situate(request.sigma, arguments)


class CacheSession:
    """One cache method, installed on one pipeline.

    Args:
        name: the method's.
        parts: its choices for the transformer's blocks, from the model's row and the number of blocks; None for a
            method that leaves them alone, and so needs no row.
        output: its choices for whole steps; None for a method that skips none.

    Raises:
        ValueError, PatchConflictError: a pipeline that it cannot serve, by name.
    """

    passage_class: Callable[..., ResidualPassage] = ResidualPassage
    #: Why several ranks may not run the transformer, where blocks are watched; None where they may.
    alone: str | None = None

    def __init__(
        self,
        name: str,
        pipe: Any,
        parts: Callable[[ModelRow, int], Parts] | None,
        output: OutputSite | None = None,
    ) -> None:
        self.name = name
        self.on_step: Callable[[StepEvent], None] | None = None
        self.transformer = _transformer_of(pipe)
        _refuse_cached(self.transformer)
        self._output = output
        if output is not None:
            check_scheduler(pipe.scheduler, output.residual)
        if parts is not None:
            self._check_blocks_of(self.transformer)
        #: Whether blocks are skipped, by what each rank sees of the hidden states. The whole model's output, by which
        #: steps are skipped, is gathered: of that every rank has all.
        self._skips_blocks = parts is not None
        self.ranks: Ranks | None = None
        # A pipeline may change to a second transformer for the last steps (Wan 2.2): whole steps are skipped of both.
        second = getattr(pipe, "transformer_2", None) if parts is None else None
        self._transformers = [self.transformer] if second is None else [self.transformer, second]
        self.row = MODELS.get(type(self.transformer).__name__) if parts is None else row_of(_name(self.transformer))
        self._lists = [] if self.row is None else block_lists(self.transformer, self.row)
        self._flat = [block for blocks in self._lists for block in blocks]
        self.blocks = len(self._flat)
        self.parts: Parts | None = None
        if parts is not None:
            assert self.row is not None  # row_of has found one
            self.calls = BlockCalls(self.row, self._flat, self.transformer.forward)
            self.parts = parts(self.row, self.blocks)
            if isinstance(self.parts.signal, SituatedSignal):
                self.passage_class = SituatedPassage
        tolerances = [site.drift_tolerance for site in (self.parts, output) if site is not None]
        tolerance = next((one for one in tolerances if one is not None), None)
        self.replays = None if tolerance is None else Replays(tolerance)
        self._lifecycle = Lifecycle(
            pipe,
            self._opened,
            self._stepped,
            None if output is None else self.stepped_with,
            None if self.replays is None else self._replayed,
        )
        self.rehearsing = False
        self._last: Request | None = None
        self.passage: Passage | None = None
        self._context: str | None = None

    def install(self, patch: Patch) -> None:
        """Take the seams.

        Raises:
            PatchConflictError: somebody else holds a slot that is needed.
        """
        self._lifecycle.install(patch)
        if self.parts is not None and self.row is not None:
            start = 0
            for name, blocks in zip(self.row.block_lists, self._lists, strict=True):
                patch.set_module(self.transformer, name, BlockList(blocks, start, self))
                start += len(blocks)
        for transformer in self._transformers:
            call = transformer._compiled_call_impl or transformer._call_impl if self.parts is None else self._call
            if self._output is not None:
                call = functools.partial(self._answer, call)
            patch.set_method(transformer, "_compiled_call_impl", call)
            if hasattr(transformer, "cache_context"):
                original: Any = transformer.cache_context
                patch.set_method(transformer, "cache_context", self._cache_context(original))

    def close(self) -> None:
        """Free what a request under way holds."""
        self._lifecycle.end()

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """While open, one step is computed and two are skipped, by turns; nothing is told or learnt of them."""
        last = self._last
        self.rehearsing = True
        try:
            yield
        finally:
            self.rehearsing = False
            self._last = last

    @property
    def report(self) -> CacheReport | None:
        """What the last request did; None before the first."""
        request = self._last
        if request is None:
            return None
        return CacheReport(
            backend=self.name,
            steps=request.steps,
            branches={name: BranchReport(list(decisions)) for name, decisions in request.decisions.items()},
            blocks_run=request.blocks_run,
            blocks_total=request.blocks_total,
            step_seconds=list(request.step_seconds),
            complete=request.complete,
            notes=list(request.notes),
            drift=request.drift,
        )

    def held_tensors(self) -> list[torch.Tensor]:
        """Every tensor that the request under way holds; none between requests."""
        request = self._lifecycle.request
        if request is None:
            return []
        holders = [*request.state.values(), *([] if request.outputs is None else [request.outputs])]
        return [t for holder in holders for t in holder.tensors()]

    def _check_blocks_of(self, transformer: torch.nn.Module) -> None:
        """Raise for what a block cache cannot live with, by name."""
        _refuse_compiled(transformer)
        _refuse_parallel(transformer, self.alone)

    def _opened(self, request: Request) -> None:
        if self._skips_blocks:
            for transformer in self._transformers:
                _refuse_parallel(transformer, self.alone)
        if self.row is not None and self.parts is not None:
            # Who runs the transformer, and what is split where, may have changed since the last request.
            self.ranks = ranks_of(self.transformer)
            if self.ranks is not None and any(block._compiled_call_impl is not None for block in self._flat):
                raise ValueError(
                    f"the blocks of this {_name(self.transformer)} are compiled, and it is run by several "
                    "ranks: a cache of blocks does not go with both yet"
                )
            kind = BlockCalls if self.ranks is None else SplitCalls
            if type(self.calls) is not kind:
                self.calls = kind(self.row, self._flat, self.transformer.forward)
        self._last = request
        if self.parts is not None and self.parts.note is not None:
            request.notes.append(self.parts.note)

    def _stepped(self, request: Request) -> None:
        if request.step == 1 and not request.decisions:
            warnings.warn(
                f"a step was taken without the patched {type(self.transformer).__name__}: where the pipeline's "
                "transformer was replaced or compiled after patching, nothing is cached",
                stacklevel=5,
            )
        if self.rehearsing:
            return
        for site in (self.parts, self._output) if request.step == 1 else ():
            if site is not None and site.fitted_for is not None:
                self._compare(site.fitted_for, request)
        if self.on_step is None:
            return
        step = request.step - 1
        made = {name: d[-1] for name, d in request.decisions.items() if d and d[-1].step == step}
        self.on_step(StepEvent(step, request.steps, any(d.computed for d in made.values()), made))

    def _replayed(self, request: Request) -> None:
        """A request has completed: look at what was replayed in it, and keep its schedules."""
        assert self.replays is not None
        told = [(passage.gate, [passage.decisions]) for passage in request.state.values()]
        if request.outputs is not None:
            told.append((request.outputs.gate, list(request.decisions.values())))
        request.drift = self.replays.complete([one for one in told if isinstance(one[0], ReplayGate)])
        if request.drift is not None:
            request.notes.append(self.replays.note(request.drift))

    def describe(self, request: Request) -> dict[str, Any]:
        """What fitted numbers hang on, of a request whose first step has closed."""
        return calibration.describe(
            self.transformer, self.blocks, self._lifecycle.scheduler, request.steps, request.latents
        )

    def _compare(self, fitted_for: Mapping[str, Any], request: Request) -> None:
        """Warn of a request that is unlike those that the method's numbers were fitted to."""
        differences = calibration.differences(fitted_for, self.describe(request))
        if differences:
            note = f"{self.name} was calibrated for other runs: this one has {', '.join(differences)}"
            request.notes.append(note)
            warnings.warn(note, stacklevel=6)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's call."""
        request = self._lifecycle.current()
        if request is None or request.ended:
            return self.transformer._call_impl(*args, **kwargs)
        calls = self.calls
        arguments = {**dict(zip(calls.forward_names, args, strict=False)), **kwargs} if args else kwargs
        try:
            # The pipeline's name for this call, else its order within the step; unlike any other of the step.
            name = self._context or str(request.calls)
            passage = request.state.get(name)
            if passage is not None and passage.step == request.step:
                name = f"{name}#{request.calls}"
                passage = request.state.get(name)
            if passage is None:
                passage = request.state[name] = self.passage_class(self, request, name)
            passage.begin(request, arguments, calls.works_between(args, kwargs))
            self.passage = passage
            output = self.transformer._call_impl(*args, **kwargs)
        except BaseException:
            self._lifecycle.end()
            raise
        finally:
            self.passage = None
        request.calls += 1
        request.blocks_run += passage.ran
        request.blocks_total += self.blocks
        return output

    def _answer(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A transformer's call, where whole steps may be skipped; `call` makes it."""
        request = self._lifecycle.current()
        if request is None or request.ended:
            return call(*args, **kwargs)
        try:
            steps = request.outputs
            if steps is None:
                assert self._output is not None
                check_scheduler(self._lifecycle.scheduler, self._output.residual)
                if self.rehearsing:
                    pattern = REHEARSAL if self.parts is None else REHEARSAL_ABOVE
                    gate: Gate = RehearsalGate(self._output.signal is not None, pattern)
                else:
                    gate = self._output.gate(request, _name(self.transformer))
                    if self._output.drift_tolerance is not None and self.replays is not None:
                        gate = self.replays.gate(gate, request, "")
                steps = request.outputs = OutputSteps(self._output, request, gate, self._lifecycle.scheduler)
            name = self._context or str(request.calls)
            made = request.decisions.get(name)
            if made and made[-1].step == request.step:
                name = f"{name}#{request.calls}"
            batch = _batch_of(*args, *kwargs.values())
            verdict = steps.verdict(name, batch)
            answer = None if verdict.computed else steps.stand_in(name, batch)
            if answer is None:
                answer = call(*args, **kwargs)
                steps.remember(name, batch, answer)
                if self.parts is not None:  # `call` has counted itself and told what it decided
                    return answer
                request.blocks_run += self.blocks
                if not verdict.computed:
                    verdict = Verdict(True, "no stand-in for this call")
        except BaseException:
            self._lifecycle.end()
            raise
        request.calls += 1
        request.blocks_total += self.blocks
        request.decisions.setdefault(name, []).append(Decision(request.step, *verdict))
        return answer

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler steps with, where the pipeline gives it `output`."""
        return output if request.outputs is None else request.outputs.output(output, sample)

    def _cache_context(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        @contextlib.contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            outer, self._context = self._context, name
            try:
                with original(name, *args, **kwargs):
                    yield
            finally:
                self._context = outer

        return cache_context


def _batch_of(*arguments: Any) -> int | None:
    """Of how many samples a transformer call is: its first argument is a tensor or a list of them."""
    return len(arguments[0]) if arguments and isinstance(arguments[0], (torch.Tensor, list, tuple)) else None


def _name(transformer: torch.nn.Module) -> str:
    return type(transformer).__name__


def _transformer_of(pipe: Any) -> torch.nn.Module:
    lacking = [name for name in ("transformer", "scheduler") if getattr(pipe, name, None) is None]
    if lacking:
        raise ValueError(
            f"{type(pipe).__name__} has no {' and no '.join(lacking)}: a cache is installed on a loaded diffusers "
            "pipeline with a diffusion transformer"
        )
    return pipe.transformer


def _refuse_cached(transformer: torch.nn.Module) -> None:
    """Raise for a transformer that somebody caches already, by name."""
    kind = _name(transformer)
    if any(isinstance(child, BlockList) for child in transformer.children()):
        raise PatchConflictError(f"this {kind} is cached already, through another pipeline that shares it")
    if getattr(transformer, "is_cache_enabled", False):
        raise PatchConflictError(f"diffusers' own cache is enabled on this {kind}: transformer.disable_cache() first")
    if LIBRARY_MARK in vars(transformer):
        raise PatchConflictError(
            f"this {kind} is cached already, by engine 'library' through another pipeline that shares it: "
            "omni_kernels.unpatch that one first"
        )
    if getattr(transformer, "_is_cached", False):
        raise PatchConflictError(
            f"the cache-dit library is enabled on this {kind}: cache_dit.disable_cache(pipe) first"
        )


def _refuse_compiled(transformer: torch.nn.Module) -> None:
    """Raise for a transformer of which no block can be passed over, by name."""
    compiled = getattr(transformer, "_compiled_call_impl", None)
    if compiled is not None or hasattr(transformer, "_orig_mod"):
        raise PatchConflictError(
            f"this {_name(transformer)} was compiled as a whole ({describe(compiled or transformer)}): which blocks "
            "run could no longer be decided at run time. Compile its blocks instead: "
            "transformer.compile_repeated_blocks()"
        )


def _refuse_parallel(transformer: torch.nn.Module, alone: str | None) -> None:
    """Raise for a transformer that several ranks run, by name, where `alone` says why they may not."""
    config = getattr(transformer, "_parallel_config", None)
    if alone is not None and config is not None:
        kind = "tensor" if config.context_parallel_config is None else "context"
        raise ValueError(
            f"this {_name(transformer)} runs under {kind} parallelism, {alone}; omni_kernels.unpatch(pipe) takes a "
            "cache out"
        )
