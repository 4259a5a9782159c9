"""A session: one cache method, installed on one pipeline.

`CacheSession` follows the pipeline's calls and their requests. This part is the same for every method. Subclasses
handle the transformer calls, one subclass for each kind of site: `BlockSession` (here) skips blocks,
`omni_runtime.cache.output.OutputSession` skips whole steps, and `omni_runtime.cache.library.LibrarySession` leaves the
work to the cache-dit library.

The path of a transformer call:

    transformer(...)        nn.Module.__call__ → `_compiled_call_impl`, which the sampling has replaced
    CacheSession._answer    does the call belong to this sampling, and to a request?
    BlockSession.call       finds the branch, then runs the model's own forward over the sampling's `BlockList`
    Passage                 decides, records, forecasts
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from omni_kernels.patching import Patch, PatchConflictError
from omni_kernels.patching.changes import InstanceMethod, describe
from omni_kernels.patching.running import around_calls
from omni_runtime.cache import calibration
from omni_runtime.cache.blocks import BlockCall, BlockList, ForwardCall, FoundCall
from omni_runtime.cache.contract import Contract, Watcher, module_lists, tensors_of
from omni_runtime.cache.forecasters import Forecaster, rounding_note
from omni_runtime.cache.gates import Gate, RehearsalGate, Verdict
from omni_runtime.cache.lifecycle import CURRENT, Branch, Request, Sampling, outside, turn
from omni_runtime.cache.models import ListRow, ModelRow, block_lists, row_of
from omni_runtime.cache.passage import Parts, Passage, Stretch
from omni_runtime.cache.ranks import Ranks, SplitCall, ranks_of
from omni_runtime.cache.replay import ReplayGate, Replays
from omni_runtime.cache.report import BranchReport, CacheReport, StepEvent
from omni_runtime.cache.signals import Nothing
from omni_runtime.cache.watch import Watch

#: `omni_runtime.cache.library` sets this attribute on a transformer while it works on it.
LIBRARY_MARK = "_omni_kernels_library"
#: Stands for the number of blocks while it is not known.
MANY = 1_000_000
#: A skipped forward of the same input may differ from the computed one by this share, in fp32 and in other dtypes.
EXACT, ROUNDED = 1e-3, 0.05
#: The positional and keyword arguments of a transformer call.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
#: The reason in the report of a step that needs a gradient. It is always computed: a forecast has no derivative.
GRADIENT = "a gradient is asked for"


class CacheSession:
    """One cache method, installed on one pipeline. Subclasses handle the transformer calls.

    Args:
        name: the method's name.
        pipe: a loaded diffusers pipeline with a transformer and a scheduler.

    Attributes:
        on_step: called with a `StepEvent` after each closed step; None for no callback.
        blocks: the number of transformer blocks; 0 if unknown.
        forecaster: the method's forecaster; None if the session forecasts nothing itself.
        notes: notes of the session, copied into the report of each request.
        rehearsing: whether a rehearsal is under way, which ignores the method's decisions.

    Raises:
        ValueError, PatchConflictError: the pipeline is not supported; the message says why.
    """

    #: Why several ranks may not run the transformer; None if they may.
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
            ValueError, PatchConflictError: the pipeline is not supported in its present state.
        """
        forecaster, dtype = self.forecaster, getattr(self.transformer, "dtype", None)
        note = None if forecaster is None else rounding_note(forecaster.name, forecaster.order, dtype or torch.float32)
        if note is not None:
            self.notes.append(note)
            warnings.warn(note, stacklevel=5)
        around_calls(self.pipe, self.sampling, patch, outside)
        with turn(self._shared()), self._seams():  # a trial: raises now for what would fail in the first call
            pass
        self._watch = Watch(self.transformer, self.name)
        patch.add(self._watch)

    def close(self) -> None:
        """End the request under way; the rest of that pipeline call is not cached."""
        if self._sampling is not None:
            self._sampling.close()

    def _shared(self) -> list[Any]:
        """The objects that other pipelines may also use."""
        return [*self.transformers, self.pipe.scheduler]

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Sampling]:
        """While open, what happens in this thread counts as one call of the pipeline.

        Raises:
            ValueError, PatchConflictError: the pipeline is no longer supported; nothing is left changed.
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
        """Install the seams of a new sampling; remove them on exit."""
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
        """Install the seams of a sampling and record them in `seams`.

        Raises:
            ValueError, PatchConflictError: the pipeline is not supported in its present state.
        """
        for transformer in self.transformers:
            refuse_cached(transformer)
            self.take_calls(sampling, transformer, seams)

    def take_calls(self, sampling: Sampling, transformer: Any, seams: Patch) -> None:
        """Route the transformer's calls, and their cache-context names, to this session."""
        call = transformer._compiled_call_impl or transformer._call_impl
        answer = functools.partial(self._answer, sampling, transformer, call)
        seams.set_method(transformer, "_compiled_call_impl", answer)
        if hasattr(transformer, "cache_context"):
            seams.set_method(transformer, "cache_context", _context_of(sampling, transformer.cache_context))

    def _answer(self, sampling: Sampling, transformer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Handle a call of the transformer; `call` is the original.

        Calls outside this sampling, or outside its requests, go to `call_of_another`.
        """
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
        """Return the result of a transformer call that belongs to a request; `call` is the original."""
        raise NotImplementedError

    def call_of_another(self, call: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Handle a transformer call that belongs to another sampling, or to no request of this one."""
        return call(*args, **kwargs)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """While open, every third step is computed and the others are skipped.

        `on_step` is not called, and neither reports nor replayed schedules are kept of these steps.
        """
        before = self._requests
        self.rehearsing = True
        try:
            yield
        finally:
            self.rehearsing = False
            self._requests = before

    @property
    def report(self) -> CacheReport | None:
        """The report of the last request; None before the first."""
        return self._report(self._requests[-1]) if self._requests else None

    @property
    def reports(self) -> list[CacheReport]:
        """The reports of the last call's requests. A pipeline that makes a video in segments has several."""
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
        """All tensors held by the request under way; empty between requests."""
        request = None if self._sampling is None else self._sampling.request
        return [] if request is None else request.tensors()

    def gate_for(self, gate: Callable[[], Gate], measures: bool, request: Request, branch: str) -> Gate:
        """A fresh gate.

        In a rehearsal it is a `RehearsalGate`. Otherwise it is the method's gate, wrapped in a `ReplayGate` if the
        session replays schedules of earlier requests.
        """
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
        """See `omni_runtime.cache.lifecycle.Listener`. Measures the replay drift and updates the kept schedules."""
        if self.replays is None:
            return
        request.drift = self.replays.complete(
            [(gate, lists) for gate, lists in self.gates_of(request) if isinstance(gate, ReplayGate)]
        )
        if request.drift is not None:
            request.notes.append(self.replays.note(request.drift))

    def gates_of(self, request: Request) -> Sequence[tuple[Gate, list[Any]]]:
        """The gates used in the request, each with the lists of decisions it made."""
        return []

    def describe(self, request: Request) -> dict[str, Any]:
        """The properties of a request that fitted numbers depend on; its first step must have closed."""
        return calibration.describe(
            self.transformer, self.blocks, self.pipe.scheduler, request.steps, request.latents
        )  # fmt: skip

    def describe_last(self) -> dict[str, Any]:
        """The last request's description, from `calibration.describe`.

        Raises:
            RuntimeError: there was no request, or it took no step.
        """
        if not self._requests or not self._requests[-1].step:
            raise RuntimeError("nothing was recorded: the pipeline has taken no step")
        return self.describe(self._requests[-1])

    def _compare(self, fitted_for: Mapping[str, Any], request: Request) -> None:
        """Warn if the request differs from those that the method's numbers were fitted to."""
        differences = calibration.differences(fitted_for, self.describe(request))
        if differences:
            note = f"{self.name} was calibrated for other runs: this one has {', '.join(differences)}"
            request.notes.append(note)
            warnings.warn(note, stacklevel=6)


class BlockSession(CacheSession):
    """A session of a method that skips blocks.

    Args:
        parts: (model row, number of blocks) → the method's choices for the transformer's blocks.
    """

    passage_class: type[Passage] = Passage

    def __init__(self, name: str, pipe: Any, parts: Callable[[ModelRow, int], Parts]) -> None:
        super().__init__(name, pipe)
        self._check()
        self.row = row_of(_name(self.transformer))
        self.ranks: Ranks | None = None
        self.calls: list[BlockCall] = []
        self.contract: Contract | None = None
        self.stretches: list[Stretch] = []
        self._flat: list[tuple[ListRow, torch.nn.Module]] = []
        self._parts_of = functools.partial(parts, self.row)
        self._forward = ForwardCall(self.row, self.transformer.forward)
        if self.row.lists:
            lists = zip(self.row.lists, block_lists(self.transformer, self.row.lists), strict=True)
            self._flat = [(row, block) for row, blocks in lists for block in blocks]
            self.blocks = len(self._flat)
            self.parts = self._parts_of(self.blocks)
            self.stretches = [Stretch(0, self.blocks, False)]
        else:
            self.parts = self._parts_of(MANY)  # for what does not depend on their number
        self.fitted_for = self.parts.fitted_for
        self.forecaster = self.parts.forecaster
        self.notes += [] if self.parts.note is None else [self.parts.note]
        if self.parts.drift_tolerance is not None:
            self.replays = Replays(self.parts.drift_tolerance)

    def take(self, sampling: Sampling, seams: Patch) -> None:
        """See `CacheSession.take`."""
        self._check()
        super().take(sampling, seams)
        sampling.lists.clear()
        sampling.contract = self.contract
        if not self._flat:
            for number, (path, blocks) in enumerate(module_lists(self.transformer).items()):
                self._take_list(path, blocks, number, sampling, seams)
            return
        start = 0
        for row, blocks in zip(self._rows(), block_lists(self.transformer, self._rows()), strict=True):
            self._take_list(row.name, blocks, start, sampling, seams)
            start += len(blocks)
        if start != self.blocks:
            raise ValueError(
                f"this {_name(self.transformer)} has {start} blocks, and had {self.blocks} when it was patched: "
                "omni_kernels.unpatch(pipe), and patch it again"
            )

    def _rows(self) -> tuple[ListRow, ...]:
        return self.row.lists if self.contract is None else self.contract.lists

    def _take_list(self, path: str, blocks: torch.nn.ModuleList, start: int, sampling: Sampling, seams: Patch) -> None:
        parent, _, name = path.rpartition(".")
        sampling.lists[path] = BlockList(blocks, start, sampling)
        seams.set_module(self.transformer.get_submodule(parent), name, sampling.lists[path])

    def _find(self, sampling: Sampling, request: Request, branch: Branch, call: Any, args: Args, kwargs: Kwargs) -> Any:
        """Make a transformer call, and find in it how the transformer calls its blocks. Returns its output.

        Raises:
            ValueError: the blocks cannot be followed; the message says why.
        """
        watcher = Watcher(sampling.lists, self.parts.first, MANY - self.parts.last)
        for number, blocks in enumerate(sampling.lists.values()):
            blocks.begin_at(number)
        again = [copy.copy(one) if isinstance(one, (list, dict)) else one for one in args]
        again_by_name = {name: copy.copy(one) if isinstance(one, (list, dict)) else one for name, one in kwargs.items()}
        sampling.passage = watcher
        try:
            output = call(*args, **kwargs)
        finally:
            sampling.passage = None
        self._adopt(watcher)
        try:
            made = call, args, kwargs, output
            self._record_and_check(sampling, request, branch, watcher, made, (again, again_by_name))
        except BaseException:  # the next request finds them again, or is refused again
            self.contract, self._flat, self.calls, self.blocks = None, [], [], 0
            self.parts = self._parts_of(MANY)
            raise
        return output

    def _record_and_check(
        self, sampling: Sampling, request: Request, branch: Branch, watcher: Watcher, made: Any, again: Any
    ) -> None:
        """Record the forward in which the blocks were found, and repeat the call with the site skipped.

        Raises:
            ValueError: what is needed was not kept, or the output differs.
        """
        call, args, kwargs, output = made
        starts = self._align(sampling)
        passage = branch.kept = self.passage_class(self, request, branch)
        passage.begin(request, self._forward.arguments(args, kwargs), True)
        kept = {starts[path] + index: one for (path, index), one in watcher.kept.items() if path in starts}
        if not passage.record_all(kept):
            raise ValueError(
                f"{self.name} cannot follow the blocks of this {_name(self.transformer)}: what they take and return is "
                "changed in place, or the settings leave less than a list of blocks. velocity_cache works without them"
            )
        # The same call once more, with the site skipped: a forecast at the position of the only snapshot is exact.
        passage.begin(request, self._forward.arguments(args, kwargs), True)
        sampling.passage = passage
        try:
            with passage.skipping():
                skipped = call(*again[0], **again[1])
        finally:
            sampling.passage = None
        error = _difference(skipped, output)
        if not error <= (EXACT if all(one.dtype == torch.float32 for one in tensors_of(output)) else ROUNDED):
            raise ValueError(
                f"{self.name} cannot follow the blocks of this {_name(self.transformer)}: a skipped step of the same "
                f"input is off by {error:.2g} of its output. velocity_cache works without them"
            )

    def _align(self, sampling: Sampling) -> dict[str, int]:
        """Tell the lists of a sampling which blocks they begin with, by the contract; returns this by path."""
        starts = dict(zip([row.name for row in self._rows()], self._starts(), strict=True))
        for path, blocks in sampling.lists.items():
            blocks.begin_at(starts.get(path))
        sampling.contract = self.contract
        return starts

    def _adopt(self, watcher: Watcher) -> None:
        """Work on the blocks that were found.

        Raises:
            ValueError: they cannot be followed, or the method's settings do not suit them.
        """
        kind = _name(self.transformer)
        try:
            contract = watcher.contract()
        except ValueError as error:
            raise ValueError(
                f"{self.name} cannot follow the blocks of this {kind}: those {error}. velocity_cache works without them"
            ) from error
        parts = self._parts_of(contract.blocks)
        bounds = [0, *contract.ends()]
        if parts.first > bounds[1]:
            raise ValueError(
                f"{self.name} decides after {parts.first} blocks, but this {kind} joins its streams after {bounds[1]}"
            )
        ended = [contract.lists[place - 1].ends for place in itertools.accumulate(contract.stretches)]
        self.stretches = [
            Stretch(first, last, not end) for (first, last), end in zip(itertools.pairwise(bounds), ended, strict=True)
        ]
        self.contract, self.parts, self.blocks = contract, parts, contract.blocks
        lists = block_lists(self.transformer, contract.lists)
        self._flat = [
            (row, block)
            for row, blocks in zip(contract.lists, lists, strict=True)
            for block in blocks._modules.values()
        ]
        self._make_calls()

    def _starts(self) -> list[int]:
        """The index of the first block of each list."""
        counts = [] if self.contract is None else [count for _, count in self.contract.classes]
        return [0, *itertools.accumulate(counts[:-1])]

    def _make_calls(self) -> None:
        kind = (FoundCall if self.contract else BlockCall) if self.ranks is None else SplitCall
        if not self.calls or type(self.calls[0]) is not kind:
            self.calls = [kind(row, block) for row, block in self._flat]

    def opened(self, request: Request) -> None:
        """See `CacheSession.opened`. Checks the parallel setup again: it may have changed since the last request."""
        refuse_parallel(self.transformer, self.alone)
        self.ranks = ranks_of(self.transformer)
        if self.ranks is not None and any(block._compiled_call_impl is not None for _, block in self._flat):
            raise ValueError(
                f"the blocks of this {_name(self.transformer)} are compiled, and it is run by several ranks: a cache "
                "of blocks does not support both together yet"
            )
        self._make_calls()
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
        elif not self._flat:
            output, ran = self._find(sampling, request, branch, call, args, kwargs), self.blocks
        else:
            passage: Passage = branch.kept
            if passage is None:
                passage = branch.kept = self.passage_class(self, request, branch)
            if sampling.contract is not self.contract:
                self._align(sampling)
            forward = self._forward
            stepwise = self.contract is not None or forward.works_between(args, kwargs)
            passage.begin(request, forward.arguments(args, kwargs), stepwise)
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
        """Return a fresh gate for a branch."""
        parts = self.parts
        return self.gate_for(lambda: parts.gate(request), not isinstance(parts.signal, Nothing), request, branch.name)

    def gates_of(self, request: Request) -> Sequence[tuple[Gate, list[Any]]]:
        """See `CacheSession.gates_of`."""
        return [(branch.kept.gate, [branch.decisions]) for branch in request.branches.values() if branch.kept]

    def _check(self) -> None:
        """Raise an error if the transformer is compiled, or parallel in a way that this cache does not support."""
        refuse_compiled(self.transformer)
        refuse_parallel(self.transformer, self.alone)


def _difference(found: Any, expected: Any) -> float:
    """The largest relative difference of two outputs of a transformer, over their tensors; inf if they are unlike."""
    largest, pairs = 0.0, list(zip(tensors_of(found), tensors_of(expected), strict=False))
    for one, other in pairs:
        if one.shape != other.shape:
            return math.inf
        if not torch.equal(one.isnan(), other.isnan()):
            return math.inf
        one, other = one.float().nan_to_num(), other.float().nan_to_num()
        size = torch.linalg.vector_norm(other).item()
        off = torch.linalg.vector_norm(one - other).item()
        largest = max(largest, off / size if size else off)
    return largest if len(pairs) == len(tensors_of(expected)) == len(tensors_of(found)) else math.inf


def differentiates(transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this transformer call needs a gradient."""
    if not torch.is_grad_enabled():
        return False
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return any(tensor.requires_grad for tensor in (*given, *transformer.parameters()))


def _context_of(sampling: Sampling, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a transformer's `cache_context` to record the name in the sampling, too."""

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
    """Raise PatchConflictError, naming the other cache, if the transformer is already cached."""
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
    """Raise PatchConflictError if the transformer is compiled as a whole: none of its blocks can be skipped then."""
    compiled = getattr(transformer, "_compiled_call_impl", None)
    ours = isinstance(compiled, InstanceMethod)  # installed by an outer sampling, within which this one begins
    if (compiled is not None and not ours) or hasattr(transformer, "_orig_mod"):
        raise PatchConflictError(
            f"this {_name(transformer)} was compiled as a whole ({describe(compiled or transformer)}): which blocks "
            "run could no longer be decided at run time. Compile its blocks instead: "
            "transformer.compile_repeated_blocks()"
        )


def refuse_parallel(transformer: torch.nn.Module, alone: str | None) -> None:
    """Raise ValueError if several ranks run the transformer and `alone` gives a reason why they may not."""
    config = getattr(transformer, "_parallel_config", None)
    if alone is not None and config is not None:
        kind = "tensor" if config.context_parallel_config is None else "context"
        raise ValueError(
            f"this {_name(transformer)} runs under {kind} parallelism, {alone}; omni_kernels.unpatch(pipe) takes a "
            "cache out"
        )
