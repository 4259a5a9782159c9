"""Argument checks of the ops: floating-point tensors of equal shape on one device. Errors name the wrong argument."""

from __future__ import annotations

import torch

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def alike(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether an op supports these tensors together; None is ignored. Must be fast, as every call of an op uses it."""
    shape, device = first.shape, first.device
    if first.dtype not in DTYPES or not shape:
        return False
    for t in others:
        if t is not None and (t.shape != shape or t.device != device or t.dtype not in DTYPES):
            return False
    return True


def unlike(op: str, **tensors: torch.Tensor | None) -> ValueError:
    """The error for `tensors` that are not all `alike`. It names the first wrong one."""
    first, *_ = present = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in present:
        if t.dtype not in DTYPES:
            return ValueError(f"{op}: {name} has dtype {str(t.dtype)[6:]}; allowed are float32, float16 and bfloat16")
    for name, t in present:
        if t.device != first[1].device:
            return ValueError(f"{op}: {name} is on {t.device}; it must be on {first[1].device}, as {first[0]} is")
    for name, t in present:
        if t.shape != first[1].shape:
            return ValueError(
                f"{op}: {name} has shape {[*t.shape]}; it must be {[*first[1].shape]}, as {first[0]}'s is"
            )
    return ValueError(f"{op}: {first[0]} has no dimensions; the first one must be the batch")
