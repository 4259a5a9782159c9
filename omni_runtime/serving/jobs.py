"""A request that was given to an engine, and what can become of it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any

from omni_runtime.cache.report import CacheReport
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import OmniResult


class State(enum.Enum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class QueueFullError(RuntimeError):
    """The engine has as many waiting requests as it may have. Try again later."""


class CancelledError(RuntimeError):
    """The request was cancelled.

    Attributes:
        steps: the number of steps that it had made.
        report: what its cache had done; None if it had none, or had not begun.
    """

    def __init__(self, why: str, steps: int = 0, report: CacheReport | None = None) -> None:
        super().__init__(why)
        self.steps = steps
        self.report = report


class DeadlineError(CancelledError, TimeoutError):
    """The request was cancelled because its deadline had passed."""


class DeviceFailedError(RuntimeError):
    """The device, or the engine itself, can no longer be used by this process. Start it again."""


def device_failed(error: BaseException) -> bool:
    """Whether an error says that the device does not work, whatever is asked of it."""
    text = str(error)
    told = type(error).__name__ == "AcceleratorError" or any(f"{kind} error" in text for kind in ("CUDA", "HIP"))
    return isinstance(error, DeviceFailedError) or (told and "out of memory" not in text)


#: The engine whose request or driver works in this thread.
_HERE = threading.local()


@contextlib.contextmanager
def works_for(engine: Any) -> Iterator[None]:
    """Context manager: this thread is one of the engine's own, which it waits for."""
    _HERE.engine = engine
    try:
        yield
    finally:
        del _HERE.engine


def refuse_within(engine: Any, what: str) -> None:
    """Raise RuntimeError if this thread is the engine's own: it would wait for itself."""
    if getattr(_HERE, "engine", None) is engine:
        raise RuntimeError(f"a callback cannot {what}: the engine waits for the callback")


class Job:
    """A request that was given to an engine. `await` it, or call `result`.

    Attributes:
        request: the request.
        backend, config: the cache method and its complete configuration; None and {} without a cache.
        submitted: when it was given, by `time.monotonic`.
        started: when it began to run; None before.
        steps: the number of steps that it has made.
        forwards, samples: the number of forwards that were made for it, and of the samples in them, its own and those
            of other requests.
    """

    def __init__(
        self,
        request: GenerationRequest,
        backend: str | None,
        config: dict[str, Any],
        deadline: float | None,
        on_step: Callable[[Any], None] | None,
        engine: Any,
    ) -> None:
        self.request = request
        self.backend = backend
        self.config = config
        self.on_step = on_step
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.steps = self.forwards = self.samples = 0
        self._deadline = None if deadline is None else self.submitted + deadline
        self._allowed = deadline
        self._cancelled = False
        self._engine = engine
        #: How many requests that were given later have begun before it.
        self.passed = 0
        self._future: Future[OmniResult] = Future()

    def __repr__(self) -> str:
        return f"Job({self.request.prompt!r}, {self.state.value}, {self.steps} steps)"

    def __await__(self) -> Generator[Any, None, OmniResult]:
        return self._awaited().__await__()

    async def _awaited(self) -> OmniResult:
        future = asyncio.wrap_future(self._future)
        # If the task is cancelled, nobody asks for the exception, and asyncio would log it as lost.
        future.add_done_callback(lambda one: one.cancelled() or one.exception())
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self.cancel()
            raise

    @property
    def state(self) -> State:
        """Where the job is."""
        if not self._future.done():
            return State.QUEUED if self.started is None else State.RUNNING
        error = self._future.exception()
        if error is None:
            return State.DONE
        return State.CANCELLED if isinstance(error, CancelledError) else State.FAILED

    def done(self) -> bool:
        """Whether it is over, however it ended."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> OmniResult:
        """Wait for the result.

        Args:
            timeout: in seconds; None waits for as long as it takes.

        Raises:
            CancelledError: the job was cancelled (`DeadlineError`: by its deadline).
            TimeoutError: it is not over yet.
            RuntimeError: a callback of a request in the same engine waits for it.
            BaseException: what the pipeline has raised.
        """
        if not self._future.done():
            refuse_within(self._engine, "wait for a request of its own engine")
        try:
            return self._future.result(timeout)
        except TimeoutError as error:
            if self._future.done():
                raise
            raise TimeoutError(f"the request is not over after {timeout} s") from error

    def add_done_callback(self, function: Callable[[Job], Any]) -> None:
        """Call `function` with the job when it is over; at once if it is."""
        self._future.add_done_callback(lambda _: function(self))

    def cancel(self) -> bool:
        """Cancel the job: at once if it waits in the queue, else at its next transformer call.

        Returns:
            Whether it was not over yet.
        """
        if self._future.done():
            return False
        self._cancelled = True
        self._engine.cancelled(self)
        return True

    def expired(self) -> str | None:
        """Why the job must end now; None if it may go on."""
        if self._cancelled:
            return "the request was cancelled"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return f"the request was not finished within its deadline of {self._allowed:g} s"
        return None

    def succeed(self, result: OmniResult) -> None:
        """The job is over, with this result, if it is not over already."""
        if not self._future.done():
            self._future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """The job is over, with this error, if it is not over already."""
        if not self._future.done():
            self._future.set_exception(error)

    def error(self) -> BaseException | None:
        """What the job has ended with; None if it has succeeded, or is not over."""
        return self._future.exception() if self._future.done() else None

    def end(self, why: str, report: CacheReport | None = None) -> None:
        """The job is over, because it was cancelled."""
        kind = CancelledError if self._cancelled else DeadlineError
        self.fail(kind(why, self.steps, report))
