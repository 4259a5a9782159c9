"""quantize: hidden states in 8 bits with a scale for each token, for a matrix product in 8 bits.

    scale = max|x| / limit          q = round(x / scale)          x, q: [..., D]      scale: [...]

Symmetric and dynamic: each token's own largest magnitude becomes the largest 8-bit value, `limit`, which is 127 for
int8, 448 for float8_e4m3fn and 240 for float8_e4m3fnuz. Rounds half to even. Moves the bytes of x, of q (one each) and
of the scales once.
"""

from __future__ import annotations

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _norms, _samples, _tiles
from omni_kernels.ops._checks import DTYPES, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.ops.rms_norm import levels
from omni_kernels.registration import define

# Elements per tile, at least one row. As rms_norm, of which this kernel does about the work.
TILE = 4096
#: 8-bit dtype → the largest value that is used. −128 is not, so that int8 is symmetric.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
#: Tokens whose largest magnitude is smaller become zeros with scale 0: the quotient would overflow.
TINY = 2.0**-100
# x + ROUND − ROUND rounds x to an integer, half to even, if |x| < 2²².
ROUND = tl.constexpr(1.5 * 2.0**23)


def quantize(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """x in 8 bits, and the scale of each token: q·scale is x up to rounding.

    Args:
        x: [..., D], fp32, fp16 or bf16, any strides.
        dtype: torch.int8, torch.float8_e4m3fn, or torch.float8_e4m3fnuz (AMD's gfx942).

    Returns:
        q: contiguous, in x's shape.
        scale: [...], fp32. The scale of a token of zeros is 0. If a token holds infinities or NaN, its scale is
            infinite or NaN and its q is 0, so q·scale is NaN in this token and correct in all others.

    Raises:
        ValueError: a dtype is not allowed, or x has no dimensions.
    """
    if not x.shape:
        raise ValueError("quantize: x has no dimensions; each row of the last one gets a scale")
    if x.dtype not in DTYPES:
        raise unlike("quantize", x=x)
    if dtype not in LIMITS:
        allowed = ", ".join(str(one)[6:] for one in LIMITS)
        raise ValueError(f"quantize: dtype is {str(dtype)[6:]}; allowed are {allowed}")
    return _op(x, dtype)


def reference(x, dtype):
    """In plain torch."""
    limit, y = LIMITS[dtype], x.float()
    largest = y.abs().amax(-1, keepdim=True) if x.shape[-1] else y.new_zeros((*x.shape[:-1], 1))
    unused = ((largest >= TINY) & (largest < float("inf"))).logical_not()
    y = y.mul(limit / largest).masked_fill_(unused, 0.0)
    scale = (largest / limit).masked_fill_(largest < TINY, 0.0)
    return (y.round_() if dtype == torch.int8 else y).to(dtype).contiguous(), scale.squeeze(-1).contiguous()


@triton.jit
def quantize_rows(x, p_q, LIMIT: tl.constexpr, TINY: tl.constexpr):
    """The rows of x [ROWS, BLOCK] in p_q's dtype, and their scales [ROWS, 1]. x is fp32, and 0 in masked channels."""
    magnitude = tl.abs(x)
    # A row with NaN gets the scale NaN, whatever a maximum makes of it.
    spoilt = tl.sum((x != x).to(tl.int32), axis=1, keep_dims=True) > 0
    largest = tl.max(magnitude, axis=1, keep_dims=True)
    used = (largest >= TINY) & (largest < float("inf")) & (spoilt == 0)
    y = tl.where(used, x, 0.0) * (LIMIT / tl.where(used, largest, LIMIT))
    scale = tl.where(largest < TINY, 0.0, largest / LIMIT)
    scale = tl.where(spoilt, float("nan"), scale)
    if p_q.dtype.element_ty == tl.int8:
        y = (y + ROUND) - ROUND
    return y.to(p_q.dtype.element_ty), scale


@triton.jit(do_not_specialize=["n1", "n2", "tiles"])
def quantize_kernel(
    p_x, p_q, p_scale_out, n1, n2, stride_0, stride_1, stride_2, tiles,
    D: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program processes one tile of ROWS rows, indexed as in `rms_norm_kernel`."""
    pid = tl.program_id(0)
    outer = pid // tiles
    o_r = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, BLOCK)[None, :]
    m = (o_r < n2) & (o_d < D)
    p_x += (outer // n1).to(tl.int64) * stride_0 + (outer % n1).to(tl.int64) * stride_1
    x = tl.load(p_x + o_r * stride_2 + o_d, mask=m, other=0.0).to(tl.float32)
    q, scale = quantize_rows(x, p_q, LIMIT, TINY)
    o_out = outer.to(tl.int64) * n2 + o_r
    tl.store(p_q + o_out * D + o_d, q, mask=m)
    tl.store(p_scale_out + o_out, scale, mask=o_r < n2)


def launch(x, dtype):
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    D = x.shape[-1]
    if dtype != torch.int8 and limits.here(x):
        raise limits.NotLaunchableError(f"quantize: an Ascend NPU has no {str(dtype)[6:]}")
    limits.whole_row("quantize", x, D, _norms.MAX_TRITON_CHANNELS)
    q, scale = fake(x, dtype)
    if q.numel() == 0:
        return q, scale.zero_()
    x, ((n0, stride_0), (n1, stride_1), (n2, stride_2)) = levels(x)
    rows, block, num_warps = _norms.cut(n2, D, _tiles.tile("quantize", x, TILE))
    tiles = triton.cdiv(n2, rows)
    with _samples.on_device_of(x):
        quantize_kernel[limits.grid(x, n0 * n1 * tiles)](
            x, q, scale, n1, n2, stride_0, stride_1, stride_2, tiles,
            D=D, LIMIT=LIMITS[dtype], TINY=TINY, ROWS=rows, BLOCK=block, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return q, scale


def fake(x, dtype):
    """The outputs' shapes and dtypes."""
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


_op = define(quantize, reference, launch, fake=fake)
