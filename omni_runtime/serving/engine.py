"""An engine: many requests in flight on one loaded pipeline, which share forwards of its transformer.

    with Omni("Qwen/Qwen-Image", cache_backend="velocity_cache").engine() as engine:
        jobs = [engine.submit(prompt, seed=1) for prompt in prompts]
        pictures = [job.result().images[0] for job in jobs]

Each request runs the pipeline's own `__call__`, in a thread of its own, on a shallow copy of the pipeline with its own
scheduler. At a transformer call it stops and waits. When all requests wait, the engine makes one forward for all calls
that fit together, and lets these requests go on, one after the other. So requests at different steps share forwards
(continuous batching), and only one thread works at any time.

Each request has its own cache, which decides as it would if the request ran alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from omni_kernels.device import PeakMemory
from omni_kernels.patching import backends, handle_of
from omni_runtime.cache.contract import tensors_of
from omni_runtime.cache.library import LibrarySession
from omni_runtime.cache.lifecycle import Branch, Request, Sampling, turn
from omni_runtime.cache.methods.method import Method
from omni_runtime.cache.report import StepEvent
from omni_runtime.cache.session import NAMES, BlockSession, CacheSession
from omni_runtime.cache.stack import Stack
from omni_runtime.cache.watch import unwatched
from omni_runtime.generation.clock import LoopClock
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import OmniResult, not_a_number
from omni_runtime.generation.seeding import RandomState
from omni_runtime.serving.forwards import Call, Forwards
from omni_runtime.serving.front import copy_for_request
from omni_runtime.serving.jobs import (
    DeviceFailedError,
    Job,
    QueueFullError,
    State,
    device_failed,
    refuse_within,
    works_for,
)

#: So many configured cache methods are kept.
METHODS = 32
#: Of so many kinds of requests, it is known what memory they need.
KINDS = 256
#: So many smaller requests may begin before one that has no room yet.
PASSES = 16
#: Seconds that a request has to end when the engine gives up.
PATIENCE = 10.0
#: So many requests in a row must end with an error of the device until it is taken to be dead.
DEVICE_ERRORS = 3


class _Stop(BaseException):
    """Ends a request in the middle. Not an Exception, so that no pipeline or callback takes it for an error."""


class _Live:
    """A job that runs: its thread, its pipeline, its cache.

    Attributes:
        call: the transformer call that it waits for; None if it is not at one.
        over: whether it has ended.
        random: the state of torch's global random numbers, of which each request has its own.
        held: the most bytes that it was seen to hold.
    """

    def __init__(self, job: Job, random: RandomState) -> None:
        self.job = job
        self.call: Call | None = None
        self.over = False
        self.random = random
        self.held = 0
        self.session: CacheSession | None = None
        self.go = threading.Semaphore(0)


class Engine:
    """Runs many requests on one loaded pipeline; see the module's docstring.

    Args:
        omni: the `Omni` of the model, and the cache that requests have by default.
        max_batch: the most samples in one forward.
        in_flight: the most requests that run at once. Each holds its latents and what its cache keeps.
        waiting: the most requests that wait to be run; `submit` raises `QueueFullError` beyond that.
        memory: the most bytes that the latents, caches and reference pictures of all requests in flight may hold; None
            for no limit. What a request needs is known from an earlier one of the same size and cache, or is estimated
            from one of another size. A request of which this is not known, or that needs more, runs by itself. Smaller
            ones may begin before one that has no room yet, but at most `PASSES` of them.
        failed: called, in a thread of the engine, if it can do nothing more: with a `DeviceFailedError`.

    Attributes:
        forwards: how many forwards were made, of how many samples.
        failure: why it can do nothing more; None while it works.

    Raises:
        ValueError: a limit is below 1, or the model cannot be served by an engine.
    """

    # Any: `Omni` imports this module.
    def __init__(
        self,
        omni: Any,
        *,
        max_batch: int = 8,
        in_flight: int = 16,
        waiting: int = 256,
        memory: int | None = None,
        failed: Callable[[DeviceFailedError], None] | None = None,
    ) -> None:
        limits = {"max_batch": max_batch, "in_flight": in_flight, "waiting": waiting, "memory": memory}
        for name, value in limits.items():
            if name == "memory" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
        self.omni = omni
        self.forwards = Forwards(max_batch)
        self._in_flight = in_flight
        self._waiting = waiting
        self._memory = memory
        self._needs: dict[_Kind, int] = {}  # the most bytes that a request of this kind has held
        self._failed = failed
        self.failure: DeviceFailedError | None = None
        self._device_errors = 0  # in a row
        self._pipe = omni.pipe
        _refuse(self._pipe)
        self._names = _transformers_of(self._pipe)
        self._sessions: OrderedDict[Any, CacheSession] = OrderedDict()
        self._queue: deque[Job] = deque()
        self._lives: list[_Live] = []
        self._parked = threading.Semaphore(0)
        self._changed = threading.Condition()
        self._closing = self._closed = False
        self._driver = threading.Thread(target=self._drive, name="omni-engine", daemon=True)
        self._driver.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(cancel=error[0] is not None)

    def submit(
        self,
        prompt: str | None = None,
        *,
        cache_backend: str | None = "",
        cache_config: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        **arguments: Any,
    ) -> Job:
        """Give the engine a request. It is checked at once.

        Args:
            prompt: one prompt; None if embeddings are given.
            cache_backend, cache_config: the request's cache; by default that of the `Omni`. None is no cache.
            deadline: the most seconds from now until the request is over.
            on_step: called with a `StepEvent` after each step, in the thread of the request. All requests wait for it.
            arguments: those of `Omni.generate`.

        Raises:
            ValueError, TypeError: as from `Omni.generate`; or the cache cannot be used in an engine.
            QueueFullError: too many requests wait already.
            DeviceFailedError: the device, or the engine, can do nothing more.
            RuntimeError: the engine is closed.
        """
        if not (prompt is None or isinstance(prompt, str)):
            raise TypeError(f"an engine takes one prompt at a time, not {type(prompt).__name__}: submit each")
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline must be above 0 seconds, not {deadline!r}")
        backend, config = self.omni.cache_backend, self.omni.cache_config
        if cache_backend != "" or cache_config is not None:
            backend, config = self.omni.resolved(backend if cache_backend == "" else cache_backend, cache_config)
        (one,) = self.omni.prepare_for(backend, config, prompt, **arguments)
        return self.take(one, backend, config, deadline=deadline, on_step=on_step)

    def take(
        self,
        request: Any,
        backend: str | None,
        config: dict[str, Any],
        *,
        deadline: float | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
    ) -> Job:
        """Give the engine a request that `Omni.prepare` has checked; see `submit`."""
        if backend is not None:
            self._session(backend, config)
        job = Job(request, backend, config, deadline, on_step, self)
        with self._changed:
            if self.failure is not None:
                raise DeviceFailedError(str(self.failure)) from self.failure
            if self._closing:
                raise RuntimeError("this engine is closed")
            if len(self._queue) >= self._waiting:
                raise QueueFullError(f"{len(self._queue)} requests wait already: try again later")
            self._queue.append(job)
            self._changed.notify()
        return job

    def check_cache(self, backend: str, config: dict[str, Any]) -> None:
        """Check that requests can have this cache; `config` is complete (`Omni.resolved`).

        Raises:
            ValueError, PatchConflictError: they cannot; the message says why.
        """
        self._session(backend, config)

    @property
    def queued(self) -> int:
        """The number of requests that wait to be run."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """The number of requests in flight."""
        return sum(not live.job.done() for live in list(self._lives))

    def held_bytes(self) -> int:
        """The bytes of the tensors that the caches of the requests in flight hold."""
        sessions = [live.session for live in list(self._lives)]
        return sum(tensor.nbytes for one in sessions if one is not None for tensor in one.held_tensors())

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, finish those that were given, and stop. A second call does nothing.

        Args:
            cancel: cancel the requests instead of finishing them.

        Raises:
            RuntimeError: a callback of one of its requests calls this.
        """
        refuse_within(self, "close its own engine")
        with self._changed:
            self._closing = True
            left = [*self._queue, *(live.job for live in self._lives)] if cancel else []
            self._changed.notify()
        for job in left:
            job.cancel()
        self._driver.join()
        self.omni.engine_closed()

    def cancelled(self, job: Job) -> None:
        """A job was cancelled: it ends now if it waits, else when the engine comes to it."""
        with self._changed:
            waits = job in self._queue
            if waits:
                self._queue.remove(job)
            self._changed.notify()
        if waits:
            job.end(job.expired() or "")

    # The driver: one thread, which lets one request work at a time

    def _drive(self) -> None:
        try:
            with works_for(self):
                self._work()
        except BaseException as error:  # a fault of the device or of the engine itself: nobody waits forever
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        why = error if isinstance(error, DeviceFailedError) else None
        if why is None:
            why = DeviceFailedError(f"the engine has stopped: {type(error).__name__}: {error}")
            why.__cause__ = error
        with self._changed:
            self.failure, self._closing = why, True
            left = [*self._queue, *(live.job for live in self._lives)]
            self._queue.clear()
        if self._failed is not None:
            self._failed(why)
        for job in left:
            job.cancel()
            job.fail(why)
        for live in self._lives:  # their threads end, one after the other, and free what they hold
            live.go.release()
            self._parked.acquire(timeout=PATIENCE)
        self._lives.clear()

    def _work(self) -> None:
        held = False
        with contextlib.ExitStack() as holds:
            while True:
                with self._changed:
                    while not self._queue and not self._lives and not self._closing:
                        holds.close()  # nothing is in flight: others may use the transformer
                        held = False
                        self._changed.wait()
                    if self._closing and not self._queue and not self._lives:
                        break
                if not held:
                    holds.enter_context(turn([*self._names, self._pipe.scheduler]))
                    holds.enter_context(unwatched(self._names))
                    held = True
                self._admit()
                self._advance()

    def _admit(self) -> None:
        self._drop_expired()
        while len(self._lives) < self._in_flight:
            job = self._next()
            if job is None:
                return
            why = job.expired()
            if why is not None:
                job.end(why)
                continue
            job.started = time.monotonic()
            live = _Live(job, RandomState.of_seed(_seed_of(job.request), self._pipe._execution_device))
            self._lives.append(live)
            threading.Thread(target=self._run, args=(live,), name="omni-request", daemon=True).start()
            self._resume(live)

    def _next(self) -> Job | None:
        """Take the first request that there is room for out of the queue; None if there is none."""
        with self._changed:
            for place, job in enumerate(self._queue):
                if self._has_room(job):
                    for other in itertools.islice(self._queue, place):
                        other.passed += 1
                    del self._queue[place]
                    return job
                if job.passed >= PASSES:
                    break
        return None

    def _drop_expired(self) -> None:
        """End the requests in the queue that were cancelled or are past their deadline: they take no one's place."""
        with self._changed:
            over = [job for job in self._queue if job.expired() is not None]
            for job in over:
                self._queue.remove(job)
        for job in over:
            job.end(job.expired() or "")

    def _has_room(self, job: Job) -> bool:
        """Whether the memory of the requests in flight allows another one; see the argument `memory`."""
        if self._memory is None or not self._lives or job.expired() is not None:
            return True
        total = self._need(_kind_of(job))
        for live in self._lives:
            need = self._need(_kind_of(live.job))
            if total is None or need is None:
                return False
            total += max(need, live.held)
        return total is not None and total <= self._memory

    def _need(self, kind: _Kind) -> int | None:
        """The most bytes that a request of this kind is expected to hold; None if nothing is known.

        What a request holds grows with its pixels, and no faster. So it needs no more than one with more pixels, and no
        more than one with fewer pixels, scaled up.
        """
        if kind in self._needs or kind.pixels is None:
            return self._needs.get(kind)
        alike = [(one.pixels, need) for one, need in self._needs.items() if one.cache == kind.cache and one.pixels]
        return min((math.ceil(need * max(1.0, kind.pixels / pixels)) for pixels, need in alike), default=None)

    def _measure(self) -> None:
        """Note what each request holds while it waits for a call."""
        for live in self._lives:
            if live.call is not None:
                given = tensors_of([live.call.args, live.call.kwargs])
                held = [] if live.session is None else live.session.held_tensors()
                tensors = sum(tensor.nbytes for tensor in (*given, *held))
                live.held = max(live.held, tensors + sum(map(_bytes_of, _pictures_of(live.job))))

    def _advance(self) -> None:
        """Make one forward, and let the requests that it was for go on."""
        for live in list(self._lives):
            if live.call is not None and live.job.expired() is not None:
                self._resume(live)  # it stops
        waiting = [live for live in self._lives if live.call is not None]
        if not waiting:
            return
        if self._memory is not None:
            self._measure()
        calls = {id(live.call): live for live in waiting}
        every = [live.call for live in waiting if live.call is not None]
        group = every[:1]
        try:
            group = self.forwards.group(every)
            self.forwards.run(group)
        except Exception as error:  # these requests end with it, and no others
            for call in group:
                call.error = call.error or error
        served = [calls[id(call)] for call in group]
        # Those that were served go to the end of the line, so that every form has its turn.
        self._lives = [live for live in self._lives if live not in served] + served
        for live in served:
            self._resume(live)

    def _resume(self, live: _Live) -> None:
        """Let a request work until it waits for a call, or is over."""
        with live.random.used():
            live.go.release()
            self._parked.acquire()
        if live.over:
            self._lives.remove(live)
            if live.held:
                kind = _kind_of(live.job)
                self._needs[kind] = max(live.held, self._needs.get(kind, 0))
                if len(self._needs) > KINDS:
                    del self._needs[next(iter(self._needs))]
            self._check_device(live.job)

    def _check_device(self, job: Job) -> None:
        """Raise DeviceFailedError if one request after the other ends with an error of the device."""
        error = job.error()
        if job.state is State.DONE:
            self._device_errors = 0
        elif error is not None and device_failed(error):
            self._device_errors += 1
            if self._device_errors >= DEVICE_ERRORS:
                raise DeviceFailedError(f"the device failed: {error}") from error

    # A request: its own thread, which works only while the driver waits for it

    def _run(self, live: _Live) -> None:
        live.go.acquire()
        job = live.job
        try:
            with works_for(self):
                self._end(live, job)
        finally:
            live.over, live.call, live.session = True, None, None
            self._parked.release()

    def _end(self, live: _Live, job: Job) -> None:
        try:
            job.succeed(self._generated(live))
        except _Stop as stop:
            job.end(str(stop), None if live.session is None else live.session.report)
        except BaseException as error:
            job.fail(error)

    def _generated(self, live: _Live) -> OmniResult:
        job = live.job
        sampling: list[Sampling] = []
        pipe = copy_for_request(
            self._pipe,
            self._names,
            lambda module, args, kwargs: self._answer(live, sampling, module, args, kwargs),
            lambda: sampling[0] if sampling else None,
        )
        device = pipe._execution_device
        memory = PeakMemory(device)

        def on_step(step: int, steps: int) -> None:
            job.steps = step + 1
            if job.backend is None and job.on_step is not None:
                job.on_step(StepEvent(step, steps, True, {}))

        clock = LoopClock(device, on_step)
        with contextlib.ExitStack() as stack:
            if job.backend is not None:
                session = live.session = self._session(job.backend, job.config).shared_by(pipe)
                session.on_step = job.on_step
                if isinstance(session, BlockSession):
                    session.forward = self._over_blocks(live)
                sampling.append(stack.enter_context(session.detached()))
            stack.enter_context(clock.following(pipe))
            stack.enter_context(not_a_number())
            output = pipe(**job.request.call())
        return self.omni.result_of(
            output, job.request, (job.backend, job.config), live.session, clock.timings(), memory.bytes()
        )

    def _answer(self, live: _Live, sampling: list[Sampling], module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Handle a transformer call of a request."""
        self._stop_if_expired(live)
        session = live.session
        request = sampling[0].current() if sampling else None
        if session is None or request is None:
            return self._handed_over(live, Call(module, args, kwargs)).result
        try:
            return session.call(
                sampling[0], request, module, lambda *a, **k: self._handed_over(live, Call(module, a, k)).result,
                args, kwargs,
            )  # fmt: skip
        except BaseException:
            sampling[0].end_request()
            raise

    def _over_blocks(self, live: _Live) -> Callable[..., Any]:
        def forward(
            stack: Stack, sampling: Sampling, request: Request, branch: Branch, call: Any, args: Any, kwargs: Any
        ) -> tuple[Any, int]:
            made = self._handed_over(live, Call(stack.transformer, args, kwargs, stack, request, branch))
            return made.result, made.ran

        return forward

    def _handed_over(self, live: _Live, call: Call) -> Call:
        """Wait until the call was made."""
        live.call = call
        self._parked.release()
        live.go.acquire()
        live.call = None
        live.job.forwards += 1
        live.job.samples += call.batch
        self._stop_if_expired(live)
        if call.error is not None:
            raise call.error
        return call

    def _stop_if_expired(self, live: _Live) -> None:
        why = live.job.expired()
        if why is not None:
            raise _Stop(why)

    def _session(self, backend: str, config: dict[str, Any]) -> CacheSession:
        """The method with this configuration; requests with the same one share what it finds out of the model.

        Raises:
            ValueError, PatchConflictError: it cannot be used; the message says why.
        """
        key = backend, repr(sorted(config.items()))
        with self._changed:
            session = self._sessions.get(key)
            if session is None:
                method = backends.get(backend)
                if not isinstance(method, Method):
                    raise ValueError(f"cache backend {backend!r} is not omni_runtime's own: an engine cannot run it")
                session = method.session(self._pipe, config)
                if isinstance(session, LibrarySession):
                    raise ValueError(f"{backend} with engine='library' cannot run in an engine: leave out the key")
                session.check()
                session.warn_of_rounding()
                self._sessions[key] = session
                while len(self._sessions) > METHODS:
                    self._sessions.popitem(last=False)
            self._sessions.move_to_end(key)
            return session


class _Kind(NamedTuple):
    """What the memory that a request needs depends on.

    Attributes:
        cache: its cache, and its configuration.
        sizes: its size, its number of images and frames, and the sizes of its reference pictures.
        pixels: of all images and frames; None if the pipeline decides, or if there are reference pictures.
    """

    cache: tuple[str | None, str]
    sizes: tuple[Any, ...]
    pixels: int | None


def _kind_of(job: Job) -> _Kind:
    asked, pictures = job.request.arguments, [picture.size for picture in _pictures_of(job)]
    numbers = [asked.get(name) or 1 for name in ("num_frames", "num_images_per_prompt", "num_videos_per_prompt")]
    height, width = asked.get("height"), asked.get("width")
    pixels = math.prod([height, width, *numbers]) if height and width and not pictures else None
    return _Kind((job.backend, repr(sorted(job.config.items()))), (height, width, *numbers, *pictures), pixels)


def _pictures_of(job: Job) -> list[Any]:
    """The PIL images among the arguments of a request."""
    from PIL import Image

    values = [one for value in job.request.arguments.values()
              for one in (value if isinstance(value, (list, tuple)) else [value])]  # fmt: skip
    return [one for one in values if isinstance(one, Image.Image)]


def _bytes_of(picture: Any) -> int:
    return int(picture.width * picture.height * (1 if len(picture.getbands()) == 1 else 4))  # as Pillow keeps it


def _seed_of(request: GenerationRequest) -> int:
    """The seed of the global random numbers; a request with a generator of its own has a new one each time."""
    return secrets.randbelow(2**32) if request.seed is None else request.seed


def _refuse(pipe: Any) -> None:
    """Raise ValueError if the requests of this pipeline cannot run at the same time."""
    from diffusers import DiffusionPipeline

    kind = type(pipe).__name__
    if hasattr(pipe, "_set_pag_attn_processor"):
        raise ValueError(
            f"{kind} changes its transformer while it runs, which other requests would see: it cannot be used in an "
            "engine"
        )
    if any(isinstance(part, DiffusionPipeline) for part in vars(pipe).values()):
        raise ValueError(f"{kind} runs other pipelines inside: it cannot be used in an engine")
    handle = handle_of(pipe)
    if handle is not None and handle.quantize is not None and any(handle.quantize.edge_steps):
        raise ValueError("requests of an engine share forwards at different steps: leave out edge_steps of quantize")


def _transformers_of(pipe: Any) -> dict[torch.nn.Module, str]:
    found = {getattr(pipe, name, None): name for name in reversed(NAMES)}
    return {one: name for one, name in found.items() if isinstance(one, torch.nn.Module)}
