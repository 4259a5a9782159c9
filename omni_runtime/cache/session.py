"""A session: one cache method, installed on one pipeline.

`CacheSession` follows the pipeline's calls and their requests. This part is the same for every method. Subclasses
handle the transformer calls, one subclass for each kind of site: `BlockSession` (here) skips blocks,
`omni_runtime.cache.output.OutputSession` skips whole steps, and `omni_runtime.cache.library.LibrarySession` leaves the
work to the cache-dit library.

The path of a transformer call:

    transformer(...)        nn.Module.__call__ → `_compiled_call_impl`, which the sampling has replaced
    CacheSession._answer    does the call belong to this sampling, and to a request?
    BlockSession.call       finds the branch
    Stack.forward           runs the model's own forward over the sampling's `BlockList`
    Passage                 decides, records, forecasts
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from omni_kernels.patching import Patch
from omni_kernels.patching.running import around_calls
from omni_runtime.cache import calibration
from omni_runtime.cache.contract import Found
from omni_runtime.cache.forecasters import Forecaster, rounding_note
from omni_runtime.cache.gates import Gate, RehearsalGate, Verdict
from omni_runtime.cache.lifecycle import CURRENT, Branch, Request, Sampling, outside, turn
from omni_runtime.cache.models import ModelRow
from omni_runtime.cache.passage import Parts, Passage
from omni_runtime.cache.refusals import refuse_cached
from omni_runtime.cache.replay import ReplayGate, Replays
from omni_runtime.cache.report import BranchReport, CacheReport, Decision, StepEvent
from omni_runtime.cache.sharing import SHARING, Rows
from omni_runtime.cache.signals import Nothing
from omni_runtime.cache.stack import Stack
from omni_runtime.cache.watch import Watch

#: The names under which a pipeline may have transformers: one for the first steps and one for the last (Wan 2.2), or
#: one with the prompt and one without (Ideogram 4).
NAMES = ("transformer", "transformer_2", "unconditional_transformer")
#: The positional and keyword arguments of a transformer call.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
#: A request's decisions by branch, and how many blocks ran, of how many.
Decided = tuple[dict[str, list[Decision]], int, int]
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
        self.names: dict[torch.nn.Module, str] = _transformers_of(pipe)
        self.transformers: list[torch.nn.Module] = list(self.names)
        self.transformer = self.transformers[0]
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
        self.warn_of_rounding()
        around_calls(self.pipe, self.sampling, patch, outside)
        with turn(self._shared()), self._seams():  # a trial: raises now for what would fail in the first call
            pass
        self._watch = Watch(self.transformer, self.name)
        patch.add(self._watch)

    def warn_of_rounding(self) -> None:
        """Warn, and note for the reports, if the snapshots are rounded too coarsely for the forecasts."""
        forecaster, dtype = self.forecaster, getattr(self.transformer, "dtype", None)
        note = None if forecaster is None else rounding_note(forecaster.name, forecaster.order, dtype or torch.float32)
        if note is not None:
            self.notes.append(note)
            warnings.warn(note, stacklevel=6)

    def check(self) -> None:
        """Check the pipeline in its present state.

        Raises:
            ValueError, PatchConflictError: it is not supported; the message says why.
        """
        for transformer in self.transformers:
            refuse_cached(transformer)

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
            outer = self._sampling
            if self._watch is not None:
                self._watch.restore()
            try:
                with self._running(sampling):
                    yield sampling
            finally:
                if self._watch is not None and outer is None:
                    self._watch.listen()

    @contextlib.contextmanager
    def detached(self) -> Iterator[Sampling]:
        """As `sampling`, but nothing is installed on the transformers: the caller passes their calls on to `call`."""
        patch = Patch()
        sampling = Sampling(self.pipe, self, patch)
        try:
            sampling.follow()
            with self._running(sampling):
                yield sampling
        finally:
            patch.release()

    @contextlib.contextmanager
    def _running(self, sampling: Sampling) -> Iterator[None]:
        outer, self._sampling, former = self._sampling, sampling, CURRENT.set(sampling)
        try:
            yield
            sampling.say_if_nothing_was_cached()
        finally:
            sampling.end_request()
            self._sampling = outer
            with contextlib.suppress(ValueError):  # a generator that is closed in another thread's context
                CURRENT.reset(former)

    def shared_by(self, pipe: Any) -> CacheSession:
        """A session like this one for a copy of its pipeline. What is known of the transformers is shared."""
        one = copy.copy(self)
        one.pipe, one.on_step, one.notes = pipe, None, list(self.notes)
        one._requests, one._sampling, one._watch = [], None, None
        return one

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
        self.check()
        for transformer in self.transformers:
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

    def decided(self) -> list[Decided]:
        """What the last call's requests have decided on this rank, if other ranks have decided the rest."""
        return []

    def decided_elsewhere(self, requests: Sequence[Decided]) -> None:
        """Add to the reports what another rank has decided (its `decided`)."""

    def held_tensors(self) -> list[torch.Tensor]:
        """All tensors held by the request under way; empty between requests."""
        sampling = self._sampling
        requests = [] if sampling is None else [sampling.request, *sampling.beside]
        return [tensor for request in requests if request is not None for tensor in request.tensors()]

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
        self._report_on(request)
        request.notes += self.notes

    def _report_on(self, request: Request) -> None:
        """Have the reports be of this request, and of the sampling's earlier ones."""
        sampling = self._sampling
        if sampling is not None and request not in sampling.requests:
            sampling.requests.append(request)
        self._requests = [request] if sampling is None else sampling.requests

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `omni_runtime.cache.lifecycle.Listener`."""
        return output

    def stepped_beside(
        self, request: Request, own: Request, scheduler: Any, output: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """See `omni_runtime.cache.lifecycle.Listener`."""
        return output

    def repeated(self, request: Request) -> None:
        """See `omni_runtime.cache.lifecycle.Listener`."""

    def stepped_by_copies(self, request: Request) -> None:
        """See `omni_runtime.cache.lifecycle.Listener`. A copy has noise levels of its own, which are not known here."""
        self.close()
        raise ValueError(
            f"{self.name} cannot follow the steps of {type(self.pipe).__name__}: it takes them with copies of its "
            "scheduler, each maybe at another noise level (SkyReels V2: one for each frame). Run it without a cache"
        )

    def stepped(self, request: Request) -> None:
        """See `omni_runtime.cache.lifecycle.Listener`."""
        if request.step == 1 and not request.branches:
            note = (
                f"a step ran without the patched {_name(self.transformer)}, so nothing is cached: was the transformer "
                "replaced or compiled after patching?"
            )
            request.notes.append(note)
            self._report_on(request)
            warnings.warn(note, stacklevel=5)
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
        parts: (model row, number of blocks) → the method's choices for a transformer's blocks.
        passage: makes the passages of the branches.

    Attributes:
        forward: makes a transformer call over the blocks. An engine puts another function there.
    """

    def __init__(
        self,
        name: str,
        pipe: Any,
        parts: Callable[[ModelRow, int], Parts],
        passage: Callable[..., Passage] = Passage,
    ) -> None:
        super().__init__(name, pipe)
        self.forward: Callable[[Stack, Sampling, Request, Branch, Any, Args, Kwargs], tuple[Any, int]] = Stack.forward
        self.stacks = {
            transformer: Stack(name, transformer, parts, self._gate, passage, self.alone, attribute)
            for transformer, attribute in self.names.items()
        }
        chosen = self.stacks[self.transformer].parts
        self.blocks = self.stacks[self.transformer].blocks
        self.fitted_for = chosen.fitted_for
        self.forecaster = chosen.forecaster
        self.measures = not isinstance(chosen.signal, Nothing)
        self.notes += [] if chosen.note is None else [chosen.note]
        if chosen.drift_tolerance is not None:
            self.replays = Replays(chosen.drift_tolerance)

    @property
    def contract(self) -> Found | None:
        """How the transformers call their blocks; None before the first computed forward."""
        found = {name: self.stacks[one].contract for one, name in self.names.items()}
        known = {name: contract for name, contract in found.items() if contract is not None}
        return Found(known) if known else None

    def check(self) -> None:
        """See `CacheSession.check`."""
        for stack in self.stacks.values():
            stack.check()
        super().check()

    def take(self, sampling: Sampling, seams: Patch) -> None:
        """See `CacheSession.take`."""
        super().take(sampling, seams)
        for stack in self.stacks.values():
            stack.take(sampling, seams)

    def opened(self, request: Request) -> None:
        """See `CacheSession.opened`."""
        for stack in self.stacks.values():
            stack.opened()
        super().opened(request)

    def call(
        self, sampling: Sampling, request: Request, transformer: Any, call: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """See `CacheSession.call`."""
        sharing = SHARING.get()
        if sharing is None:
            return self._compute(sampling, request, transformer, call, args, kwargs)
        inner = sharing.inner(transformer)

        def compute(args: Args, kwargs: Kwargs, rows: Rows | None) -> Any:
            stack = self.stacks[transformer]
            stack.rows = rows
            try:
                return self._compute(sampling, request, transformer, inner, args, kwargs)
            finally:
                stack.rows = None

        def passed_over() -> None:
            request.branch(sampling.context)
            request.calls += 1

        return sharing.share(transformer, compute, args, kwargs, passed_over)

    def _compute(
        self, sampling: Sampling, request: Request, transformer: Any, call: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        branch, stack = request.branch(sampling.context), self.stacks[transformer]
        # `differentiates` asks this first, too: asking here saves a Python call in every forward.
        if torch.is_grad_enabled() and differentiates(transformer, args, kwargs):
            output, ran = call(*args, **kwargs), stack.blocks
            branch.kept = None
            branch.decide(Verdict(True, GRADIENT))
        else:
            output, ran = self.forward(stack, sampling, request, branch, call, args, kwargs)
        self.blocks = self.stacks[self.transformer].blocks
        request.calls += 1
        if stack.rows is None or stack.rows.rank == 0:  # the ranks that have the other samples count nothing
            request.blocks_run += ran
            request.blocks_total += stack.blocks
        return output

    def decided(self) -> list[Decided]:
        """See `CacheSession.decided`."""
        return [(request.decisions, request.blocks_run, request.blocks_total) for request in self._requests]

    def decided_elsewhere(self, requests: Sequence[Decided]) -> None:
        """See `CacheSession.decided_elsewhere`."""
        for request, (decisions, run, total) in zip(self._requests, requests, strict=False):
            request.blocks_run += run
            request.blocks_total += total
            for name, made in decisions.items():
                branch = request.branches.get(name)
                if branch is not None:
                    known = {decision.step for decision in branch.decisions}
                    branch.decisions += [one for one in made if one.step not in known]
                    branch.decisions.sort(key=lambda one: one.step)

    def _gate(self, request: Request, branch: str) -> Gate:
        return self.gate_for(lambda: self._parts().gate(request), self.measures, request, branch)

    def _parts(self) -> Parts:
        return self.stacks[self.transformer].parts

    def gates_of(self, request: Request) -> Sequence[tuple[Gate, list[Any]]]:
        """See `CacheSession.gates_of`."""
        return [
            (kept.gate, [branch.decisions])
            for branch in request.branches.values()
            for kept in (*branch.former, branch.kept)
            if kept is not None
        ]


def differentiates(transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this transformer call needs a gradient."""
    if not torch.is_grad_enabled():
        return False
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return any(tensor.requires_grad for tensor in (*given, *transformer.parameters()))


def _context_of(sampling: Sampling, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a transformer's `cache_context` to record the name, and the step if it is given, in the sampling, too."""

    @functools.wraps(original)
    @contextlib.contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        if CURRENT.get() is not sampling:
            with original(name, *args, **kwargs):
                yield
            return
        with sampling.within(name, kwargs.get("step_index")), original(name, *args, **kwargs):
            yield

    return cache_context


def _name(transformer: torch.nn.Module) -> str:
    return type(transformer).__name__


def _transformers_of(pipe: Any) -> dict[torch.nn.Module, str]:
    """A pipeline's transformers and their names: one at least. It may have the second alone (Wan 2.2).

    Raises:
        ValueError: it has none, or no scheduler.
    """
    kind = type(pipe).__name__
    given = {name: getattr(pipe, name, None) for name in NAMES}
    found = {
        one: name
        for name, one in given.items()
        if isinstance(one, torch.nn.Module) or (name == NAMES[0] and one is not None)
    }
    if not found and getattr(pipe, "unet", None) is not None:
        raise ValueError(
            f"{kind} denoises with a `unet` ({type(pipe.unet).__name__}): a cache needs a diffusion transformer, under "
            f"one of the names {', '.join(NAMES)}"
        )
    lacking = [] if found else ["transformer"]
    if getattr(pipe, "scheduler", None) is None:
        lacking.append("scheduler")
    if lacking:
        raise ValueError(
            f"{kind} has no {' and no '.join(lacking)}: a cache is installed on a loaded diffusers pipeline with a "
            "diffusion transformer, and follows the steps of its scheduler"
        )
    return found
