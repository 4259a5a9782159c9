"""A progress bar that says of each denoising step whether it was computed or reused.

    a cat                [████░░█░░█░░····················]  12/50   7 computed, 5 reused

On a terminal the line is redrawn at every step; anywhere else it is written once, when the request is over. Of many
requests, each line can also say how many there are and how long they will take.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    from omni_runtime.cache.report import StepEvent

LABEL_WIDTH = 28
#: computed, reused, to come
BLOCKS, ASCII = ("█", "░", "·"), ("#", "-", ".")


class Progress(NamedTuple):
    """Which of many requests begins, from 1; of how many; and how long it and the rest will take, None if unknown."""

    number: int
    total: int
    seconds_left: float | None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"{self.number} of {self.total}{left}"


def seconds_left(to_come: Iterable[str], taken: Mapping[str, Sequence[float]]) -> float | None:
    """How long the requests `to_come` will take; None before the first one is done.

    Args:
        to_come: the kind of each.
        taken: kind → seconds of those that are done. A kind of which none is done takes the mean of all kinds.
    """
    if not taken:
        return None
    means = {kind: statistics.fmean(seconds) for kind, seconds in taken.items()}
    mean = statistics.fmean(means.values())
    return sum(means.get(kind, mean) for kind in to_come)


def duration(seconds: float) -> str:
    """Words for a person: "under a minute", "12 min", "3 h 05 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class StepBar:
    """The bar of one request.

    Args:
        label: what the line starts with; cut to fit.
        stream: where to draw.
        steps: how many steps there will be, if that is known before the first.
        note: what the line ends with.
    """

    def __init__(self, label: str, stream: TextIO, steps: int = 0, note: str = "") -> None:
        self._label = _fitted(label, LABEL_WIDTH)
        self._note = f"  {note}" if note else ""
        self._stream = stream
        self._live = stream.isatty()
        self._steps = steps
        self._computed: list[bool] = []
        self._start = time.perf_counter()
        self._draw()

    def __call__(self, event: StepEvent) -> None:
        """Note a closed step."""
        self._steps = max(event.steps, event.step + 1)
        self._computed.append(event.computed)
        self._draw()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *error: object) -> None:
        """Write the line as it stands at the end, and end it."""
        seconds = time.perf_counter() - self._start
        self._write(f"{self.line()}  {seconds:.2f} s", end="\n")

    def line(self) -> str:
        """The line as it stands, without its end."""
        done, computed = len(self._computed), sum(self._computed)
        tail = f"  {done:>3}/{self._steps}  {computed} computed, {done - computed} reused{self._note}"
        columns = shutil.get_terminal_size().columns if self._live else 120
        cells = max(8, min(self._steps, columns - LABEL_WIDTH - len(tail) - 16))
        return f"{self._label} [{self._cells(cells)}]{tail}"

    def _cells(self, count: int) -> str:
        """One character per step; where there are more steps than `count`, one for several, computed if any was."""
        computed, reused, coming = self._characters()
        count = min(count, self._steps)
        text = ""
        for cell in range(count):
            first, last = cell * self._steps // count, (cell + 1) * self._steps // count
            steps = self._computed[first:last]
            text += coming if len(steps) < last - first else computed if any(steps) else reused
        return text

    def _characters(self) -> tuple[str, str, str]:
        try:
            "".join(BLOCKS).encode(self._stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return ASCII
        return BLOCKS

    def _draw(self) -> None:
        if self._live:
            self._write(self.line(), end="")

    def _write(self, text: str, end: str) -> None:
        erase = "\r\x1b[2K" if self._live else ""
        self._stream.write(f"{erase}{text}{end}")
        self._stream.flush()


def _fitted(text: str, width: int) -> str:
    text = " ".join(text.split())
    return f"{text[: width - 3]}..." if len(text) > width else text.ljust(width)
