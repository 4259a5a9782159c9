"""Times a pipeline's denoising loop through its progress bar.

diffusers pipelines open `self.progress_bar(...)` right before the loop and update it after each step. So timing needs
no hook on the model and no synchronisation: on an accelerator the marks are device events, read after the request.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from omni_kernels.device import Timer
from omni_kernels.patching import Patch
from omni_runtime.generation.result import Timings


class LoopClock:
    """The time marks of one request.

    Args:
        device: the device that the pipeline runs on.
        on_step: called after each step with (index, count); the count is 0 if the pipeline does not give one.
    """

    def __init__(self, device: torch.device, on_step: Callable[[int, int], None] | None = None) -> None:
        self._timer = Timer(device)
        self._on_step = on_step
        self._marks: list[Any] = []
        self._steps = 0

    @contextlib.contextmanager
    def following(self, pipe: Any) -> Iterator[None]:
        """Context manager: `pipe`, and no other pipeline, reports its loop to this clock."""
        make_bar, patch = pipe.progress_bar, Patch()

        def progress_bar(iterable: Any = None, total: int | None = None) -> _Bar:
            bar = make_bar(iterable, total)
            self._steps = getattr(bar, "total", None) or 0
            return _Bar(bar, self)

        patch.set_method(pipe, "progress_bar", progress_bar)
        self.mark()
        try:
            yield
            self.mark()
        finally:
            patch.release()

    def mark(self) -> None:
        """Set a mark now."""
        self._marks.append(self._timer.mark())

    def close_step(self) -> None:
        """Mark the end of a step and call `on_step`."""
        self.mark()
        if self._on_step is not None:
            self._on_step(len(self._marks) - 3, self._steps)

    def timings(self) -> Timings:
        """Return the request's seconds. Waits for the device."""
        marks = self._marks
        self._timer.wait(marks[-1])
        spans = [self._timer.seconds(start, end) for start, end in itertools.pairwise(marks)]
        total = self._timer.seconds(marks[0], marks[-1])
        if len(spans) < 2:  # a pipeline that shows no progress
            return Timings(total, 0.0, [], 0.0)
        return Timings(total, spans[0], spans[1:-1], spans[-1])


class _Bar:
    """The pipeline's own bar, which also sets the clock's marks."""

    def __init__(self, bar: Any, clock: LoopClock) -> None:
        self._bar = bar
        self._clock = clock

    def __enter__(self) -> _Bar:
        self._bar.__enter__()
        self._clock.mark()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        self._clock.mark()
        for item in self._bar:
            yield item
            self._clock.close_step()

    def update(self, *args: Any) -> Any:
        self._clock.close_step()
        return self._bar.update(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
