"""Shared by the ops that hold whole rows in registers: a tile's rows, cut into chunks.

    row: [D]        tile: a tuple of CHUNKS tensors [ROWS, BLOCK]        CHUNKS · BLOCK ≥ D, the rest is masked

Triton's tensors have powers of two as sizes. In one tensor of 4096, a row of 3072 would leave a quarter of the lanes
idle, and a row of 5120 in one of 8192 three eighths. Three chunks of 1024 and five of 1024 leave none. Counted on sm_90
for ada_layer_norm in bf16, as loads in flight per multiprocessor: 48 KB against 30 for 3072 channels, and 50 against 20
for 5120.
"""

from __future__ import annotations

import functools

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _samples
from omni_kernels.ops._triton import tl, triton

# Two and four chunks would have the size of one. With more than five, a thread would need too many registers.
COUNTS = (1, 3, 5)
# Narrower chunks are not used: short rows share a program, and no model's states are that narrow.
MIN_CHUNK = 512


@functools.lru_cache(maxsize=256)
def chunks(D: int) -> tuple[int, int]:
    """The number of chunks of a row, and their size: as few idle lanes as possible, then as few chunks as possible."""
    sizes = ((count, max(_samples.MIN_WIDTH, triton.next_power_of_2(-(-D // count)))) for count in COUNTS)
    return min((size for size in sizes if size[0] == 1 or size[1] >= MIN_CHUNK), key=lambda size: size[0] * size[1])


def cut(x: torch.Tensor, tokens: int, tile: int, *others: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Rows of a tile, chunks of a row, channels of a chunk (a power of two), and warps.

    Args:
        x: [..., D].
        tokens: how many rows there are.
        tile: elements of a tile. There are as many rows as make so many, at least one.
        others: further tensors of which a program holds rows. In chunks, a thread has 16 bytes of the widest dtype.
    """
    D = x.shape[-1]
    count, block = (1, max(_samples.MIN_WIDTH, triton.next_power_of_2(D))) if limits.here(x) else chunks(D)
    fitting = max(1, tile // (count * block))
    rows = min(1 << (fitting.bit_length() - 1), triton.next_power_of_2(tokens))
    if count == 1:
        return rows, 1, block, _samples.warps(max(_samples.THREADS, block // 16))
    return rows, count, block, _samples.warps(rows * block * widest(x, *others) // 16)


def widest(*tensors: torch.Tensor | None) -> int:
    """The bytes of the widest dtype of these tensors."""
    return max(t.dtype.itemsize for t in tensors if t is not None)


@triton.jit
def columns(chunk: tl.constexpr, BLOCK: tl.constexpr):
    """The channels [1, BLOCK] of a chunk."""
    return chunk * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_rows(p, o_row, m_row, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows at o_row, in their dtype; masked elements are 0. None if p is None."""
    rows = None
    if p is not None:
        rows = ()
        for c in tl.static_range(CHUNKS):
            o_d = columns(c, BLOCK)
            rows += (tl.load(p + o_row + o_d, mask=m_row & (o_d < D), other=0.0),)
    return rows


@triton.jit
def load_vector(p, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """A vector [D] for all rows, in its dtype; masked elements are 0. None if p is None."""
    vector = None
    if p is not None:
        vector = ()
        for c in tl.static_range(CHUNKS):
            o_d = columns(c, BLOCK)
            vector += (tl.load(p + o_d, mask=o_d < D, other=0.0),)
    return vector


@triton.jit
def store_rows(p, o_row, rows, m_row, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Store the rows at o_row, rounded to p's dtype."""
    for c in tl.static_range(CHUNKS):
        o_d = columns(c, BLOCK)
        tl.store(p + o_row + o_d, rows[c].to(p.dtype.element_ty), mask=m_row & (o_d < D))


@triton.jit
def in_fp32(rows, CHUNKS: tl.constexpr):
    """The rows in fp32."""
    wide = ()
    for c in tl.static_range(CHUNKS):
        wide += (rows[c].to(tl.float32),)
    return wide


@triton.jit
def sum_rows(rows, CHUNKS: tl.constexpr):
    """The sum of each row, [ROWS, 1]."""
    total = rows[0]
    for c in tl.static_range(1, CHUNKS):
        total += rows[c]
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit
def sum_squares(rows, CHUNKS: tl.constexpr):
    """The sum of the squares of each row, [ROWS, 1]."""
    total = rows[0] * rows[0]
    for c in tl.static_range(1, CHUNKS):
        total += rows[c] * rows[c]
    return tl.sum(total, axis=1, keep_dims=True)
