"""What the ops that sum per sample have in common: how a batch lies in memory, how it is cut, how the pieces are added.

A sample is what the first dimension counts. One program sums `blocks` blocks of one sample and writes one partial sum
of each kind to `partials` [B, 2, programs]; a second, tiny kernel adds them in a fixed order. How a sample is cut
depends on its size alone, so its sums are the same bits from run to run, in any batch and on any number of
multiprocessors, and no floating-point atomic is involved.
"""

from __future__ import annotations

import torch

from omni_kernels.device import on_device_of as on_device_of
from omni_kernels.device import warp_size
from omni_kernels.ops._triton import tl, triton

# Above this, programs take several blocks: it bounds what the second kernel, one program per sum, has to read, 32 KB.
MAX_PARTIALS = 8192
# Threads, not warps, are what the block sizes are made for. All kernels run with as many but for the widest rows; what
# differs is how many elements each thread takes.
THREADS = 256
# Narrower rows are masked: programs of thousands of them need up to five times the registers, and no model has them.
MIN_WIDTH = 16
# Up to here, in elements, copying both into one tensor costs the CPU less than summing each: 5.4 µs against 7.3 at 4096
# elements, 9.7 against 10.0 at 16384, and 15.2 against 13.2 at 32768.
SMALL = 1 << 14


def abs_sums(difference: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """[Σ|difference|, Σ|magnitude|] per sample, fp32 [B, 2]. Overwrites `difference`, which must be fp32.

    `sum` adds pairwise; `vector_norm` adds one by one, which at 3·10⁶ elements is 7·10⁻⁴ off and takes twice the time.
    """
    if 0 < difference.numel() <= SMALL and difference.dim() > 1:
        # `cat` rather than `stack`: attention has just used it. After a transformer block, this is 22 µs against 30.
        both = torch.cat((difference, magnitude), 1).abs_()
        return both.reshape(difference.shape[0], 2, -1).sum(2)
    if difference.dim() == 1:
        return torch.stack((difference, magnitude), 1).abs_()
    sample = [*range(1, difference.dim())]
    return torch.stack((difference.abs_().sum(sample), magnitude.abs().sum(sample, dtype=torch.float32)), 1)


def by_sample(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`t` and the distance of its samples in elements, each sample contiguous.

    A view that cuts tokens off, h[:, :n], qualifies as it is; one whose samples have gaps or another order (transposed,
    cut in channels) is copied. The distance is 0 for a batch of one, which Triton then knows to be divisible by 16
    whatever the size is.
    """
    if not t[0].is_contiguous():
        t = t.contiguous()
    return t, 0 if t.shape[0] == 1 else t.stride(0)


def same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a` and `b`, of equal shape, are the same elements of memory in the same order."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the stretches of memory from first to last element meet: views that interleave count as overlapping."""
    return a.data_ptr() < _end(b) and b.data_ptr() < _end(a)


def _end(t: torch.Tensor) -> int:
    if t.numel() == 0:
        return t.data_ptr()
    return t.data_ptr() + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))


def cut(n: int, block: int) -> tuple[int, int]:
    """Blocks per program and programs per sample, for n elements (or tokens), `block` of them to a block."""
    count = -(-n // block)
    blocks = -(-count // MAX_PARTIALS)
    return blocks, -(-count // blocks)


def warps(threads: int = THREADS) -> int:
    """As many as have that many threads, or one."""
    return max(1, threads // warp_size())


@triton.jit(do_not_specialize=["programs"])
def add_partials_kernel(p_partials, p_sums, programs, BLOCK: tl.constexpr):
    """Program i adds row i of `partials` [2B, programs], in the order of its columns modulo BLOCK, into sums[i]."""
    row = tl.program_id(0).to(tl.int64)
    p_partials += row * programs
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        o = start + tl.arange(0, BLOCK)
        total += tl.load(p_partials + o, mask=o < programs, other=0.0)
    tl.store(p_sums + row, tl.sum(total))


def new_partials(sums: torch.Tensor, programs: int) -> torch.Tensor:
    """The buffer for partial sums: `sums` itself where one program per sample leaves nothing to add."""
    return sums if programs == 1 else sums.new_empty((sums.shape[0], 2, programs))


def add_partials(partials: torch.Tensor, sums: torch.Tensor) -> None:
    """Adds `partials` [B, 2, programs] into `sums` [B, 2]."""
    if partials is not sums:
        add_partials_kernel[(sums.numel(),)](
            partials, sums, partials.shape[2], BLOCK=1024, num_warps=warps(128), enable_fp_fusion=True
        )
