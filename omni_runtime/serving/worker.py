"""A worker of a batch: a loaded model that makes rows, several at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from omni_runtime.generation import video
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.result import OmniResult, png
from omni_runtime.serving.jobs import CancelledError, DeviceFailedError, device_failed
from omni_runtime.serving.results import Made
from omni_runtime.serving.rows import Row

#: So many rows of a worker are prepared or encoded, besides those in flight.
AHEAD = 2


class Worker:
    """A loaded model that makes rows, several at once. `make` may be called from several threads.

    Args:
        omni: the model, which is loaded now.
        in_flight: how many rows run at once.
        begins: called with each row when it begins.
    """

    def __init__(self, omni: Omni, in_flight: int, begins: Callable[[Row], None] = lambda row: None) -> None:
        omni.pipe.set_progress_bar_config(disable=True)
        self._engine = omni.engine(in_flight=in_flight)
        self._begins = begins
        self._room = _Room()
        self._closed = False

    def close(self) -> None:
        """Cancel the rows in flight, and stop."""
        self._closed = True
        self._engine.close(cancel=True)

    def make(self, row: Row, alone: bool = False) -> Made:
        """Make a row.

        Args:
            row: the row.
            alone: make it while no other is in flight.

        Raises:
            DeviceFailedError: the device can no longer be used.
            CancelledError: the worker was closed.
        """
        made = self._made(row, alone)
        # A row for which the memory was too small beside others may fit alone.
        return made if alone or made.about.get("error") != "OutOfMemoryError" else self._made(row, alone=True)

    def _made(self, row: Row, alone: bool) -> Made:
        with self._room.entered(alone):
            start = time.perf_counter()
            if self._closed:
                raise CancelledError("the worker was closed")
            self._begins(row)
            try:
                result = self._engine.submit(**row.arguments).result()
                suffix, contents = encoded(result, row.fps)
            except (CancelledError, DeviceFailedError):
                raise
            except Exception as error:
                if device_failed(error):
                    raise DeviceFailedError(f"the device failed: {error}") from error
                if str(error).startswith("this engine is closed"):
                    raise DeviceFailedError(str(error)) from error
                told = {"error": type(error).__name__, "message": str(error) or type(error).__name__}
                return Made(row.id, time.perf_counter() - start, told)
            return Made(row.id, time.perf_counter() - start, about(result), suffix, contents)


class _Room:
    """Lets many rows in together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = threading.Lock()

    @contextlib.contextmanager
    def entered(self, alone: bool) -> Iterator[None]:
        with self._alone if alone else contextlib.nullcontext():
            if not alone:
                with self._alone:  # one that is to be alone holds it, and waits for those inside
                    self._count(1)
            else:
                with self._changed:
                    self._changed.wait_for(lambda: not self._inside)
            try:
                yield
            finally:
                if not alone:
                    self._count(-1)

    def _count(self, change: int) -> None:
        with self._changed:
            self._inside += change
            self._changed.notify_all()


def encoded(result: OmniResult, fps: float | None) -> tuple[str, list[bytes]]:
    """The pictures or videos of a result as files with the settings inside, as `OmniResult.save` writes them.

    Returns:
        The ending of the files, and their contents.
    """
    if result.frames is None:
        return ".png", [png(image, result.settings) for image in result.images]
    suffix = next(ending for ending in video.SUFFIXES if video.encoder_missing(ending) is None)
    rate = fps or result.settings.get("frame_rate") or video.FPS
    return suffix, [video.encode(suffix, frames, result.settings, rate) for frames in result.frames]


def about(result: OmniResult) -> dict[str, Any]:
    """What is recorded of a result: the steps, and how many of them were computed and skipped."""
    steps, report = len(result.timings.steps), result.cache
    skipped = 0 if report is None else len(report.skipped)
    told: dict[str, Any] = {"steps": steps, "computed": steps - skipped, "skipped": skipped}
    if report is not None:
        told |= {"cache_backend": report.backend, "forwards": report.forwards, "saved": report.forwards_saved}
    return told
