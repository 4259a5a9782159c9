"""quantize: hidden states in 8 bits with a scale for each token, for a matrix product in 8 bits.

    scale = max|x| / limit          q = round(x / scale)          x, q: [..., D]      scale: [...]

`_quantized` has the dtypes and their limits. This kernel also computes `gelu` and `swiglu` in 8 bits: their scales need
whole rows. Moves the bytes of x, of q (one each) and of the scales once.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _activations, _chunks, _norms, _quantized, _samples, _tiles
from omni_kernels.ops._checks import DTYPES, unlike
from omni_kernels.ops._quantized import LIMITS as LIMITS
from omni_kernels.ops._triton import tl, triton
from omni_kernels.ops.rms_norm import levels
from omni_kernels.registration import define

# Elements per tile, at least one row. As rms_norm, of which this kernel does about the work.
TILE = 4096
# Longer rows do not fit in a program's registers. FLUX.2 has 24576 channels of 16 bits.
MAX_TRITON_BYTES = 49152


def quantize(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """x in 8 bits, and the scale of each token: q·scale is x up to rounding.

    Args:
        x: [..., D], fp32, fp16 or bf16, any strides.
        dtype: torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz (AMD's gfx942), or torch.float8_e8m0fnu for MXFP8:
            float8_e4m3fn with a scale of this dtype for each 32 channels.

    Returns:
        q: contiguous, in x's shape.
        scale: [...], fp32. The scale of a token of zeros is 0. If a token holds infinities or NaN, its scale is
            infinite or NaN and its q is 0, so q·scale is NaN in this token and correct in all others.
            In MXFP8, the scales as a GPU's product reads them (see `_quantized`): a vector or, with torch for AMD,
            [..., D/32]. Infinities and NaN spoil only their own 32 channels, whose scale is NaN.

    Raises:
        ValueError: a dtype is not allowed, x has no dimensions, or 32 does not divide D in MXFP8.
    """
    if not x.shape:
        raise ValueError("quantize: x has no dimensions; each row of the last one gets a scale")
    if x.dtype not in DTYPES:
        raise unlike("quantize", x=x)
    _quantized.check_form("quantize", "dtype", x, dtype)
    return _op(x, dtype)


def reference(x, dtype):
    """In plain torch."""
    return _quantized.in_8_bits(x.float(), dtype)


@triton.jit(do_not_specialize=["n1", "n2", "tiles"])
def quantize_kernel(
    p_x, p_up, p_q, p_q_scale, p_y, n1, n2, stride_0, stride_1, stride_2, up_0, up_1, up_2, tiles,
    D: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program processes one tile of ROWS rows of x, of gelu(x) or, with p_up, of silu(x)·up. Indexed as in rms_norm.

    With p_y, the rows are also written in its dtype.
    """
    pid = tl.program_id(0)
    outer = pid // tiles
    o_r = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_r = o_r < n2
    first, second = (outer // n1).to(tl.int64), (outer % n1).to(tl.int64)
    x = _chunks.load_rows(p_x + first * stride_0 + second * stride_1, o_r * stride_2, m_r, D, CHUNKS, BLOCK)
    b_up = None
    if p_up is not None:
        b_up = _chunks.load_rows(p_up + first * up_0 + second * up_1, o_r * up_2, m_r, D, CHUNKS, BLOCK)
    rows = ()
    for c in tl.static_range(CHUNKS):
        y = x[c].to(tl.float32)
        if GELU:
            y = _activations.gelu_of(y)
        if b_up is not None:
            y = _activations.silu_of(y) * b_up[c].to(tl.float32)
        rows += (y,)
    o_out = outer.to(tl.int64) * n2 + o_r
    if p_y is not None:
        _chunks.store_rows(p_y, o_out * D, rows, m_r, D, CHUNKS, BLOCK)
    _quantized.store_quantized(p_q, p_q_scale, o_out * D, o_out, rows, m_r, D, CHUNKS, BLOCK)


def launch(x, dtype):
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    if dtype != torch.int8 and limits.here(x):
        raise limits.NotLaunchableError(f"quantize: an Ascend NPU has no {str(dtype)[6:]}")
    return launch_rows("quantize", x, None, dtype, beside=False)


def launch_rows(op, x, up, dtype, beside, gelu=False):
    """Launch the kernel for an op: of x, of gelu(x), or of silu(x)·up."""
    D = x.shape[-1]
    limits.whole_row(op, x, D, max(_norms.MAX_TRITON_CHANNELS, MAX_TRITON_BYTES // _chunks.widest(x, up)))
    y, q, q_scale = _quantized.empty(x, dtype, beside)
    if x.numel() == 0:
        return _quantized.returned(y, q, q_scale.zero_())
    x, found = levels(x)
    up_strides: Any = (0, 0, 0)
    if up is not None:
        up, of_up = levels(up)
        if [size for size, _ in found] != [size for size, _ in of_up]:
            (x, found), (up, of_up) = levels(x.contiguous()), levels(up.contiguous())
        up_strides = [stride for _, stride in of_up]
    (n0, n1, n2), strides = zip(*found, strict=True)
    rows, chunks, block, num_warps = _chunks.cut(x, n2, _tiles.tile("quantize", x, TILE), up)
    tiles = triton.cdiv(n2, rows)
    with _samples.on_device_of(x):
        quantize_kernel[limits.grid(x, n0 * n1 * tiles)](
            x, up, q, q_scale, y, n1, n2, *strides, *up_strides, tiles,
            D=D, GELU=gelu, ROWS=rows, CHUNKS=chunks, BLOCK=block, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return _quantized.returned(y, q, q_scale)


def fake(x, dtype):
    """The outputs' shapes and dtypes."""
    return _quantized.returned(*_quantized.empty(x, dtype, beside=False))


_op = define(quantize, reference, launch, fake=fake)
