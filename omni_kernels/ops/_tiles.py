"""The number of elements in an op's tile: the default from the op's own file, or a better value for the device.

On Ascend, it is what fits in memory (`ascend.limits.TILES`). On a GPU, it is a value that was measured to be faster:
files of `python -m omni_kernels.tune` in omni_kernels/tuned. There, the entry with the op, the dtype and the nearest
number of channels is used. This applies only to passes over rows or elements. Sums over a sample are cut in the same
way on every GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from omni_kernels.ascend import limits
from omni_kernels.device import describe

TUNED = Path(__file__).parents[1] / "tuned"
#: Op → the tile being tried, and the channels and dtype of each tensor it was used for.
_tried: dict[str, tuple[int, list[tuple[int, str]]]] = {}


def tile(op: str, t: torch.Tensor, own: int) -> int:
    """Number of elements in an op's tile for `t`. `own` is the op's default."""
    if _tried and op in _tried:
        elements, asked = _tried[op]
        asked.append((t.shape[-1], str(t.dtype).removeprefix("torch.")))
        return elements
    if t.is_cuda:
        table = _tuned(t.device)
        return _nearest(table[op], t) or own if op in table else own
    return limits.tile(op, t, own)


@contextlib.contextmanager
def trying(op: str, elements: int) -> Iterator[list[tuple[int, str]]]:
    """Context manager that sets the op's tile to so many elements on every device.

    Yields a list, to which the channels and dtype of each tensor are added that the tile is used for.
    """
    asked: list[tuple[int, str]] = []
    _tried[op] = elements, asked
    try:
        yield asked
    finally:
        del _tried[op]


@functools.cache
def _tuned(device: torch.device) -> Mapping[str, list[dict[str, Any]]]:
    """Op → the tuned entries for this kind of device. Empty if there is no file for it."""
    name = describe(device).name
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(TUNED.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["machine"]["name"] == name:
            for row in document["rows"]:
                found.setdefault(row["op"], []).append(row)
    return found


def _nearest(rows: list[dict[str, Any]], t: torch.Tensor) -> int | None:
    """The tile of the entry with this dtype and the nearest number of channels; None if there is none."""
    dtype, channels = str(t.dtype).removeprefix("torch."), t.shape[-1]
    alike = [row for row in rows if row["dtype"] == dtype]
    if not alike:
        return None
    nearest: dict[str, Any] = min(alike, key=lambda row: abs(math.log(row["channels"] / channels)))
    return int(nearest["tile"])
