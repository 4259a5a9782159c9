"""Memory that shows what a kernel should not have done: guards around tensors, NaN where nothing was written yet."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

# Elements on either side; a multiple of what any access needs to be aligned.
GUARD = 64
SENTINEL = 42.0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; NaN equals itself here, and 0 is not −0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


class Placed:
    """A tensor that lies between guards, in the strides and with the alignment of a given one.

    `view` is that tensor. Around it, and in the gaps that its strides leave, is a sentinel: for what is read, NaN, so
    that it spoils the result of whoever reads it (in integers, the number 1); for what is written, 42.
    """

    def __init__(self, like: torch.Tensor, *, written: bool = False) -> None:
        last = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
        start = GUARD + like.storage_offset() % GUARD
        around = SENTINEL if written else math.nan if like.is_floating_point() else 1
        self._buffer = torch.full((start + last + 1 + GUARD,), around, dtype=like.dtype, device=like.device)
        self._where = like.shape, like.stride(), start
        self._written = written
        self.view = self._buffer.as_strided(*self._where)
        # Of elements that are several in one place, one is written.
        once = tuple(slice(None) if s else slice(1) for s in like.stride())
        self.view[once] = math.nan if written else like[once]
        self._before = self._buffer.clone()

    def poison(self) -> None:
        """NaN into everything that is to be written."""
        self.view.fill_(math.nan)

    def untouched(self) -> bool:
        """Whether nothing was changed but, in what is written, the view."""
        now = self._buffer
        if self._written:
            now = now.clone()
            now.as_strided(*self._where).fill_(math.nan)
        return same_bits(now, self._before)


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[Callable[[], bool]]:
    """For the block, buffers that launchers make (`Tensor.new_empty`) hold NaN and lie between guards.

    So an element that a kernel does not write spoils the result, and one that it should not write is seen: what is
    yielded says whether all guards are as they were.
    """
    guards: list[torch.Tensor] = []
    unguarded = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **where: Any) -> torch.Tensor:
        if where or self.is_meta:  # the interpreter's own, and what has no memory
            return unguarded(self, *size, dtype=dtype, **where)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = torch.full((shape.numel() + 2 * GUARD,), SENTINEL, dtype=dtype or self.dtype, device=self.device)
        guards.extend((buffer[:GUARD], buffer[GUARD + shape.numel() :]))
        return buffer[GUARD : GUARD + shape.numel()].fill_(math.nan).view(shape)

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield lambda: all(bool((guard == SENTINEL).all()) for guard in guards)
