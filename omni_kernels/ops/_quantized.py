"""Shared by the ops that return hidden states in 8 bits: with a scale for each token, symmetric and dynamic.

    scale = max|x| / limit          q = round(x / scale)          x, q: [..., D]      scale: [...]

Each token's own largest magnitude becomes the largest 8-bit value, `limit`, which is 127 for int8, 448 for
float8_e4m3fn and 240 for float8_e4m3fnuz. Rounds half to even, once: from fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _chunks
from omni_kernels.ops._triton import tl, triton

#: 8-bit dtype → the largest value that is used. −128 is not, so that int8 is symmetric.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
#: Tokens whose largest magnitude is smaller become zeros with scale 0: the quotient would overflow.
TINY = 2.0**-100
_TINY = tl.constexpr(TINY)
# x + ROUND − ROUND rounds x to an integer, half to even, if |x| < 2²².
ROUND = tl.constexpr(1.5 * 2.0**23)


def check(op: str, dtype: torch.dtype | None, beside: bool, out: torch.Tensor | None = None) -> None:
    """Raise ValueError if an op cannot return this 8-bit dtype."""
    if dtype is None:
        if beside:
            raise ValueError(f"{op}: beside is given without quantize")
        return
    if dtype not in LIMITS:
        allowed = ", ".join(str(one)[6:] for one in LIMITS)
        raise ValueError(f"{op}: quantize is {str(dtype).removeprefix('torch.')}; allowed are {allowed}")
    if out is not None:
        raise ValueError(f"{op}: out and quantize cannot be given together")


def check_device(op: str, x: torch.Tensor, dtype: torch.dtype | None) -> None:
    """Raise NotLaunchableError if the kernel of another op cannot write 8 bits on x's device: Ascend's cannot."""
    if dtype is not None and limits.here(x):
        raise limits.NotLaunchableError(f"{op}: on Ascend, its kernel does not quantize")


def in_8_bits(y: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 y [..., D] as q and scale, in plain torch."""
    limit = LIMITS[dtype]
    largest = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros((*y.shape[:-1], 1))
    unused = ((largest >= TINY) & (largest < float("inf"))).logical_not()
    scale = (largest / limit).masked_fill_(largest < TINY, 0.0)
    y = y.mul(limit / largest).masked_fill_(unused, 0.0)
    return (y.round_() if dtype == torch.int8 else y).to(dtype).contiguous(), scale.squeeze(-1).contiguous()


def finished(y: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None, beside: bool) -> Any:
    """An op's result from fp32 y, in plain torch: y in `like`'s dtype or, with a `dtype`, as `returned`."""
    if dtype is None:
        return y.to(like.dtype).contiguous()
    return returned(y.to(like.dtype).contiguous() if beside else None, *in_8_bits(y, dtype))


def returned(y: torch.Tensor | None, q: torch.Tensor | None, scale: torch.Tensor | None) -> Any:
    """What an op returns of these: y, (q, scale), or (q, scale, y)."""
    if q is None:
        return y
    return (q, scale) if y is None else (q, scale, y)


def empty(like: torch.Tensor, dtype: torch.dtype | None, beside: bool) -> tuple[Any, Any, Any]:
    """y, q and scale for an op to write, in `like`'s shape; None for what it does not return."""
    y = like.new_empty(like.shape) if dtype is None or beside else None
    if dtype is None:
        return y, None, None
    return y, like.new_empty(like.shape, dtype=dtype), like.new_empty(like.shape[:-1], dtype=torch.float32)


@triton.jit
def store_quantized(p_q, p_scale, o_row, o_token, x, m_row, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows x, fp32 chunks [ROWS, BLOCK], in p_q's dtype at o_row, and their scales at o_token [ROWS, 1]."""
    INT8: tl.constexpr = p_q.dtype.element_ty == tl.int8
    LIMIT: tl.constexpr = 127.0 if INT8 else 448.0 if p_q.dtype.element_ty == tl.float8e4nv else 240.0
    magnitude = tl.zeros_like(x[0])
    # A row with NaN gets the scale NaN, whatever a maximum makes of it.
    nan = tl.zeros_like(x[0]).to(tl.int32)
    for c in tl.static_range(CHUNKS):
        # Where eps is 0, the lanes outside may hold 0 · ∞.
        one = tl.where(_chunks.columns(c, BLOCK) < D, x[c], 0.0) if (c + 1) * BLOCK > D else x[c]
        magnitude = tl.maximum(magnitude, tl.abs(one))
        nan |= (one != one).to(tl.int32)
    largest = tl.max(magnitude, axis=1, keep_dims=True)
    spoilt = tl.max(nan, axis=1, keep_dims=True) > 0
    used = (largest >= _TINY) & (largest < float("inf")) & (spoilt == 0)
    inverse = LIMIT / tl.where(used, largest, LIMIT)
    for c in tl.static_range(CHUNKS):
        o_d = _chunks.columns(c, BLOCK)
        y = tl.where(used, x[c], 0.0) * inverse
        if INT8:
            y = (y + ROUND) - ROUND
        tl.store(p_q + o_row + o_d, y.to(p_q.dtype.element_ty), mask=m_row & (o_d < D))
    scale = tl.where(largest < _TINY, 0.0, largest / LIMIT)
    tl.store(p_scale + o_token, tl.where(spoilt, float("nan"), scale), mask=m_row)
