"""residual_relative_l1: the residual of a series of blocks and its difference to the former residual, in one pass.

    residual = h_out − h_in
    sums[b]  = [Σ|r_prev[b] − residual[b]|, Σ|r_prev[b]|]      h_out, h_in, r_prev: [B, ...]      sums: fp32 [B, 2]

This is the signal of the first-block cache and DBCache (the cache-dit project). They compare the residual of the first
blocks with that of the last computed step. The sums use the returned residual, rounded to its dtype, so a step that
repeats the last one has distance 0. Moves the bytes of its inputs and of the residual once.
"""

from __future__ import annotations

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _samples
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# 8 elements per thread: on sm_90, 48 registers and 60 KB of loads in flight per multiprocessor. With 16: 98 and 48.
BLOCK = 2048


def residual_relative_l1(
    h_out: torch.Tensor, h_in: torch.Tensor, r_prev: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual h_out − h_in, and the sums per sample of |r_prev − residual| and |r_prev|.

    Args:
        h_out: [B, ...], fp32, fp16 or bf16, any strides. A 1-D tensor is a batch of one-element samples.
        h_in: like h_out; the dtype may differ.
        r_prev: the former residual, like h_out. With None, the sums are zeros.

    Returns:
        residual: contiguous, in h_out's shape and dtype.
        sums: fp32 [B, 2]: [Σ|r_prev − residual|, Σ|r_prev|]. Infinities and NaN propagate to the sums of their sample.

    Raises:
        ValueError: shapes or devices differ, a dtype is not allowed, or there is no batch dimension.
    """
    if not alike(h_out, h_in, r_prev):
        raise unlike("residual_relative_l1", h_out=h_out, h_in=h_in, r_prev=r_prev)
    return _op(h_out, h_in, r_prev)


def reference(h_out, h_in, r_prev):
    """In plain torch."""
    exact = h_out.dtype is torch.float32
    residual = (h_out - h_in if exact else (h_out.float() - h_in).to(h_out.dtype)).contiguous()
    if r_prev is None:
        return residual, h_out.new_zeros((h_out.shape[0], 2), dtype=torch.float32)
    return residual, _samples.abs_sums((r_prev if exact else r_prev.float()) - residual, r_prev)


@triton.jit(do_not_specialize=["n", "blocks", "programs"])
def residual_relative_l1_kernel(
    p_out, p_in, p_prev, p_residual, p_partials, n, out_stride, in_stride, prev_stride, residual_stride, blocks,
    programs, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program processes `blocks` blocks of one sample of n elements. Writes partials [B, 2, programs] if p_prev."""
    pid = tl.program_id(0)
    sample = (pid // programs).to(tl.int64)
    part = pid % programs
    start = part.to(tl.int64) * blocks * BLOCK
    elements = tl.minimum(n - start, tl.cast(blocks, tl.int64) * BLOCK)
    p_out += sample * out_stride + start
    p_in += sample * in_stride + start
    p_residual += sample * residual_stride + start
    if p_prev is not None:
        p_prev += sample * prev_stride + start
    o = tl.arange(0, BLOCK)
    difference = tl.zeros((BLOCK,), tl.float32)
    magnitude = tl.zeros((BLOCK,), tl.float32)
    # A mask whose bound is not divisible by 16 prevents 128-bit accesses. So only the last, incomplete block has one.
    full = elements // BLOCK
    for _ in range(full):
        b_residual = tl.load(p_out + o).to(tl.float32) - tl.load(p_in + o).to(tl.float32)
        b_residual = b_residual.to(p_residual.dtype.element_ty)
        tl.store(p_residual + o, b_residual)
        if p_prev is not None:
            b_prev = tl.load(p_prev + o).to(tl.float32)
            difference += tl.abs(b_prev - b_residual.to(tl.float32))
            magnitude += tl.abs(b_prev)
            p_prev += BLOCK
        p_out += BLOCK
        p_in += BLOCK
        p_residual += BLOCK
    left = (elements - full * BLOCK).to(tl.int32)
    if left > 0:
        m = o < left
        b_residual = tl.load(p_out + o, mask=m, other=0.0).to(tl.float32)
        b_residual -= tl.load(p_in + o, mask=m, other=0.0).to(tl.float32)
        b_residual = b_residual.to(p_residual.dtype.element_ty)
        tl.store(p_residual + o, b_residual, mask=m)
        if p_prev is not None:
            b_prev = tl.load(p_prev + o, mask=m, other=0.0).to(tl.float32)
            difference += tl.abs(b_prev - b_residual.to(tl.float32))
            magnitude += tl.abs(b_prev)
    if p_prev is not None:
        p_partials += sample * 2 * programs + part
        tl.store(p_partials, tl.sum(difference))
        tl.store(p_partials + programs, tl.sum(magnitude))


def launch(h_out, h_in, r_prev):
    """With the Triton kernel."""
    B = h_out.shape[0]
    residual = h_out.new_empty(h_out.shape)
    sums = h_out.new_empty((B, 2), dtype=torch.float32)
    if r_prev is None or residual.numel() == 0:
        sums.zero_()
    if residual.numel() == 0:
        return residual, sums
    n = h_out.numel() // B
    h_out, out_stride = _samples.by_sample(h_out)
    h_in, in_stride = _samples.by_sample(h_in)
    r_prev, prev_stride = (None, 0) if r_prev is None else _samples.by_sample(r_prev)
    block = limits.tile("residual_relative_l1", h_out, BLOCK)
    blocks, programs = _samples.cut(n, block)
    partials = sums if r_prev is None else _samples.new_partials(sums, programs)
    with _samples.on_device_of(h_out):
        residual_relative_l1_kernel[limits.grid(h_out, B * programs)](
            h_out, h_in, r_prev, residual, partials, n, out_stride, in_stride, prev_stride, 0 if B == 1 else n, blocks,
            programs, BLOCK=block, num_warps=_samples.warps(), enable_fp_fusion=True,
        )  # fmt: skip
        _samples.add_partials(partials, sums)
    return residual, sums


def fake(h_out, h_in, r_prev):
    """The outputs' shapes and dtypes."""
    return h_out.new_empty(h_out.shape), h_out.new_empty((h_out.shape[0], 2), dtype=torch.float32)


_op = define(residual_relative_l1, reference, launch, fake=fake)
