"""Shared by the ops that sum per sample: a batch's memory layout, how it is cut, how partial sums are added.

The first dimension counts the samples. One program sums `blocks` blocks of one sample, and writes one partial sum of
each kind to `partials` [B, 2, programs]. A second, tiny kernel adds these in a fixed order. The cut depends only on the
sample's size, and no floating-point atomics are used. So the sums are bit-identical from run to run, in any batch and
on any number of multiprocessors.
"""

from __future__ import annotations

import torch

from omni_kernels.device import on_device_of as on_device_of
from omni_kernels.device import warp_size
from omni_kernels.ops._triton import tl, triton

# With more partial sums than this, programs process several blocks. The second kernel has one program per sum, so this
# limits what each of them reads to 32 KB.
MAX_PARTIALS = 8192
# Block sizes are chosen for this number of threads, whatever the warp size. All kernels use it, except for the widest
# rows; they differ in the number of elements per thread.
THREADS = 256
# Narrower rows are padded to this with a mask. A program with thousands of narrower rows would need up to five times
# the registers, and no model has such rows.
MIN_WIDTH = 16
# Up to this many elements, copying both tensors into one costs the CPU less than summing each: 5.4 µs against 7.3 at
# 4096 elements, 9.7 against 10.0 at 16384, and 15.2 against 13.2 at 32768.
SMALL = 1 << 14


def abs_sums(difference: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """[Σ|difference|, Σ|magnitude|] per sample, fp32 [B, 2]. Overwrites `difference`, which must be fp32.

    `sum` adds pairwise. `vector_norm` adds sequentially: at 3·10⁶ elements its error is 7·10⁻⁴, and it takes twice the
    time.
    """
    if 0 < difference.numel() <= SMALL and difference.dim() > 1:
        # `cat` rather than `stack`, because attention has just used it: 22 µs against 30 after a transformer block.
        both = torch.cat((difference, magnitude), 1).abs_()
        return both.reshape(difference.shape[0], 2, -1).sum(2)
    if difference.dim() == 1:
        return torch.stack((difference, magnitude), 1).abs_()
    sample = [*range(1, difference.dim())]
    return torch.stack((difference.abs_().sum(sample), magnitude.abs().sum(sample, dtype=torch.float32)), 1)


def by_sample(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`t` with contiguous samples, and the stride of its samples in elements.

    A slice of tokens, h[:, :n], is used in place. A view whose samples have gaps or another order (a slice of channels,
    a transpose) is copied. The stride is 0 for a batch of one: Triton then knows that it is divisible by 16, whatever
    the size is.
    """
    if not t[0].is_contiguous():
        t = t.contiguous()
    return t, 0 if t.shape[0] == 1 else t.stride(0)


def same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a` and `b`, of equal shape, are the same memory in the same order."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the memory ranges from first to last element overlap. Interleaved views count as overlapping."""
    return a.data_ptr() < _end(b) and b.data_ptr() < _end(a)


def _end(t: torch.Tensor) -> int:
    if t.numel() == 0:
        return t.data_ptr()
    return t.data_ptr() + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))


def cut(n: int, block: int) -> tuple[int, int]:
    """Blocks per program and programs per sample, for n elements (or tokens) in blocks of `block`."""
    count = -(-n // block)
    blocks = -(-count // MAX_PARTIALS)
    return blocks, -(-count // blocks)


def warps(threads: int = THREADS) -> int:
    """The number of warps with that many threads, at least one."""
    return max(1, threads // warp_size())


@triton.jit(do_not_specialize=["programs"])
def add_partials_kernel(p_partials, p_sums, programs, BLOCK: tl.constexpr):
    """Program i sums row i of `partials` [2B, programs] into sums[i], in a fixed order (by columns modulo BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    p_partials += row * programs
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        o = start + tl.arange(0, BLOCK)
        total += tl.load(p_partials + o, mask=o < programs, other=0.0)
    tl.store(p_sums + row, tl.sum(total))


def new_partials(sums: torch.Tensor, programs: int) -> torch.Tensor:
    """The buffer for partial sums. It is `sums` itself if there is one program per sample."""
    return sums if programs == 1 else sums.new_empty((sums.shape[0], 2, programs))


def add_partials(partials: torch.Tensor, sums: torch.Tensor) -> None:
    """Add up `partials` [B, 2, programs] into `sums` [B, 2]."""
    if partials is not sums:
        add_partials_kernel[(sums.numel(),)](
            partials, sums, partials.shape[2], BLOCK=1024, num_warps=warps(128), enable_fp_fusion=True
        )
