"""What the fused forwards of several models do alike: attention up to its output layers, and the feed-forward.

Queries, keys and values are normed and rotated by one op, which writes them where attention reads them. Attention runs
through the dispatcher that the block's processor calls, with that processor's backend and parallel configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching.structure import dispatcher

#: How `qk_norm_rope` is told to rotate: by `freqs`, by `cos` and `sin`, or not at all.
Rotation = Mapping[str, Any]


def complex_rotation(table: torch.Tensor | None) -> Rotation:
    """By a complex64 table [S, Dh/2] or [B, S, Dh/2]."""
    return {} if table is None else {"freqs": torch.view_as_real(table)}


def real_rotation(tables: Sequence[torch.Tensor] | None, start: int = 0, end: int | None = None) -> Rotation:
    """By tables of cosines and sines [S, Dh], for the tokens from `start` to `end`."""
    return {} if tables is None else {name: t[start:end] for name, t in zip(("cos", "sin"), tables, strict=True)}


def attend(
    processor: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    across_ranks: bool = True,
) -> torch.Tensor:
    """Attention of q [B, S, H, Dh] to k and v [B, T, H, Dh], as [B, S, H·Dh] in q's dtype.

    Args:
        mask: as the dispatcher takes it, broadcastable to [B, H, S, T].
        across_ranks: whether the processor's parallel configuration counts here.
    """
    attended = dispatcher(processor)(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config if across_ranks else None,
    )
    return attended.flatten(2, 3).to(q.dtype)


def self_attention(
    attn: Any,
    x: torch.Tensor,
    rotation: Rotation,
    mask: torch.Tensor | None = None,
    *,
    across_heads: bool = False,
) -> torch.Tensor:
    """Attention within x [B, S, D], before its output layers; with `across_heads`, q and k are normed so."""
    q, k, v = _heads(attn, x, attn.to_q, attn.to_k, attn.to_v)
    out = [t.new_empty(t.shape) for t in (q, k, v)]
    ops.qk_norm_rope(
        q, k, v, *out, **rotation, across_heads=across_heads,
        q_weight=attn.norm_q.weight, k_weight=attn.norm_k.weight, eps=attn.norm_q.eps,
    )  # fmt: skip
    return attend(attn.processor, *out, mask=mask)


def joint_attention(
    attn: Any,
    x: torch.Tensor,
    text: torch.Tensor,
    rotation: Rotation,
    text_rotation: Rotation,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image) of the attention of both streams, text first, to each other, with their output layers."""
    T = text.shape[1]
    q, k, v = _heads(attn, x, attn.to_q, attn.to_k, attn.to_v)
    t_q, t_k, t_v = _heads(attn, text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    joint = [t.new_empty((t.shape[0], T + t.shape[1], *t.shape[2:])) for t in (q, k, v)]
    ops.qk_norm_rope(
        t_q, t_k, t_v, *(t[:, :T] for t in joint), **text_rotation,
        q_weight=attn.norm_added_q.weight, k_weight=attn.norm_added_k.weight, eps=attn.norm_added_q.eps,
    )  # fmt: skip
    ops.qk_norm_rope(
        q, k, v, *(t[:, T:] for t in joint), **rotation,
        q_weight=attn.norm_q.weight, k_weight=attn.norm_k.weight, eps=attn.norm_q.eps,
    )  # fmt: skip
    attended = attend(attn.processor, *joint, mask=mask)
    out = through(attn.to_out, attended[:, T:].contiguous())
    return attn.to_add_out(attended[:, :T].contiguous()), out


def _heads(attn: Any, x: torch.Tensor, *projections: Any) -> Iterable[torch.Tensor]:
    size = attn.inner_dim // attn.heads  # under tensor parallelism a rank has some of the heads
    return (projection(x).unflatten(-1, (-1, size)) for projection in projections)


def feed_forward(mlp: Any, x: torch.Tensor | None) -> torch.Tensor:
    """A diffusers `FeedForward` whose activation is GELU's tanh approximation."""
    first, *others = mlp.net
    return through(others, ops.gelu(first.proj(x)))


def through(modules: Iterable[Any], x: torch.Tensor) -> torch.Tensor:
    """x through one module after the other."""
    for module in modules:
        x = module(x)
    return x


def clipped(h: torch.Tensor) -> torch.Tensor:
    """h within fp16's range, where that is its dtype."""
    return h.clip(-65504, 65504) if h.dtype == torch.float16 else h
