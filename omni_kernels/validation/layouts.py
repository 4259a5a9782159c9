"""How a tensor can lie in memory: functions that return the same numbers as a view of something larger or other.

What lies around them is `AROUND`, a number that shows where it is read.
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
    """The same numbers, of which the last two dimensions lie the other way round in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def heads_first(t: torch.Tensor) -> torch.Tensor:
    """The same numbers [B, S, H, Dh], in memory [B, H, S, Dh]."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def first_tokens(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, cut from a longer sequence."""
    return torch.cat((t, torch.full_like(t, AROUND)), 1)[:, : t.shape[1]]


def channels(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, cut from wider tokens."""
    around = torch.full_like(t, AROUND)
    return torch.cat((around, t, around), -1)[..., t.shape[-1] : 2 * t.shape[-1]]


def every_other(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, with a gap after each."""
    return t.repeat_interleave(2, -1)[..., ::2]


def offset(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element away from an aligned address."""
    return torch.cat((t.new_full((1,), AROUND), t.flatten()))[1:].view(t.shape)


def one_for_all(t: torch.Tensor) -> torch.Tensor:
    """The first sample's numbers for every sample, at a distance of 0."""
    return t[:1].expand(t.shape)


VIEWS: tuple[Layout, ...] = (transposed, first_tokens, channels, every_other, offset, one_for_all)
