"""swiglu: the gated activation of a feed-forward layer, in one pass.

    out = silu(gate)·up,  silu(x) = x / (1 + exp(−x))        gate, up, out: [...]

Used between the linear layers of a feed-forward (Shazeer 2020, arXiv:2002.05202; Z-Image's w1 and w3, FLUX.2). Computed
in fp32 and rounded once. Moves the bytes of gate, up and out once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from omni_kernels.ascend import limits
from omni_kernels.ascend.swiglu import swiglu as on_npu
from omni_kernels.ops import _activations, _quantized, _rows, _samples, _tiles
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.ops.quantize import launch_rows
from omni_kernels.registration import define

# 8 elements per thread: on sm_90, 29 registers and 64 KB of loads in flight per multiprocessor.
BLOCK = 2048


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    quantize: torch.dtype | None = None,
    beside: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | Any:
    """silu(gate)·up.

    Args:
        gate: [...], fp32, fp16 or bf16, any strides. Halves of one packed projection are read in place.
        up: like gate; the dtype may differ.
        quantize: a dtype that `omni_kernels.ops.quantize` takes: return the result in 8 bits, as that op does.
        beside: whether to return it in gate's dtype as well.
        out: where to write, like gate; None for a new tensor. A slice of a packed tensor is written in place. It may be
            gate or up itself, but must not overlap them otherwise.

    Returns:
        `out`, or a new contiguous tensor in gate's shape and dtype. −∞ in gate gives NaN, as in torch.
        With `quantize` (q, scale) or, with `beside`, (q, scale, y): q in gate's shape, scale fp32 [...].

    Raises:
        ValueError: shapes or devices differ, a dtype is not allowed, or gate has no dimensions.
    """
    if not alike(gate, up, out):
        raise unlike("swiglu", gate=gate, up=up, out=out)
    _quantized.check("swiglu", gate, quantize, beside, out)
    return _op(gate, up, quantize, beside, out)


def reference(gate, up, quantize, beside, out):
    """In plain torch."""
    y = F.silu(gate.float()).mul_(up)
    if quantize is not None:
        return _quantized.finished(y, gate, quantize, beside)
    return y.to(gate.dtype).contiguous() if out is None else out.copy_(y)


@triton.jit(do_not_specialize=["n", "blocks"])
def swiglu_kernel(p_gate, p_up, p_out, n, gate_stride, up_stride, out_stride, blocks, BLOCK: tl.constexpr):
    """A program writes one block of one row of n elements."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    start = (pid % blocks).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    p_gate += row * gate_stride + start
    p_up += row * up_stride + start
    p_out += row * out_stride + start
    # A mask whose bound is not divisible by 16 prevents 128-bit accesses. So only the last, incomplete block has one.
    if start + BLOCK <= n:
        gate = tl.load(p_gate + o).to(tl.float32)
        up = tl.load(p_up + o).to(tl.float32)
        tl.store(p_out + o, (_activations.silu_of(gate) * up).to(p_out.dtype.element_ty))
    else:
        m = o < (n - start).to(tl.int32)
        gate = tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32)
        up = tl.load(p_up + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_out + o, (_activations.silu_of(gate) * up).to(p_out.dtype.element_ty), mask=m)


def launch(gate, up, quantize, beside, out):
    """With the Triton kernel; in 8 bits, with that of `quantize`."""
    if quantize is not None:
        _quantized.check_device("swiglu", gate, quantize)
        return launch_rows("swiglu", gate, up, quantize, beside)
    if out is None:
        out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    (gate, up, target), strides, R, n = _rows.by_row(gate, up, out)
    block = _tiles.tile("swiglu", out, BLOCK)
    blocks = -(-n // block)
    with _samples.on_device_of(out):
        swiglu_kernel[limits.grid(out, R * blocks)](
            gate, up, target, n, *strides, blocks,
            BLOCK=block, num_warps=_samples.warps(), enable_fp_fusion=True,
        )  # fmt: skip
    # `target` is a copy if `out` could not be viewed as rows with one stride.
    return out if target.data_ptr() == out.data_ptr() else out.copy_(target.view(out.shape))


def fake(gate, up, quantize, beside, out=None):
    """The outputs' shapes and dtypes."""
    return _quantized.returned(*_quantized.empty(gate, quantize, beside))


_op = define(swiglu, reference, launch, fake=fake, npu=on_npu)
