"""Fused blocks of LTX-Video: 9 launches besides the GEMMs and attention, where diffusers' take 75.

Video tokens attend to each other, then to the text. q and k are normalised over all heads of a token, and every head
has its own angles. The norms before attention and feed-forward are RMSNorms without weights; none is before the text.
The modulation is one for all tokens, or one per token (image to video). Everything between two GEMMs is one op.
Projections are called as modules, so adapters, quantised layers and hooks on them keep working.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching.activations import for_layers
from omni_kernels.patching.layers import attend, entrance, feed_forward, projections, self_attention, through, two_rows
from omni_kernels.patching.structure import (
    attends,
    computes,
    not_plain_attention,
    not_plain_rms_norm,
    not_tanh_gelu,
    part,
    stands,
    unlike,
)

#: The modules that the fused forward replaces, so does not call: path → class name.
STANDS_FOR = {
    "norm1": "RMSNorm",
    "norm2": "RMSNorm",
    "attn1": "LTXAttention",
    "attn1.norm_q": "RMSNorm",
    "attn1.norm_k": "RMSNorm",
    "attn2": "LTXAttention",
    "attn2.norm_q": "RMSNorm",
    "attn2.norm_k": "RMSNorm",
    "ff": "FeedForward",
    "ff.net.0": "GELU",
}
PROCESSOR = "LTXVideoAttnProcessor"


def unfit(block: torch.nn.Module) -> str | None:
    """Why `forward` cannot replace this block's own forward; None if it can."""
    reason = unlike(block, STANDS_FOR)
    if reason is not None:
        return reason
    for path in ("norm1", "norm2"):
        if getattr(part(block, path), "bias", None) is not None:
            return f"{path} has a bias"
    for path in ("attn1", "attn2"):
        attn = part(block, path)
        reason = reason or not_plain_attention(block, path, PROCESSOR)
        if reason is None and attn.fused_projections:
            reason = f"{path} has fused projections"
        if reason is None and attn.inner_kv_dim != attn.inner_dim:
            reason = f"{path} has {attn.inner_kv_dim} channels of keys and {attn.inner_dim} of queries"
    D = part(block, "attn1").inner_dim
    reason = reason or not_plain_rms_norm(block, D, "attn1.norm_q", "attn1.norm_k")
    for path in ("attn2.norm_q", "attn2.norm_k"):
        reason = reason or not_plain_rms_norm(block, D, path)
    return reason or not_tanh_gelu(block, "ff.net.0")


def forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same as the block's own forward. Falls back to it if a module is hooked or a gradient is needed."""
    x, attn1, attn2, table = hidden_states, block.attn1, block.attn2, block.scale_shift_table
    tables = image_rotary_emb or ()
    if (
        not computes(x, encoder_hidden_states, temb, table, beside=tables)
        or len(encoder_hidden_states) != len(x)
        or len(temb) != len(x)
        or (temb.shape[1] != 1 and temb.shape[1] != x.shape[1])
        or any(t.shape != (len(x), x.shape[1], attn1.inner_dim) for t in tables)
        or attn1.fused_projections
        or attn2.fused_projections
        or not attends(attn1, PROCESSOR)
        or not attends(attn2, PROCESSOR)
        or not stands(block, STANDS_FOR)
    ):
        return NotImplemented
    two = two_rows(temb) if temb.shape[1] > 1 else None
    rows, index = (temb, None) if two is None else two
    # [B, 1 or S, 6, D] or, with an index, [2B, 6, D]
    shift1, scale1, gate1, shift2, scale2, gate2 = (rows.unflatten(-1, (6, -1)) + table).unbind(-2)
    norm1, norm2, run = block.norm1, block.norm2, ops.trusted(x)
    rotation = {name: t.unflatten(2, (attn1.heads, -1)) for name, t in zip(("cos", "sin"), tables, strict=False)}

    normed = for_layers(
        projections(attn1), run.ada_layer_norm,
        x, scale1, shift1, index=index, norm="rms", weight=norm1.weight, eps=norm1.eps,
    )  # fmt: skip
    attended = through(attn1.to_out, self_attention(attn1, normed, rotation, across_heads=True))
    h, _ = run.gate_residual_norm(x, attended, gate1, index=index, norm=None)
    attended = through(attn2.to_out, _cross_attention(attn2, h, encoder_hidden_states, encoder_attention_mask))
    h, y = for_layers(
        entrance(block.ff), run.gate_residual_norm,
        h, attended, None, scale2, shift2, index=index, norm="rms", weight=norm2.weight, eps=norm2.eps,
    )  # fmt: skip
    h, _ = run.gate_residual_norm(h, feed_forward(block.ff, y), gate2, index=index, norm=None)
    return h


def _cross_attention(attn: Any, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of x [B, S, D] to the text's tokens, without the output layers."""
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, text.shape[1], len(text))
        mask = mask.view(len(text), attn.heads, -1, mask.shape[-1])
    size, run, norm_q, norm_k = (attn.heads, -1), ops.trusted(x), attn.norm_q, attn.norm_k
    q = run.rms_norm(attn.to_q(x), norm_q.weight, eps=norm_q.eps)
    k = run.rms_norm(attn.to_k(text), norm_k.weight, eps=norm_k.eps)
    v = attn.to_v(text)
    return attend(attn.processor, *(t.unflatten(2, size) for t in (q, k, v)), mask=mask)
