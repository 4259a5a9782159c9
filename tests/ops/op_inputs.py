"""Shapes, dtypes and views that every op is tested with."""

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


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, of which the last two dimensions lie the other way round in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def first_tokens(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, cut from a longer sequence."""
    return torch.cat((t, torch.full_like(t, 99.0)), 1)[:, : t.shape[1]]


def channels(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, cut from wider tokens."""
    return torch.cat((torch.full_like(t, 99.0), t, torch.full_like(t, 99.0)), -1)[..., t.shape[-1] : 2 * t.shape[-1]]


def every_other(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, with a gap after each."""
    return t.repeat_interleave(2, -1)[..., ::2]


def offset(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element away from an aligned address."""
    return torch.cat((t.new_full((1,), 99.0), t.flatten()))[1:].view(t.shape)


def one_for_all(t: torch.Tensor) -> torch.Tensor:
    """The first sample's numbers for every sample, at a distance of 0."""
    return t[:1].expand(t.shape)


VIEWS = [transposed, first_tokens, channels, every_other, offset, one_for_all]


def far_apart(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, each sample 2³⁰ elements from the one before: the distance fits 32 bits, twice it does not.

    Of these gigabytes of addresses a few KB are used.
    """
    distance = 2**30
    size = (t.shape[0] - 1) * distance + t[0].numel()
    if t.is_cpu:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = torch.frombuffer(mmap.mmap(-1, t.element_size() * size, flags=flags), dtype=t.dtype)
    else:
        memory = torch.empty(size, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, (distance, *t[0].contiguous().stride())).copy_(t)
