"""A progress bar that shows for each denoising step whether it was computed or skipped.

    a cat                [████░░█░░█░░····················]  12/50  7 computed, 5 skipped

On a terminal tqdm redraws the line at every step. Elsewhere it is written once, after the request. If there are several
requests, each line can also show how many there are and how long they will take.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

if TYPE_CHECKING:
    from omni_runtime.cache.report import StepEvent

#: Columns: the label's largest width, the steps' smallest width, and the line's width outside a terminal.
LABEL_WIDTH, CELLS, COLUMNS = 28, 6, 120
#: computed, skipped, to come
BLOCKS, ASCII = ("█", "░", "·"), ("#", "-", ".")


class Progress(NamedTuple):
    """The number of the request that begins (from 1), the total, and the seconds that are left, None if unknown."""

    number: int
    total: int
    seconds_left: float | None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"{self.number} of {self.total}{left}"


def seconds_left(to_come: Iterable[str], taken: Mapping[str, Sequence[float]]) -> float | None:
    """Estimate the seconds that the remaining requests will take; None before the first one is done.

    Args:
        to_come: the kind of each remaining request.
        taken: kind → seconds of its finished requests. A kind without any is estimated by the mean of all kinds.
    """
    if not taken:
        return None
    means = {kind: statistics.fmean(seconds) for kind, seconds in taken.items()}
    mean = statistics.fmean(means.values())
    return sum(means.get(kind, mean) for kind in to_come)


def duration(seconds: float) -> str:
    """Return a readable duration: "under a minute", "12 min", "3 h 05 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class Line(tqdm):
    """A line that is redrawn on a terminal, without escapes. Elsewhere, and on a dumb terminal, nothing is drawn.

    Args:
        stream: where to draw.
        quiet: draw nothing.
    """

    monitor_interval = 0  # tqdm would start a thread

    def __init__(self, stream: TextIO, quiet: bool = False) -> None:
        self.live = not quiet and stream.isatty() and os.environ.get("TERM") != "dumb"
        super().__init__(file=stream, disable=not self.live, bar_format="{desc}", leave=False)

    def tell(self, text: str) -> None:
        """Replace the line with `text`, cut to the terminal's width."""
        self.set_description_str(disp_trim(text, columns_of(self.fp) - 1) if self.live else "")


def columns_of(stream: Any) -> int:
    """Return the width of the terminal that `stream` writes to. Without a terminal: the variable COLUMNS, else 80."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


class StepBar:
    """The bar of one request.

    Args:
        label: the start of the line; cut to fit, and left out on a narrow terminal.
        stream: where to draw.
        steps: the number of steps, if it is known before the first step.
        note: the end of the line.
    """

    def __init__(self, label: str, stream: TextIO, steps: int = 0, note: str = "") -> None:
        encoding = stream.encoding or "ascii"
        self._label = " ".join(label.encode(encoding, "backslashreplace").decode(encoding).split())
        self._note = f"  {note}" if note else ""
        self._stream = stream
        self._steps = steps
        self._computed: list[bool] = []
        self._start = time.perf_counter()
        self._line = Line(stream)
        self._line.tell(self.line())

    def __call__(self, event: StepEvent) -> None:
        """Note a closed step."""
        self._steps = max(event.steps, event.step + 1)
        self._computed.append(event.computed)
        self._line.tell(self.line())

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *error: object) -> None:
        """Write the final line and a line break."""
        self._line.close()
        self._stream.write(f"{self.line(f'  {time.perf_counter() - self._start:.2f} s')}\n")
        self._stream.flush()

    def line(self, end: str = "") -> str:
        """Return the current line followed by `end`, in the available columns. Redundant words are left out first."""
        done, computed = len(self._computed), sum(self._computed)
        columns = columns_of(self._stream) - 1 if self._stream.isatty() else COLUMNS
        for words in (f"  {computed} computed, {done - computed} skipped", f"  {computed} computed", ""):
            tail = f"  {done:>2}/{self._steps}{words}{self._note}{end}"
            room = columns - len(tail) - len("[]") - (0 if end else len("  100.00 s"))
            if room >= CELLS:
                break
        cells = min(self._steps, max(CELLS, room - LABEL_WIDTH - 1))
        return disp_trim(f"{_fitted(self._label, room - cells - 1)}[{self._cells(cells)}]{tail}", columns)

    def _cells(self, count: int) -> str:
        """Return one character per step. With more steps than `count`, one stands for several: computed if any was."""
        computed, skipped, coming = self._characters()
        text = ""
        for cell in range(count):
            first, last = cell * self._steps // count, (cell + 1) * self._steps // count
            steps = self._computed[first:last]
            text += coming if len(steps) < last - first else computed if any(steps) else skipped
        return text

    def _characters(self) -> tuple[str, str, str]:
        try:
            "".join(BLOCKS).encode(self._stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return ASCII
        return BLOCKS


def _fitted(text: str, width: int) -> str:
    """Fit `text` into at most `width` columns and a space. Return an empty string if `width` is too small."""
    width = min(width, LABEL_WIDTH)
    if width < 4:
        return ""
    cut = text if disp_len(text) <= width else f"{disp_trim(text, width - 3)}..."
    return cut + " " * (width - disp_len(cut) + 1)
