"""What the elementwise ops have in common: tensors as rows of equal length, each contiguous, at one distance.

One program takes one block of one row. Contiguous tensors are one row; halves of a packed projection are a row a token
and are read where they lie.
"""

from __future__ import annotations

import math

import torch


def by_row(*tensors: torch.Tensor, length: int | None = None) -> tuple[list[torch.Tensor], list[int], int, int]:
    """`tensors`, of equal shape and not empty, as [R, n] with contiguous rows; the distances of their rows; R and n.

    Rows are as long as all tensors allow, or of `length`, which must divide them: everything, a sample, the last
    dimension. What does not even have its last dimension in rows at one distance is copied. The distance is 0 for one
    row, which Triton then knows to be divisible by 16 whatever n is.
    """
    shape = tensors[0].shape
    total = math.prod(shape)
    for n in (total, total // shape[0], shape[-1]) if length is None else (length,):
        views = [view for t in tensors if (view := _view(t, n)) is not None]
        if len(views) == len(tensors):
            R = total // n
            return views, [0 if R == 1 else t.stride(0) for t in views], R, n
    # `n` is the shortest row: what cannot be seen so must be copied, after which longer ones may do.
    return by_row(*(t.contiguous() if _view(t, n) is None else t for t in tensors), length=length)


def _view(t: torch.Tensor, n: int) -> torch.Tensor | None:
    """`t` as [R, n] with contiguous rows, or None where it would have to be copied."""
    if t.is_contiguous():
        return t.view(-1, n)
    if t.stride(-1) != 1 and t.shape[-1] != 1:
        return None
    try:
        view = t.view(-1, n)
    except RuntimeError:  # there is no cheaper way to ask
        return None
    return view if view.stride(1) == 1 or n == 1 else None
