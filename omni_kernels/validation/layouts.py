"""Memory layouts of a tensor: functions that return the same values as a view of other or larger memory.

The memory around the values is filled with `AROUND`, which is noticed in a result if a kernel reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

AROUND = 99.0

Layout = Callable[[torch.Tensor], torch.Tensor]


def contiguous(t: torch.Tensor) -> torch.Tensor:
    """In order, without gaps."""
    return t.contiguous()


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same values, with the last two dimensions swapped in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def heads_first(t: torch.Tensor) -> torch.Tensor:
    """The same values [B, S, H, Dh], in memory [B, H, S, Dh]."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def first_tokens(t: torch.Tensor) -> torch.Tensor:
    """The same values, as a slice of a longer sequence."""
    return torch.cat((t, torch.full_like(t, AROUND)), 1)[:, : t.shape[1]]


def channels(t: torch.Tensor) -> torch.Tensor:
    """The same values, as a slice of wider tokens."""
    around = torch.full_like(t, AROUND)
    return torch.cat((around, t, around), -1)[..., t.shape[-1] : 2 * t.shape[-1]]


def every_other(t: torch.Tensor) -> torch.Tensor:
    """The same values, with a gap after each."""
    return t.repeat_interleave(2, -1)[..., ::2]


def offset(t: torch.Tensor) -> torch.Tensor:
    """The same values, one element off an aligned address."""
    return torch.cat((t.new_full((1,), AROUND), t.flatten()))[1:].view(t.shape)


def one_for_all(t: torch.Tensor) -> torch.Tensor:
    """The first sample's values for every sample, expanded with stride 0."""
    return t[:1].expand(t.shape)


VIEWS: tuple[Layout, ...] = (transposed, first_tokens, channels, every_other, offset, one_for_all)
