"""relative_l1: the difference of x and y relative to y, per sample.

    sums[b] = [Σ|x[b] − y[b]|, Σ|y[b]|]        x, y: [B, ...]      sums: fp32 [B, 2]

The signal of the step caches (TeaCache, Liu et al. 2024, arXiv:2411.19108; first-block cache and DBCache of the
cache-dit project) is the quotient of the two sums. The op returns sums, not means or the quotient, so that ranks with
parts of a sample can add them. Moves the bytes of x and y once.
"""

from __future__ import annotations

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _samples
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# 16 elements per thread: on sm_90, 57 registers, so 4 programs per multiprocessor with 64 KB of loads in flight.
BLOCK = 4096


def relative_l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sums per sample of |x − y| and |y|.

    Args:
        x: [B, ...], fp32, fp16 or bf16, any strides. A 1-D tensor is a batch of one-element samples.
        y: like x; the dtype may differ.

    Returns:
        fp32 [B, 2]: [Σ|x − y|, Σ|y|]. Infinities and NaN in the inputs propagate to the sums of their sample.

    Raises:
        ValueError: shapes or devices differ, a dtype is not allowed, or there is no batch dimension.
    """
    if not alike(x, y):
        raise unlike("relative_l1", x=x, y=y)
    return _op(x, y)


def reference(x, y):
    """In plain torch."""
    return _samples.abs_sums(torch.sub(x.float(), y), y)


@triton.jit(do_not_specialize=["n", "blocks", "programs"])
def relative_l1_kernel(p_x, p_y, p_partials, n, x_stride, y_stride, blocks, programs, BLOCK: tl.constexpr):
    """A program sums `blocks` blocks of one sample of n elements; partials: [B, 2, programs]."""
    pid = tl.program_id(0)
    sample = (pid // programs).to(tl.int64)
    part = pid % programs
    start = part.to(tl.int64) * blocks * BLOCK
    elements = tl.minimum(n - start, tl.cast(blocks, tl.int64) * BLOCK)
    p_x += sample * x_stride + start
    p_y += sample * y_stride + start
    o = tl.arange(0, BLOCK)
    difference = tl.zeros((BLOCK,), tl.float32)
    magnitude = tl.zeros((BLOCK,), tl.float32)
    # A mask whose bound is not divisible by 16 prevents 128-bit loads. So only the last, incomplete block has a mask.
    full = elements // BLOCK
    for _ in range(full):
        b_x = tl.load(p_x + o).to(tl.float32)
        b_y = tl.load(p_y + o).to(tl.float32)
        difference += tl.abs(b_x - b_y)
        magnitude += tl.abs(b_y)
        p_x += BLOCK
        p_y += BLOCK
    left = (elements - full * BLOCK).to(tl.int32)
    if left > 0:
        b_x = tl.load(p_x + o, mask=o < left, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + o, mask=o < left, other=0.0).to(tl.float32)
        difference += tl.abs(b_x - b_y)
        magnitude += tl.abs(b_y)
    p_partials += sample * 2 * programs + part
    tl.store(p_partials, tl.sum(difference))
    tl.store(p_partials + programs, tl.sum(magnitude))


def launch(x, y):
    """With the Triton kernel."""
    B = x.shape[0]
    sums = x.new_empty((B, 2), dtype=torch.float32)
    if x.numel() == 0:
        return sums.zero_()
    n = x.numel() // B
    x, x_stride = _samples.by_sample(x)
    y, y_stride = _samples.by_sample(y)
    block = limits.tile("relative_l1", x, BLOCK)
    blocks, programs = _samples.cut(n, block)
    partials = _samples.new_partials(sums, programs)
    with _samples.on_device_of(x):
        relative_l1_kernel[limits.grid(x, B * programs)](
            x, y, partials, n, x_stride, y_stride, blocks, programs,
            BLOCK=block, num_warps=_samples.warps(), enable_fp_fusion=True,
        )  # fmt: skip
        _samples.add_partials(partials, sums)
    return sums


def fake(x, y):
    """The output's shape and dtype."""
    return x.new_empty((x.shape[0], 2), dtype=torch.float32)


_op = define(relative_l1, reference, launch, fake=fake)
