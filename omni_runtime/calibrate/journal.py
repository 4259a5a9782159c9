"""The file from which an interrupted search continues: the sampled schedules.

A file that cannot be read is set aside (`omni_runtime.files.set_aside`), and its content is measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_runtime import files
from omni_runtime.calibrate.search import Forecast, Tried
from omni_runtime.generation.checks import finite_number

ANEW = "and the search starts again"


class Journal:
    """The sampled schedules, kept in a file.

    Args:
        path: the file, with one JSON document per line; the first line describes the search. None keeps nothing.
        about: the description of the search.

    Raises:
        ValueError: the file belongs to another search.
        files.WriteError: the file cannot be written.

    Warns:
        files.DamagedFileWarning: the file, or some of its lines, cannot be read; the file is set aside. An incomplete
            last line, of a search that was killed while writing, is dropped without a warning.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self._path = path
        self._known: dict[tuple[tuple[int, ...], Forecast | None], Tried] = {}
        self._seconds: dict[int, float] = {}
        if path is None:
            return
        header = json.dumps(about, sort_keys=True, ensure_ascii=False)
        lines = _lines(path) if path.exists() else None
        if lines is None:
            files.make_directory(path.parent)
            files.write(path, header + "\n")
            return
        first, *rest = lines
        if first != header:
            raise ValueError(f"{path} holds another search (other model, prompts, seeds or settings): --fresh drops it")
        images = len(about.get("requests", ()))
        rows = [_row(line, images) for line in rest]
        whole = [header]
        for line, row in zip(rest, rows, strict=True):
            if row is not None:
                self._remember(*row)
                whole.append(line)
        if None in rows[:-1]:
            files.set_aside(path, f"{rows.count(None)} of its lines cannot be read", "and the others are kept")
        if None in rows:
            files.write(path, "\n".join(whole) + "\n")

    def keep(self, tried: Tried, seconds: float = 0.0) -> None:
        """Add a sampled schedule and its seconds. Raises `files.WriteError` if the file cannot be written."""
        self._remember(tried, seconds)
        if self._path is not None:
            row = {"computed": tried.computed, "forecast": tried.forecast, "psnr": tried.psnr, "seconds": seconds}
            files.append(self._path, json.dumps(row) + "\n")

    def _remember(self, tried: Tried, seconds: float) -> None:
        self._known[tried.computed, tried.forecast] = tried
        budget = len(tried.computed)
        self._seconds[budget] = self._seconds.get(budget, 0.0) + seconds

    def get(self, computed: tuple[int, ...], forecast: Forecast) -> Tried | None:
        """Return the result of a schedule that was sampled before, or None."""
        return self._known.get((computed, forecast))

    def sample(self, images: Any, computed: tuple[int, ...], forecast: Forecast, best: Tried | None = None) -> Tried:
        """Like `Images.sample`, but return the kept result if the schedule was sampled before."""
        known = self.get(computed, forecast)
        if known is None or (best is None and len(known.psnr) < len(images.requests)):
            start = time.perf_counter()
            known = images.sample(computed, forecast, best)
            self.keep(known, time.perf_counter() - start)
        return known

    def seconds(self, budget: int) -> float:
        """Return the seconds spent on sampling with all schedules of this budget."""
        return self._seconds.get(budget, 0.0)


def _lines(path: Path) -> list[str] | None:
    """Return the lines of a journal; None if its first line does not describe a search. The file is then set aside."""
    try:
        lines = files.read_text(path, files.JOURNAL_BYTES).removesuffix("\n").split("\n")
        if not isinstance(files.parse_json(lines[0], "its first line"), dict):
            raise ValueError("its first line does not say what was searched")
    except ValueError as error:
        files.set_aside(path, str(error), ANEW)
        return None
    return lines


def _row(line: str, images: int) -> tuple[Tried, float] | None:
    """Parse a sampled schedule and its seconds; None if the line is damaged. `images`: their number, 0 if unknown."""
    try:
        row = files.parse_json(line, "line")
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    computed, psnr, seconds = row.get("computed"), row.get("psnr"), row.get("seconds", 0.0)
    if not (isinstance(computed, list) and computed and all(type(step) is int for step in computed)):
        return None
    if computed[0] != 0 or computed != sorted(set(computed)):
        return None
    if not (isinstance(psnr, list) and psnr and all(map(finite_number, psnr)) and len(psnr) <= (images or len(psnr))):
        return None
    forecast = row.get("forecast")
    if not (isinstance(forecast, list) and len(forecast) == 2 and all(map(finite_number, forecast))):
        return None
    tried = Tried(tuple(computed), tuple(psnr), Forecast(float(forecast[0]), int(forecast[1])))
    return (tried, seconds) if finite_number(seconds) and seconds >= 0 else None
