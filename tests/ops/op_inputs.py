"""Shapes and dtypes that every op is tested with."""

import mmap

import torch

# fp32, fp16, bf16, and inputs that differ.
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
]
SHAPES = [(1,), (7,), (1, 7), (3, 5, 17), (2, 33, 129), (2, 3, 4, 5, 6)]
EMPTY = [(0, 4, 8), (2, 0, 8), (2, 3, 0), (0,)]


def far_apart(t: torch.Tensor) -> torch.Tensor:
    """A copy of `t` with samples 2³⁰ elements apart: this distance fits into 32 bits, twice the distance does not.

    The tensor spans gigabytes of addresses, of which a few KB are used.
    """
    distance = 2**30
    size = (t.shape[0] - 1) * distance + t[0].numel()
    if t.is_cpu:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = torch.frombuffer(mmap.mmap(-1, t.element_size() * size, flags=flags), dtype=t.dtype)
    else:
        memory = torch.empty(size, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, (distance, *t[0].contiguous().stride())).copy_(t)
