"""Memory that reveals wrong accesses of a kernel: guards around tensors, NaN in outputs not yet written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

# Guard elements on either side. A multiple of the alignment that any access needs.
GUARD = 64
SENTINEL = 40.0  # which fp8 has, too
#: Stands for NaN in int8, where no op writes it; in uint8, which holds scales of MXFP8, it is their NaN.
UNWRITTEN = {torch.int8: -128, torch.uint8: 255}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are bit-identical. NaN equals itself, and 0 differs from −0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


class Placed:
    """A tensor between guards, with the strides and alignment of a given one.

    `view` is that tensor. The memory around it, and the gaps between its strides, hold a sentinel. For an input it is
    NaN, which spoils the result of a kernel that reads it (for integers, it is 1). For an output it is 40.
    """

    def __init__(self, like: torch.Tensor, *, written: bool = False) -> None:
        last = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
        start = GUARD + like.storage_offset() % GUARD
        around = SENTINEL if written else math.nan if like.is_floating_point() else 1
        self._buffer = torch.full((start + last + 1 + GUARD,), around, dtype=like.dtype, device=like.device)
        self._where = like.shape, like.stride(), start
        self._written = written
        self.view = self._buffer.as_strided(*self._where)
        # Where several elements share one place (stride 0), only one is written.
        once = tuple(slice(None) if s else slice(1) for s in like.stride())
        self.view[once] = math.nan if written else like[once]
        self._before = self._buffer.clone()

    def poison(self) -> None:
        """Fill the view with NaN."""
        self.view.fill_(math.nan)

    def untouched(self) -> bool:
        """Whether nothing was changed, except the view of an output."""
        now = self._buffer
        if self._written:
            now = now.clone()
            now.as_strided(*self._where).fill_(math.nan)
        return same_bits(now, self._before)


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[Callable[[], bool]]:
    """Context manager in which buffers from `Tensor.new_empty`, used by launchers, hold NaN and lie between guards.

    Buffers of integers hold `UNWRITTEN`. So an element that a kernel fails to write spoils the result, and a write
    outside is detected. Yields a function that returns whether all guards are unchanged.
    """
    guards: list[torch.Tensor] = []
    unguarded = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **where: Any) -> torch.Tensor:
        if where or self.is_meta:  # calls of the interpreter itself, and meta tensors
            return unguarded(self, *size, dtype=dtype, **where)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = torch.full((shape.numel() + 2 * GUARD,), SENTINEL, dtype=dtype or self.dtype, device=self.device)
        guards.extend((buffer[:GUARD], buffer[GUARD + shape.numel() :]))
        unwritten = UNWRITTEN.get(buffer.dtype, math.nan)
        return buffer[GUARD : GUARD + shape.numel()].fill_(unwritten).view(shape)

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield lambda: all(bool((guard.float() == SENTINEL).all()) for guard in guards)
