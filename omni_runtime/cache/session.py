"""A session: one cache method, installed on one pipeline.

`CacheSession` follows the pipeline's calls and their requests, whatever the method. What is done with a transformer
call is its site's business: `BlockSession` here has blocks passed over, `omni_runtime.cache.output.OutputSession`
answers whole steps, `omni_runtime.cache.library.LibrarySession` leaves it to the cache-dit library.

A transformer call goes this way:

    transformer(...)        nn.Module.__call__ → `_compiled_call_impl`, which a sampling has put there
    CacheSession._answer    is the call this sampling's, and part of a request?
    BlockSession.call       which branch? then the model's own forward, over the sampling's `BlockList`
    Passage                 decides, records, forecasts
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from omni_kernels.patching import Patch, PatchConflictError
from omni_kernels.patching.changes import InstanceMethod, describe
from omni_kernels.patching.running import around_calls
from omni_runtime.cache import calibration
from omni_runtime.cache.blocks import BlockCall, BlockList, ForwardCall
from omni_runtime.cache.forecasters import Forecaster, rounding_note
from omni_runtime.cache.gates import Gate, RehearsalGate, Verdict
from omni_runtime.cache.lifecycle import CURRENT, Branch, Request, Sampling, outside, turn
from omni_runtime.cache.models import ModelRow, block_lists, row_of
from omni_runtime.cache.passage import Parts, Passage
from omni_runtime.cache.ranks import Ranks, SplitCall, ranks_of
from omni_runtime.cache.replay import ReplayGate, Replays
from omni_runtime.cache.report import BranchReport, CacheReport, StepEvent
from omni_runtime.cache.signals import Nothing
from omni_runtime.cache.watch import Watch

#: Of a transformer's attributes, the one by which `omni_runtime.cache.library` says that it works on it.
LIBRARY_MARK = "_omni_kernels_library"
#: The arguments of a transformer call, by position and by name.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
#: Why a step whose gradient is asked for is computed: no cache has a derivative.
GRADIENT = "a gradient is asked for"


class CacheSession:
    """One cache method, installed on one pipeline; subclasses say what becomes of a transformer call.

    Args:
        name: the method's.
        pipe: a loaded diffusers pipeline with a transformer and a scheduler.

    Attributes:
        on_step: told of each closed step; None for nobody.
        blocks: how many blocks the transformer has, where a row tells.
        forecaster: what stands in for what is skipped; None where somebody else sees to it.
        notes: what the report of each request says of the session.
        rehearsing: whether steps are computed and skipped by turns, whatever the method says.

    Raises:
        ValueError, PatchConflictError: a pipeline that it cannot serve, by name.
    """

    #: Why several ranks may not run the transformer; None where they may.
    alone: str | None = None

    def __init__(self, name: str, pipe: Any) -> None:
        self.name = name
        self.on_step: Callable[[StepEvent], None] | None = None
        self.pipe = pipe
        self.transformer = _transformer_of(pipe)
        self.transformers: list[torch.nn.Module] = [self.transformer]
        self.blocks = 0
        self.rehearsing = False
        self.replays: Replays | None = None
        self.fitted_for: Mapping[str, Any] | None = None
        self.forecaster: Forecaster | None = None
        self.notes: list[str] = []
        self._requests: list[Request] = []
        self._sampling: Sampling | None = None
        self._watch: Watch | None = None

    def install(self, patch: Patch) -> None:
        """Follow the pipeline's calls.

        Raises:
            ValueError, PatchConflictError: the pipeline cannot be served as it is now.
        """
        forecaster, dtype = self.forecaster, getattr(self.transformer, "dtype", None)
        note = None if forecaster is None else rounding_note(forecaster.name, forecaster.order, dtype or torch.float32)
        if note is not None:
            self.notes.append(note)
            warnings.warn(note, stacklevel=5)
        around_calls(self.pipe, self.sampling, patch, outside)
        with turn(self._shared()), self._seams():  # what is in the way is told now
            pass
        self._watch = Watch(self.transformer, self.name)
        patch.add(self._watch)

    def close(self) -> None:
        """End what is under way; the rest of that call is not cached."""
        if self._sampling is not None:
            self._sampling.close()

    def _shared(self) -> list[Any]:
        """What other pipelines may work with, too."""
        return [*self.transformers, self.pipe.scheduler]

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Sampling]:
        """While open, what happens in this thread is one call of the pipeline.

        Raises:
            ValueError, PatchConflictError: the pipeline can no longer be served; nothing is left behind.
        """
        with turn(self._shared()), self._seams() as sampling:
            outer, self._sampling, former = self._sampling, sampling, CURRENT.set(sampling)
            if self._watch is not None:
                self._watch.restore()
            try:
                yield sampling
                sampling.say_if_nothing_was_cached()
            finally:
                sampling.end_request()
                self._sampling = outer
                if self._watch is not None and outer is None:
                    self._watch.listen()
                with contextlib.suppress(ValueError):  # a generator that is closed in another thread's context
                    CURRENT.reset(former)

    @contextlib.contextmanager
    def _seams(self) -> Iterator[Sampling]:
        """While open, the seams of a sampling are in place."""
        patch = Patch()
        sampling = Sampling(self.pipe, self, patch)
        seams = Patch()
        try:
            self.take(sampling, seams)
            sampling.follow()
            yield sampling
        finally:
            seams.release()
            patch.release()

    def take(self, sampling: Sampling, seams: Patch) -> None:
        """Take the seams of a sampling, recorded in `seams`.

        Raises:
            ValueError, PatchConflictError: the pipeline cannot be served as it is now.
        """
        for transformer in self.transformers:
            refuse_cached(transformer)
            self.take_calls(sampling, transformer, seams)

    def take_calls(self, sampling: Sampling, transformer: Any, seams: Patch) -> None:
        """Have the transformer's calls, and the names that its pipeline gives them, come to this session."""
        call = transformer._compiled_call_impl or transformer._call_impl
        answer = functools.partial(self._answer, sampling, transformer, call)
        seams.set_method(transformer, "_compiled_call_impl", answer)
        if hasattr(transformer, "cache_context"):
            seams.set_method(transformer, "cache_context", _context_of(sampling, transformer.cache_context))

    def _answer(self, sampling: Sampling, transformer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of the transformer; `call` makes it."""
        if CURRENT.get() is not sampling:
            return self.call_of_another(call, args, kwargs)
        try:
            request = sampling.current()
            if request is None:
                return self.call_of_another(call, args, kwargs)
            return self.call(sampling, request, transformer, call, args, kwargs)
        except BaseException:
            sampling.end_request()
            raise

    def call(
        self, sampling: Sampling, request: Request, transformer: Any, call: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """What a transformer call of a request returns; `call` makes it."""
        raise NotImplementedError

    def call_of_another(self, call: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """A transformer call that is not of this sampling, or of none of its requests."""
        return call(*args, **kwargs)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """While open, one step is computed and two are skipped, by turns; nothing is told or learnt of them."""
        before = self._requests
        self.rehearsing = True
        try:
            yield
        finally:
            self.rehearsing = False
            self._requests = before

    @property
    def report(self) -> CacheReport | None:
        """What the last request did; None before the first."""
        return self._report(self._requests[-1]) if self._requests else None

    @property
    def reports(self) -> list[CacheReport]:
        """What each request of the last call did: a pipeline may make a video in several segments."""
        return [self._report(request) for request in self._requests]

    def _report(self, request: Request) -> CacheReport:
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
        request = None if self._sampling is None else self._sampling.request
        return [] if request is None else request.tensors()

    def gate_for(self, gate: Callable[[], Gate], measures: bool, request: Request, branch: str) -> Gate:
        """A fresh gate: the method's, in a rehearsal another, and following an earlier request where that is asked."""
        if self.rehearsing:
            return RehearsalGate(measures)
        return gate() if self.replays is None else self.replays.gate(gate(), request, branch)

    def opened(self, request: Request) -> None:
        """See `omni_runtime.cache.lifecycle.Listener`."""
        sampling = self._sampling
        self._requests = [request] if sampling is None else sampling.requests
        request.notes += self.notes

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `omni_runtime.cache.lifecycle.Listener`."""
        return output

    def repeated(self, request: Request) -> None:
        """See `omni_runtime.cache.lifecycle.Listener`."""

    def stepped(self, request: Request) -> None:
        """See `omni_runtime.cache.lifecycle.Listener`."""
        if request.step == 1 and not request.branches:
            warnings.warn(
                f"a step ran without the patched {_name(self.transformer)}, so nothing is cached: was the transformer "
                "replaced or compiled after patching?",
                stacklevel=5,
            )
        if self.rehearsing:
            return
        if request.step == 1 and self.fitted_for is not None:
            self._compare(self.fitted_for, request)
        if self.on_step is None:
            return
        step = request.step - 1
        made = {name: d[-1] for name, d in request.decisions.items() if d[-1].step == step}
        with outside():
            self.on_step(StepEvent(step, request.steps, any(d.computed for d in made.values()), made))

    def completed(self, request: Request) -> None:
        """See `omni_runtime.cache.lifecycle.Listener`; what was replayed is looked at, and its schedules are kept."""
        if self.replays is None:
            return
        request.drift = self.replays.complete(
            [(gate, lists) for gate, lists in self.gates_of(request) if isinstance(gate, ReplayGate)]
        )
        if request.drift is not None:
            request.notes.append(self.replays.note(request.drift))

    def gates_of(self, request: Request) -> Sequence[tuple[Gate, list[Any]]]:
        """The gates that have decided, each with the lists of its decisions."""
        return []

    def describe(self, request: Request) -> dict[str, Any]:
        """What fitted numbers hang on, of a request whose first step has closed."""
        return calibration.describe(
            self.transformer, self.blocks, self.pipe.scheduler, request.steps, request.latents
        )  # fmt: skip

    def describe_last(self) -> dict[str, Any]:
        """What the last request was, as `calibration.describe` has it.

        Raises:
            RuntimeError: there was none, or it took no step.
        """
        if not self._requests or not self._requests[-1].step:
            raise RuntimeError("nothing was recorded: the pipeline has taken no step")
        return self.describe(self._requests[-1])

    def _compare(self, fitted_for: Mapping[str, Any], request: Request) -> None:
        """Warn of a request that is unlike those that the method's numbers were fitted to."""
        differences = calibration.differences(fitted_for, self.describe(request))
        if differences:
            note = f"{self.name} was calibrated for other runs: this one has {', '.join(differences)}"
            request.notes.append(note)
            warnings.warn(note, stacklevel=6)


class BlockSession(CacheSession):
    """A method that passes blocks over.

    Args:
        parts: its choices for the transformer's blocks, from the model's row and the number of blocks.
    """

    passage_class: type[Passage] = Passage

    def __init__(self, name: str, pipe: Any, parts: Callable[[ModelRow, int], Parts]) -> None:
        super().__init__(name, pipe)
        self._check()
        self.row = row_of(_name(self.transformer))
        lists = zip(self.row.lists, block_lists(self.transformer, self.row), strict=True)
        self._flat = [(row, block) for row, blocks in lists for block in blocks]
        self.blocks = len(self._flat)
        self.ranks: Ranks | None = None
        self.calls: list[BlockCall] = []
        self._forward = ForwardCall(self.row, self.transformer.forward)
        self.parts = parts(self.row, self.blocks)
        self.fitted_for = self.parts.fitted_for
        self.forecaster = self.parts.forecaster
        self.notes += [] if self.parts.note is None else [self.parts.note]
        if self.parts.drift_tolerance is not None:
            self.replays = Replays(self.parts.drift_tolerance)

    def take(self, sampling: Sampling, seams: Patch) -> None:
        """See `CacheSession.take`."""
        self._check()
        super().take(sampling, seams)
        start = 0
        for row, blocks in zip(self.row.lists, block_lists(self.transformer, self.row), strict=True):
            seams.set_module(self.transformer, row.name, BlockList(blocks, start, sampling))
            start += len(blocks)
        if start != self.blocks:
            raise ValueError(
                f"this {_name(self.transformer)} has {start} blocks, and had {self.blocks} when it was patched: "
                "omni_kernels.unpatch(pipe), and patch it again"
            )

    def opened(self, request: Request) -> None:
        """See `CacheSession.opened`; who runs the transformer, and what is split where, may have changed."""
        refuse_parallel(self.transformer, self.alone)
        self.ranks = ranks_of(self.transformer)
        if self.ranks is not None and any(block._compiled_call_impl is not None for _, block in self._flat):
            raise ValueError(
                f"the blocks of this {_name(self.transformer)} are compiled, and it is run by several ranks: a cache "
                "of blocks does not go with both yet"
            )
        kind = BlockCall if self.ranks is None else SplitCall
        if not self.calls or type(self.calls[0]) is not kind:
            self.calls = [kind(row, block) for row, block in self._flat]
        super().opened(request)

    def call(
        self, sampling: Sampling, request: Request, transformer: Any, call: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """See `CacheSession.call`."""
        branch = request.branch(sampling.context)
        if differentiates(transformer, args, kwargs):
            output, ran = call(*args, **kwargs), self.blocks
            branch.kept = None
            branch.decide(Verdict(True, GRADIENT))
        else:
            passage: Passage = branch.kept
            if passage is None:
                passage = branch.kept = self.passage_class(self, request, branch)
            forward = self._forward
            passage.begin(request, forward.arguments(args, kwargs), forward.works_between(args, kwargs))
            sampling.passage = passage
            try:
                output = call(*args, **kwargs)
            finally:
                sampling.passage = None
            passage.finish()
            ran = passage.ran
        request.calls += 1
        request.blocks_run += ran
        request.blocks_total += self.blocks
        return output

    def gate(self, request: Request, branch: Branch) -> Gate:
        """A fresh gate for a branch."""
        parts = self.parts
        return self.gate_for(lambda: parts.gate(request), not isinstance(parts.signal, Nothing), request, branch.name)

    def gates_of(self, request: Request) -> Sequence[tuple[Gate, list[Any]]]:
        """See `CacheSession.gates_of`."""
        return [(branch.kept.gate, [branch.decisions]) for branch in request.branches.values() if branch.kept]

    def _check(self) -> None:
        """Raise for what a cache of blocks cannot live with, by name."""
        refuse_compiled(self.transformer)
        refuse_parallel(self.transformer, self.alone)


def differentiates(transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a gradient is asked for in this call of the transformer."""
    if not torch.is_grad_enabled():
        return False
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return any(tensor.requires_grad for tensor in (*given, *transformer.parameters()))


def _context_of(sampling: Sampling, original: Callable[..., Any]) -> Callable[..., Any]:
    """A transformer's `cache_context`, which tells the sampling the name, too."""

    @functools.wraps(original)
    @contextlib.contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        if CURRENT.get() is not sampling:
            with original(name, *args, **kwargs):
                yield
            return
        outer, sampling.context = sampling.context, name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            sampling.context = outer

    return cache_context


def _name(transformer: torch.nn.Module) -> str:
    return type(transformer).__name__


def _transformer_of(pipe: Any) -> torch.nn.Module:
    lacking = [name for name in ("transformer", "scheduler") if getattr(pipe, name, None) is None]
    if lacking:
        raise ValueError(
            f"{type(pipe).__name__} has no {' and no '.join(lacking)}: a cache is installed on a loaded diffusers "
            "pipeline with a diffusion transformer"
        )
    found: torch.nn.Module = pipe.transformer
    return found


def refuse_cached(transformer: torch.nn.Module) -> None:
    """Raise for a transformer that somebody caches already, by name."""
    kind = _name(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        raise PatchConflictError(f"diffusers' own cache is enabled on this {kind}: transformer.disable_cache() first")
    if LIBRARY_MARK in vars(transformer):
        raise PatchConflictError(
            f"engine 'library' works on this {kind} in a call of another pipeline that is under way: this one cannot "
            "begin within it"
        )
    if getattr(transformer, "_is_cached", False):
        raise PatchConflictError(
            f"the cache-dit library is enabled on this {kind}: cache_dit.disable_cache(pipe) first"
        )


def refuse_compiled(transformer: torch.nn.Module) -> None:
    """Raise for a transformer of which no block can be passed over, by name."""
    compiled = getattr(transformer, "_compiled_call_impl", None)
    ours = isinstance(compiled, InstanceMethod)  # another sampling's, which this one begins within
    if (compiled is not None and not ours) or hasattr(transformer, "_orig_mod"):
        raise PatchConflictError(
            f"this {_name(transformer)} was compiled as a whole ({describe(compiled or transformer)}): which blocks "
            "run could no longer be decided at run time. Compile its blocks instead: "
            "transformer.compile_repeated_blocks()"
        )


def refuse_parallel(transformer: torch.nn.Module, alone: str | None) -> None:
    """Raise for a transformer that several ranks run, by name, where `alone` says why they may not."""
    config = getattr(transformer, "_parallel_config", None)
    if alone is not None and config is not None:
        kind = "tensor" if config.context_parallel_config is None else "context"
        raise ValueError(
            f"this {_name(transformer)} runs under {kind} parallelism, {alone}; omni_kernels.unpatch(pipe) takes a "
            "cache out"
        )
