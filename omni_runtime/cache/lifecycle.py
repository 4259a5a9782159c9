"""Samplings and requests: when a cache is active, and for which calls.

A `Sampling` is one call of a patched pipeline, in one thread. A `Request` is one denoising loop in it. The scheduler's
`set_timesteps` opens a request, each `step` closes one of its steps, and it ends with its last step or with the
pipeline call. All cached state belongs to a request, so requests never see each other's state.

Pipelines may share transformers and schedulers (`from_pipe`). So these objects are changed only while a sampling runs,
and the changes affect only that sampling's calls: a `ContextVar` holds the sampling that a call belongs to. A second
sampling on the same transformer, in another thread, waits until the first one is over.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from omni_kernels.patching import Patch
from omni_runtime.cache.gates import Verdict
from omni_runtime.cache.report import Decision

#: The sampling that a call in this thread belongs to.
CURRENT: ContextVar[Sampling | None] = ContextVar("omni_runtime_sampling", default=None)

#: After this many transformer calls without a step of the scheduler, the pipeline must be using another scheduler.
MOST_CALLS = 16


class Held(Protocol):
    """State that is kept for a request, or for one of its branches."""

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held."""


class Branch:
    """One CFG branch of one request: its name, its decisions, and what a cache keeps for it.

    Attributes:
        called: the step of the branch's last transformer call; −1 before the first.
        kept: what the cache keeps for the branch; None before its first call, and after the request.
        former: what it kept for transformers that the pipeline has changed from.
    """

    __slots__ = ("called", "decisions", "former", "kept", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.decisions: list[Decision] = []
        self.called = -1
        self.kept: Any = None
        self.former: list[Any] = []

    def decide(self, verdict: Verdict) -> None:
        """Record the verdict for the current call."""
        self.decisions.append(Decision(self.called, *verdict))


class Request:
    """One denoising loop.

    Attributes:
        sigmas: the noise levels σ of the scheduler's steps if it has any, otherwise its timesteps.
        begin: the scheduler step at which the loop begins (image-to-image pipelines leave out the first ones).
        step: index of the current step, counted from 0 at `begin`.
        branches: the branches by name. A name is the pipeline's cache context, or else the position of the call
            within a step.
        calls: the number of transformer calls in the current step.
        opened: whether the first transformer call has begun, and the session's `opened` was called.
        outputs: the cache of whole steps, if there is one; freed together with what the branches keep.
        sample: the latents after the last step, with which the current step begins; None before the first step.
        by_token: whether the scheduler was given a noise level for each token, which it then steps by.
        images, latents: the number of images in the latents, and the shape of one image's latents; 0 and () until the
            first step closes.
        on_end: called once when the request ends, to free state that is kept elsewhere.
        notes: what the report says of the request besides its decisions.
        drift: how far a replayed schedule has drifted; None if none was replayed.
    """

    def __init__(self, sigmas: list[float], scheduled: int) -> None:
        self.sigmas = sigmas
        self.begin = 0
        self.step = 0
        self.branches: dict[str, Branch] = {}
        self.calls = 0
        self.step_seconds: list[float] = []
        self.blocks_run = 0
        self.blocks_total = 0
        self.complete = False
        self.opened = False
        self.ended = False
        self.outputs: Any = None
        self.sample: torch.Tensor | None = None
        self.by_token = False
        self.images = 0
        self.latents: tuple[int, ...] = ()
        self.on_end: Callable[[], None] | None = None
        self.notes: list[str] = []
        self.drift: float | None = None
        self._scheduled = scheduled
        self._announced: int | None = None
        self._clock = time.perf_counter()

    @property
    def steps(self) -> int:
        """The number of steps of the request."""
        left = self._scheduled - self.begin
        return left if self._announced is None else min(left, self._announced)

    @property
    def sigma(self) -> float:
        """The noise level of the current step."""
        return self.sigmas[self.begin + self.step]

    @property
    def decisions(self) -> dict[str, list[Decision]]:
        """The decisions by branch, for the branches that have made any."""
        return {name: branch.decisions for name, branch in self.branches.items() if branch.decisions}

    def starts(self, begin_index: int | None, announced: Any) -> None:
        """Determine the steps of the loop, at its first transformer call.

        Args:
            begin_index: the scheduler's begin index; None if the pipeline has set none.
            announced: the number of steps that the pipeline announces (`_num_timesteps`), if it does.
        """
        if type(announced) is int and 0 < announced <= self._scheduled:
            self._announced = announced
        if self.step == 0:  # later, the scheduler's own step count has already set `begin`
            left_out = 0 if self._announced is None else self._scheduled - self._announced
            self.begin = left_out if begin_index is None else begin_index

    def branch(self, context: str | None) -> Branch:
        """The branch of the current transformer call.

        Args:
            context: the pipeline's name for the branch; None if it gives none.
        """
        name = context or str(self.calls)
        branch = self.branches.get(name)
        if branch is not None and branch.called == self.step:  # a second call with the same name in this step
            name = f"{name}#{self.calls}"
            branch = self.branches.get(name)
        if branch is None:
            branch = self.branches[name] = Branch(name)
        branch.called = self.step
        return branch

    def beside(self) -> Request:
        """A request with the same steps, for a copy of the scheduler that is stepped beside it."""
        own = Request(self.sigmas, self._scheduled)
        own.begin, own._announced = self.begin, self._announced
        return own

    def close_step(self) -> None:
        """Go on to the next step; after the last one, the request is complete."""
        now = time.perf_counter()
        self.step_seconds.append(now - self._clock)
        self._clock = now
        self.step += 1
        self.calls = 0
        self.complete = self.step >= self.steps

    def begins_at(self, begin: int) -> None:
        """Correct `begin` from the scheduler's own step count, and drop everything cached so far."""
        self.begin = begin
        self.complete = self.step >= self.steps
        self._free()

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held for the request."""
        kept = [one for branch in self.branches.values() for one in (branch.kept, *branch.former)]
        holders: list[Held] = [one for one in (*kept, self.outputs) if one is not None]
        return [tensor for holder in holders for tensor in holder.tensors()]

    def end(self) -> None:
        """Free all cached state. The decisions stay readable."""
        self.ended = True
        self._free()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    def _free(self) -> None:
        self.outputs = self.sample = None
        for branch in self.branches.values():
            branch.kept = None
            branch.former.clear()


class _OfAnotherRun(int):
    """Marks a `_num_timesteps` that a pipeline has left over from an earlier call: it does not count for this one."""


class Listener(Protocol):
    """Callbacks for the requests of a sampling; see `omni_runtime.cache.session.CacheSession`."""

    name: str

    def opened(self, request: Request) -> None:
        """A request begins: called just before its first transformer call."""

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Return what the scheduler steps with, instead of the pipeline's `output`."""

    def stepped_beside(
        self, request: Request, own: Request, scheduler: Any, output: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """As `stepped_with`, for a copy of the scheduler, which the pipeline steps beside it.

        Args:
            request: the sampling's last request.
            own: counts the copy's steps, and may keep state for them.
            scheduler: the copy.
            output: what the pipeline steps it with.
            sample: its latents.
        """

    def repeated(self, request: Request) -> None:
        """The step that has just closed is taken again; raises ValueError if that is not supported."""

    def stepped_by_copies(self, request: Request) -> None:
        """A copy of the scheduler begins its second step; the scheduler has made none (SkyReels V2, frame by frame).

        Raises:
            ValueError: such a request is refused.
        """

    def stepped(self, request: Request) -> None:
        """A step has closed."""

    def completed(self, request: Request) -> None:
        """The last step has closed; the cached state is freed right afterwards."""


class Sampling:
    """One call of a patched pipeline, from its beginning to its end, in one thread.

    Args:
        pipe: the pipeline. The followed scheduler is always the one that the pipeline has at a transformer call.
        listener: called back for each request.
        patch: records the changes to the scheduler; undone when the call is over.

    Attributes:
        request: the request under way, if any.
        requests: all requests in which a transformer was called, in order.
        beside: what is kept of the steps of the scheduler's copies, for each copy and request.
        context: the name that the pipeline gives to the current transformer call with `cache_context`.
        announced: the index of the step that the pipeline gives with it; None if it gives none.
        passage: decides which blocks run in the current forward of the transformer; None between forwards.
        taken: what this sampling has put in the place of block lists, by transformer (`omni_runtime.cache.stack`).
    """

    def __init__(self, pipe: Any, listener: Listener, patch: Patch) -> None:
        self.listener = listener
        self.request: Request | None = None
        self.requests: list[Request] = []
        self.beside: list[Request] = []
        self.context: str | None = None
        self.announced: int | None = None
        self.passage: Any = None
        self.taken: dict[Any, Any] = {}
        self.scheduler: Any = None
        self._pipe = pipe
        self._patch = patch
        self._uncached = 0
        self._told = self._closed = False

    def follow(self) -> None:
        """Install the seam at the pipeline's scheduler."""
        before = vars(self._pipe).get("_num_timesteps")
        if isinstance(before, int):
            self._patch.set_attribute(self._pipe, "_num_timesteps", _OfAnotherRun(before))
        self._attach(self._pipe.scheduler)

    @contextlib.contextmanager
    def within(self, context: str, step: int | None) -> Iterator[None]:
        """While open, transformer calls have this name of a CFG branch, and this step if the pipeline gives one.

        diffusers' `cache_context` may give σ, too. It is not used: in diffusers 0.42, only Cosmos 3 gives it (as a
        pipeline and as a modular one), and reads it from the `sigmas` of its scheduler at this step, which `_open` has
        read. If another scheduler makes the steps, the given step shows it (`current`).
        """
        outer = self.context, self.announced
        self.context, self.announced = context, step
        try:
            yield
        finally:
            self.context, self.announced = outer

    def current(self) -> Request | None:
        """The request that a transformer call belongs to; None if it belongs to none."""
        if self._pipe.scheduler is not self.scheduler:
            self._change_scheduler()
        request = self.request
        if request is None and not self.requests:
            request = self._take_up()
        if request is None:
            self._uncached += 1
            return None
        if not request.opened:
            self._starts(request)
        elif request.calls >= MOST_CALLS:
            self._lost(request, f"has called its transformer {request.calls} times without a step of its scheduler")
            return None
        if self.announced is not None and self.announced != request.step:
            self._lost(request, f"is at step {self.announced}, and its scheduler has made {request.step}")
            return None
        return request

    def close(self) -> None:
        """End the request under way and open no more: the rest of the pipeline call is not cached."""
        self._closed = True
        self.end_request()

    def end_request(self) -> None:
        """End the request under way, if any."""
        if self.request is not None:
            self.request.end()
            self.request = None

    def say_if_nothing_was_cached(self) -> None:
        """Warn if the pipeline called its transformer, but no scheduler step was seen, so nothing could be cached."""
        called = self._uncached > 0 or len(self.requests) > 0
        if called and not self._told and not any(request.step for request in self.requests):
            note = (
                f"{type(self._pipe).__name__} called its transformer, but its own scheduler made no step, so "
                f"{self.listener.name} has cached nothing"
            )
            for request in self.requests:
                request.notes.append(note)
            warnings.warn(note, stacklevel=6)

    def _starts(self, request: Request) -> None:
        request.starts(getattr(self.scheduler, "begin_index", None), getattr(self._pipe, "_num_timesteps", None))
        request.opened = True
        if request not in self.requests:
            self.requests.append(request)
        self.listener.opened(request)

    def _lost(self, request: Request, why: str) -> None:
        note = (
            f"{type(self._pipe).__name__} {why}, so it steps another one, perhaps a copy: {self.listener.name} caches "
            "nothing from here on"
        )
        request.notes.append(note)
        self.end_request()
        self._told = True
        warnings.warn(note, stacklevel=6)

    def _change_scheduler(self) -> None:
        """The pipeline was given another scheduler: follow the new one instead of the old one."""
        self.end_request()
        self._patch.release()
        self._attach(self._pipe.scheduler)
        self._take_up()

    def _take_up(self) -> Request | None:
        """Open a request for timesteps that were set before the sampling began, if no step was taken yet."""
        scheduler = self.scheduler
        if getattr(scheduler, "num_inference_steps", None) is None or _index(scheduler) is not None:
            return None
        self._open()
        return self.request

    def _attach(self, scheduler: Any) -> None:
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        # Pipelines inspect the signature of set_timesteps: functools.wraps keeps it.
        @functools.wraps(set_timesteps)
        def wrapped_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            if CURRENT.get() is not self or self.scheduler is not scheduler:
                return set_timesteps(*args, **kwargs)
            self.end_request()
            result = set_timesteps(*args, **kwargs)
            self._open()
            return result

        @functools.wraps(step)
        def wrapped_step(*args: Any, **kwargs: Any) -> Any:
            request = self.request if CURRENT.get() is self and self.scheduler is scheduler else None
            if request is None:
                return step(*args, **kwargs)
            if _repeats(request, scheduler):
                self.listener.repeated(request)
                return step(*args, **kwargs)
            return self._step(request, step, args, kwargs)

        self._patch.set_method(scheduler, "set_timesteps", wrapped_set_timesteps)
        self._patch.set_method(scheduler, "step", wrapped_step, self._copied)
        self.scheduler = scheduler
        # Taken from the class: other code may have wrapped the instance's method without keeping its signature.
        self._signature = inspect.signature(type(scheduler).step)

    def _copied(self, scheduler: Any) -> Any:
        """Follow a copy of the scheduler, if a pipeline makes it for something else (LTX-2: the sound).

        Its noise levels are taken to be those of the original: the transformer is called for both at once.

        Returns:
            The method `step` of the copy.
        """
        step = scheduler.step
        if CURRENT.get() is not self:
            return step
        latest: Request | None = None
        own = Request([], 0)

        @functools.wraps(step)
        def wrapped_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal latest, own
            if CURRENT.get() is not self or not self.requests:
                return step(*args, **kwargs)
            if latest is not self.requests[-1]:
                latest = self.requests[-1]
                own = latest.beside()
                self.beside.append(own)
            if own.complete:
                return step(*args, **kwargs)
            if own.step == 1 and not latest.step and not latest.ended:
                self.listener.stepped_by_copies(latest)
            stepped_with = functools.partial(self.listener.stepped_beside, latest, own, scheduler)
            args, kwargs, _ = self._stepped(own, stepped_with, args, kwargs)
            result = step(*args, **kwargs)
            own.close_step()
            if own.complete:
                own.end()
            return result

        self._patch.set_method(scheduler, "step", wrapped_step)
        return vars(scheduler)["step"]

    def _open(self) -> None:
        if self._closed:
            return
        scheduler = self.scheduler
        # One transfer to the host per request, before the loop starts.
        levels = getattr(scheduler, "sigmas", None)
        levels = scheduler.timesteps if levels is None else levels
        self.request = Request([float(x) for x in levels.tolist()], len(scheduler.timesteps))

    def _step(self, request: Request, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take one step of the scheduler, and close the request's step."""
        scheduler = self.scheduler
        before = _index(scheduler)
        try:
            stepped_with = functools.partial(self.listener.stepped_with, request)
            args, kwargs, sample = self._stepped(request, stepped_with, args, kwargs)
            result = step(*args, **kwargs)
        except BaseException:
            self.end_request()
            raise
        if not request.step:
            request.images, *latents = getattr(sample, "shape", None) or (0,)
            request.latents = tuple(latents)
        request.sample = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        request.close_step()
        if request.step == 1:
            behind = _index(scheduler)  # some schedulers know their begin index only after the first step
            began = before if before is not None or behind is None else behind - 1
            if began is not None and began != request.begin:
                request.begins_at(began)
        if request.complete:
            try:
                if not request.ended:
                    self.listener.completed(request)
            finally:
                request.end()
                if self.request is request:
                    self.request = None
        self.listener.stepped(request)
        return result

    def _stepped(
        self,
        request: Request,
        stepped_with: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor | None]:
        """The arguments of a scheduler step with what `stepped_with` makes of the model output, and the latents."""
        given = self._given(args, kwargs)
        output, sample = given.arguments.get("model_output"), given.arguments.get("sample")
        request.by_token = given.arguments.get("per_token_timesteps") is not None
        if output is not None and sample is not None:
            instead = stepped_with(output, sample)
            if instead is not output:
                given.arguments["model_output"] = instead
                others = {name: value for name, value in kwargs.items() if name not in self._signature.parameters}
                args, kwargs = given.args[1:], given.kwargs | others
        return args, kwargs, sample

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """The arguments of a scheduler step by name. Those that the scheduler's class does not have are left out."""
        known = self._signature.parameters
        return self._signature.bind_partial(
            self.scheduler, *args, **{name: value for name, value in kwargs.items() if name in known}
        )


def _index(scheduler: Any) -> int | None:
    """The scheduler's own step index; None if it keeps none as a host integer."""
    index = getattr(scheduler, "_step_index", None)
    return index if isinstance(index, int) else None


def _repeats(request: Request, scheduler: Any) -> bool:
    """Whether a closed step is taken again. Cosmos 1.0 does this by setting the scheduler's step index back."""
    index = _index(scheduler)
    return index is not None and request.step > 0 and index - request.begin < request.step


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """While open, this thread is outside any sampling. Used for callbacks, which may run other pipelines."""
    former = CURRENT.set(None)
    try:
        yield
    finally:
        CURRENT.reset(former)


_turns: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_asking = threading.Lock()


@contextlib.contextmanager
def turn(shared: Sequence[Any]) -> Iterator[None]:
    """While open, samplings in other threads that use any of these transformers or schedulers wait.

    A callback must not wait for another thread that uses the same transformer: that would deadlock.
    """
    with _asking:
        locks = [_turns.setdefault(one, threading.RLock()) for one in sorted(shared, key=id)]
    with contextlib.ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield
