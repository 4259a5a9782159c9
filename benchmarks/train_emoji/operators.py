"""Attention and rotary embedding in plain real arithmetic, which torch.compile fuses; used while training."""

from __future__ import annotations

import torch

__all__ = ["plain_attention", "real_rotation"]


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **_: object
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for [batch, tokens, heads, d].

    At 31 tokens, the bf16 backward of the fused CPU kernel takes a third of an eager step: 0.97 s per 128 scenes
    against 0.60 s.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e4)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def real_rotation(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: [batch, tokens, heads, d], as complex numbers, times cosine + i sine, [tokens, 1, d/2] each."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cosine - second * sine, first * sine + second * cosine), -1)
    return rotated.flatten(-2).to(x.dtype)
