"""Fused blocks of HunyuanVideo: 12 launches (double) and 8 (single) besides GEMMs and attention, not 79 and 46.

Double blocks have separate streams for video and text, joined in attention. Single blocks have one stream for both, and
the feed-forward is parallel to attention. The video comes first, and only its queries and keys are rotated. Padding of
the text is masked. FramePack has the same classes; the blocks of HunyuanImage and HunyuanVideo 1.5 differ in their
attention processors alone. Everything between two GEMMs is one op. Projections, modulation and output layers are called
as modules, so adapters, quantised layers and hooks on them keep working.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from omni_kernels import ops
from omni_kernels.patching.activations import for_layers, project
from omni_kernels.patching.layers import (
    added_projections,
    attend,
    beside,
    entrance,
    feed_forward,
    for_each,
    joint_attention,
    modulations,
    projections,
    queries_keys_values,
    real_rotation,
)
from omni_kernels.patching.structure import (
    attends,
    computes,
    not_plain_attention,
    not_plain_layer_norm,
    not_plain_rms_norm,
    not_tanh_gelu,
    part,
    stands,
    unlike,
)

#: The modules that the fused forwards replace, so do not call: path → class name.
DOUBLE_STANDS_FOR = {
    "norm1": "AdaLayerNormZero",
    "norm1.norm": "LayerNorm",
    "norm1_context": "AdaLayerNormZero",
    "norm1_context.norm": "LayerNorm",
    "norm2": "LayerNorm",
    "norm2_context": "LayerNorm",
    "attn": "Attention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "attn.norm_added_q": "RMSNorm",
    "attn.norm_added_k": "RMSNorm",
    "ff": "FeedForward",
    "ff.net.0": "GELU",
    "ff_context": "FeedForward",
    "ff_context.net.0": "GELU",
}
SINGLE_STANDS_FOR = {
    "norm": "AdaLayerNormZeroSingle",
    "norm.norm": "LayerNorm",
    "attn": "Attention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "act_mlp": "GELU",
}
#: Class of a block → class of its attention processor.
PROCESSORS = {
    "HunyuanVideoTransformerBlock": "HunyuanVideoAttnProcessor2_0",
    "HunyuanVideoSingleTransformerBlock": "HunyuanVideoAttnProcessor2_0",
    "HunyuanImageTransformerBlock": "HunyuanImageAttnProcessor",
    "HunyuanImageSingleTransformerBlock": "HunyuanImageAttnProcessor",
    "HunyuanVideo15TransformerBlock": "HunyuanVideo15AttnProcessor2_0",
}

#: Cosines and sines, [S, Dh] each, for the video's tokens.
Tables = tuple[torch.Tensor, torch.Tensor]


def double_unfit(block: torch.nn.Module) -> str | None:
    """Why `double_forward` cannot replace this block's own forward; None if it can."""
    reason = unlike(block, DOUBLE_STANDS_FOR) or not_plain_layer_norm(
        block, "norm1.norm", "norm1_context.norm", "norm2", "norm2_context"
    )
    if reason is not None:
        return reason
    for path in ("norm1", "norm1_context"):
        if part(block, path).emb is not None:
            return f"{path} embeds timesteps and labels"
    for path in ("attn.add_q_proj", "attn.to_out", "attn.to_add_out"):
        if part(block, path) is None:
            return f"there is no {path}"
    attn = part(block, "attn")
    size = attn.inner_dim // attn.heads
    return (
        not_plain_attention(block, "attn", PROCESSORS[type(block).__name__])
        or not_plain_rms_norm(block, size, "attn.norm_q", "attn.norm_k")
        or not_plain_rms_norm(block, size, "attn.norm_added_q", "attn.norm_added_k")
        or not_tanh_gelu(block, "ff.net.0", "ff_context.net.0")
    )


def single_unfit(block: torch.nn.Module) -> str | None:
    """Why `single_forward` cannot replace this block's own forward; None if it can."""
    reason = unlike(block, SINGLE_STANDS_FOR) or not_plain_layer_norm(block, "norm.norm")
    if reason is not None:
        return reason
    for path in ("attn.add_q_proj", "attn.to_out", "attn.to_add_out"):
        if part(block, path) is not None:
            return f"there is an {path}"
    attn = part(block, "attn")
    return (
        not_plain_attention(block, "attn", PROCESSORS[type(block).__name__])
        or not_plain_rms_norm(block, attn.inner_dim // attn.heads, "attn.norm_q", "attn.norm_k")
        or not_tanh_gelu(block, "act_mlp")
    )


def double_forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    freqs_cis: Tables | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(video, text), the same as from the block's own forward. Falls back to it in cases that are not covered here."""
    x, text = hidden_states, encoder_hidden_states
    # HunyuanImage has another name for the tables.
    tables = kwargs.get("image_rotary_emb") if freqs_cis is None else freqs_cis
    if not _serves(block, DOUBLE_STANDS_FOR, tables, x, text, temb):
        return NotImplemented
    norm1, t_norm1, run = block.norm1, block.norm1_context, ops.trusted(x)
    text = for_each(x, text)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulations(norm1.linear(norm1.silu(temb)), 6)
    t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = modulations(t_norm1.linear(t_norm1.silu(temb)), 6)

    mask = attention_mask
    if type(block).__name__ == "HunyuanVideo15TransformerBlock":
        mask = None if mask is None else _pairs(mask, x.shape[1] + text.shape[1])
    attended_text, attended = joint_attention(
        block.attn,
        for_layers(projections(block.attn), run.ada_layer_norm, x, scale1, shift1, eps=norm1.norm.eps),
        for_layers(added_projections(block.attn), run.ada_layer_norm, text, t_scale1, t_shift1, eps=t_norm1.norm.eps),
        real_rotation(tables),
        {},
        mask,
        text_first=False,
    )
    h, y = for_layers(
        entrance(block.ff), run.gate_residual_norm, x, attended, gate1, scale2, shift2, eps=block.norm2.eps
    )
    t_h, t_y = for_layers(
        entrance(block.ff_context), run.gate_residual_norm,
        text, attended_text, t_gate1, t_scale2, t_shift2, eps=block.norm2_context.eps,
    )  # fmt: skip
    h, _ = run.gate_residual_norm(h, feed_forward(block.ff, y), gate2, norm=None)
    t_h, _ = run.gate_residual_norm(t_h, feed_forward(block.ff_context, t_y), t_gate2, norm=None)
    return h, t_h


def single_forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Tables | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(video, text), the same as from the block's own forward. Falls back to it in cases that are not covered here."""
    x, text = hidden_states, encoder_hidden_states
    if len(text) != len(x) or not _serves(block, SINGLE_STANDS_FOR, image_rotary_emb, x, text, temb):
        return NotImplemented
    norm, S, run = block.norm, x.shape[1], ops.trusted(x)
    shift, scale, gate = modulations(norm.linear(norm.silu(temb)), 3)
    joint = torch.cat([x, text], 1)
    layers = projections(block.attn, block.proj_mlp)
    y = for_layers(layers, run.ada_layer_norm, joint, scale, shift, eps=norm.norm.eps)
    q, k, v = queries_keys_values(block.attn, y, real_rotation(image_rotary_emb), rotated=S)
    attended = attend(block.attn.processor, q, k, v, mask=attention_mask)
    out = block.proj_out(beside(attended, project(block.proj_mlp, y)))
    h, _ = run.gate_residual_norm(joint, out, gate, norm=None)
    return h[:, :S], h[:, S:]


def _pairs(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which tokens attend to which, [B, 1, tokens, tokens], from which of the text's, the last ones, are no padding."""
    there = F.pad(mask, (tokens - mask.shape[1], 0), value=True).bool()
    return there[:, None, :, None] & there[:, None, None, :]


def _serves(
    block: Any, parts: dict[str, str], tables: Tables | None, x: torch.Tensor, text: torch.Tensor, temb: torch.Tensor
) -> bool:
    return (
        computes(x, text, temb, beside=tables or ())
        and len(text) in (1, len(x))
        and len(temb) in (1, len(x))
        and attends(block.attn, PROCESSORS[type(block).__name__])
        and stands(block, parts)
    )
