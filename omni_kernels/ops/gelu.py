"""gelu: the tanh approximation of x·Φ(x), in one pass.

    out = ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))        x, out: [...]

The same as F.gelu(x, approximate="tanh"), used between the two linear layers of a feed-forward (Hendrycks and Gimpel
2016, arXiv:1606.08415). Computed in fp32 and rounded once. Moves the bytes of x and of out once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from omni_kernels.ascend import limits
from omni_kernels.ascend.gelu import gelu as on_npu
from omni_kernels.ops import _activations, _quantized, _rows, _samples, _tiles
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.ops.quantize import launch_rows
from omni_kernels.registration import define

# 16 elements per thread: on sm_90, 40 registers and 48 KB of loads in flight per multiprocessor. With 8: 24 and 32.
BLOCK = 4096


def gelu(
    x: torch.Tensor, *, quantize: torch.dtype | None = None, beside: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor | Any:
    """½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))).

    Args:
        x: [...], fp32, fp16 or bf16, any strides. A slice of a packed projection is read in place.
        quantize: a dtype that `omni_kernels.ops.quantize` takes: return the result in 8 bits, as that op does.
        beside: whether to return it in x's dtype as well.
        out: where to write, like x; None for a new tensor. A slice of a packed tensor is written in place. It may be x
            itself, but must not overlap x otherwise.

    Returns:
        `out`, or a new contiguous tensor in x's shape and dtype. −∞ gives NaN, as in torch.
        With `quantize` (q, scale) or, with `beside`, (q, scale, y): q in x's shape, scale fp32 [...].

    Raises:
        ValueError: shapes or devices differ, a dtype is not allowed, or x has no dimensions.
    """
    if not alike(x, out):
        raise unlike("gelu", x=x, out=out)
    _quantized.check("gelu", x, quantize, beside, out)
    return _op(x, quantize, beside, out)


def reference(x, quantize, beside, out):
    """In plain torch."""
    if quantize is not None:
        return _quantized.finished(F.gelu(x.float(), approximate="tanh"), x, quantize, beside)
    y = F.gelu(x, approximate="tanh")
    return y.contiguous() if out is None else out.copy_(y)


@triton.jit(do_not_specialize=["n", "blocks"])
def gelu_kernel(p_x, p_out, n, x_stride, out_stride, blocks, BLOCK: tl.constexpr):
    """A program writes one block of one row of n elements."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    start = (pid % blocks).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    p_x += row * x_stride + start
    p_out += row * out_stride + start
    # A mask whose bound is not divisible by 16 prevents 128-bit accesses. So only the last, incomplete block has one.
    if start + BLOCK <= n:
        tl.store(p_out + o, _activations.gelu_of(tl.load(p_x + o).to(tl.float32)).to(p_out.dtype.element_ty))
    else:
        m = o < (n - start).to(tl.int32)
        x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_out + o, _activations.gelu_of(x).to(p_out.dtype.element_ty), mask=m)


def launch(x, quantize, beside, out):
    """With the Triton kernel; in 8 bits, with that of `quantize`."""
    if quantize is not None:
        _quantized.check_device("gelu", x, quantize)
        return launch_rows("gelu", x, None, quantize, beside, gelu=True)
    if out is None:
        out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    (x, target), strides, R, n = _rows.by_row(x, out)
    block = _tiles.tile("gelu", out, BLOCK)
    blocks = -(-n // block)
    with _samples.on_device_of(out):
        gelu_kernel[limits.grid(out, R * blocks)](
            x, target, n, *strides, blocks,
            BLOCK=block, num_warps=_samples.warps(), enable_fp_fusion=True,
        )  # fmt: skip
    # `target` is a copy if `out` could not be viewed as rows with one stride.
    return out if target.data_ptr() == out.data_ptr() else out.copy_(target.view(out.shape))


def fake(x, quantize, beside, out=None):
    """The outputs' shapes and dtypes."""
    return _quantized.returned(*_quantized.empty(x, quantize, beside))


_op = define(gelu, reference, launch, fake=fake, npu=on_npu)
