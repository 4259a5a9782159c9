"""How many elements a tile has: what the op's own file says and why, unless the device is known to want another.

On Ascend that is what fits (`ascend.limits.TILES`). On a GPU it is what was measured to be faster there: a file of
`python -m omni_kernels.tune` in omni_kernels/tuned, whose entry of the op and dtype with the nearest number of channels
counts. Only a pass over rows or elements has its tile from here: sums over a sample are cut alike on every GPU.
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
#: Op → the tile that is being tried, and what asked for it: channels and dtype of the tensor.
_tried: dict[str, tuple[int, list[tuple[int, str]]]] = {}


def tile(op: str, t: torch.Tensor, own: int) -> int:
    """Elements of an op's tile for `t`; `own` is the op's."""
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
    """For the block, the op's tile has so many elements, wherever it runs; gives channels and dtype of who asked."""
    asked: list[tuple[int, str]] = []
    _tried[op] = elements, asked
    try:
        yield asked
    finally:
        del _tried[op]


@functools.cache
def _tuned(device: torch.device) -> Mapping[str, list[dict[str, Any]]]:
    """Op → what was measured on such a device; nothing where no file is of one."""
    name = describe(device).name
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(TUNED.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["machine"]["name"] == name:
            for row in document["rows"]:
                found.setdefault(row["op"], []).append(row)
    return found


def _nearest(rows: list[dict[str, Any]], t: torch.Tensor) -> int | None:
    """The tile of the entry that is nearest in channels, of those of the dtype; None without any."""
    dtype, channels = str(t.dtype).removeprefix("torch."), t.shape[-1]
    alike = [row for row in rows if row["dtype"] == dtype]
    if not alike:
        return None
    nearest: dict[str, Any] = min(alike, key=lambda row: abs(math.log(row["channels"] / channels)))
    return int(nearest["tile"])
