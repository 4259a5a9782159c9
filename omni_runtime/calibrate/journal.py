"""The files from which an interrupted search continues: the sampled schedules and the responses.

Files that cannot be read are set aside (`omni_runtime.files.set_aside`), and their content is measured again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_runtime import files
from omni_runtime.calibrate.search import Tried
from omni_runtime.generation.checks import finite_number

__all__ = ["Journal", "KeptResponses"]

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
        self._known: dict[tuple[int, ...], Tried] = {}
        self._seconds: dict[tuple[int, ...], float] = {}
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
            row = {"computed": tried.computed, "psnr": tried.psnr, "seconds": seconds}
            files.append(self._path, json.dumps(row) + "\n")

    def _remember(self, tried: Tried, seconds: float) -> None:
        self._known[tried.computed] = tried
        self._seconds[tried.computed] = self._seconds.get(tried.computed, 0.0) + seconds

    def get(self, computed: tuple[int, ...]) -> Tried | None:
        """Return the result of a schedule that was sampled before, or None."""
        return self._known.get(computed)

    def sample(self, images: Any, computed: tuple[int, ...], best: Tried | None = None) -> Tried:
        """Like `Images.sample`, but return the kept result if the schedule was sampled before."""
        known = self.get(computed)
        if known is None or (best is None and len(known.psnr) < len(images.requests)):
            start = time.perf_counter()
            known = images.sample(computed, best)
            self.keep(known, time.perf_counter() - start)
        return known

    def seconds(self, budget: int) -> float:
        """Return the seconds spent on sampling with all schedules of this budget."""
        return sum(seconds for computed, seconds in self._seconds.items() if len(computed) == budget)


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
    return (Tried(tuple(computed), tuple(psnr)), seconds) if finite_number(seconds) and seconds >= 0 else None


class KeptResponses(dict[str, np.ndarray]):
    """The measured responses of each batch by name, kept in a file.

    Args:
        path: a safetensors file. None keeps nothing.
        about: the description of the search; the content of another search's file is ignored.

    Warns:
        files.DamagedFileWarning: the file cannot be read; it is set aside.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._path = path
        self._search = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        if path is None or not path.exists():
            return
        from safetensors import SafetensorError, safe_open

        try:
            if path.is_dir():
                raise ValueError("it is a directory")
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("search") != self._search:
                    return
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    self[name] = file.get_tensor(name)
            if not all(np.isfinite(found).all() for found in self.values()):
                raise ValueError("it holds values that are not finite")
        except (SafetensorError, ValueError, OSError) as error:
            self.clear()
            files.set_aside(path, str(error), "and the responses are measured again")

    def fitting(self, name: str, images: int, steps: int) -> bool:
        """Whether the batch's responses are kept, for this number of images and of skipped steps."""
        found = [self.get(f"{kind} {name}") for kind in _KINDS]
        return [None if one is None else one.shape for one in found] == [(images, steps, steps), (images, steps), ()]

    def keep(self, name: str, changes: np.ndarray, errors: np.ndarray, seconds: float) -> None:
        """Add a batch: inner products [images, steps, steps], squared norms [images, steps], and its seconds.

        Raises:
            files.WriteError: the file cannot be written.
        """
        from safetensors.numpy import save

        found = np.ascontiguousarray(changes), np.ascontiguousarray(errors), np.asarray(seconds)
        self.update(zip((f"{kind} {name}" for kind in _KINDS), found, strict=True))
        if self._path is not None:
            files.write(self._path, save(dict(self), {"search": self._search}))


_KINDS = ("changes", "errors", "seconds")
