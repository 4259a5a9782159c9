"""Shared by the elementwise ops: tensors as contiguous rows of equal length with one row stride.

One program processes one block of one row. A contiguous tensor is one row. Halves of a packed projection have one row
per token, and are read in place.
"""

from __future__ import annotations

import math

import torch


def by_row(*tensors: torch.Tensor, length: int | None = None) -> tuple[list[torch.Tensor], list[int], int, int]:
    """View non-empty `tensors` of equal shape as [R, n] with contiguous rows. Returns views, row strides, R and n.

    Without `length`, n is the largest of these that all tensors allow: all elements, one sample, the last dimension.
    With `length`, n is that length, which must divide the number of elements. A tensor that allows no such view is
    copied. The row stride is 0 for a single row: Triton then knows that it is divisible by 16, whatever n is.
    """
    shape = tensors[0].shape
    total = math.prod(shape)
    for n in (total, total // shape[0], shape[-1]) if length is None else (length,):
        views = [view for t in tensors if (view := _view(t, n)) is not None]
        if len(views) == len(tensors):
            R = total // n
            return views, [0 if R == 1 else t.stride(0) for t in views], R, n
    # `n` is now the shortest row length. Tensors without such a view are copied; then longer rows may be possible.
    return by_row(*(t.contiguous() if _view(t, n) is None else t for t in tensors), length=length)


def _view(t: torch.Tensor, n: int) -> torch.Tensor | None:
    """`t` as [R, n] with contiguous rows, or None if that needs a copy."""
    if t.is_contiguous():
        return t.view(-1, n)
    if t.stride(-1) != 1 and t.shape[-1] != 1:
        return None
    try:
        view = t.view(-1, n)
    except RuntimeError:  # trying is the cheapest way to find out
        return None
    return view if view.stride(1) == 1 or n == 1 else None
