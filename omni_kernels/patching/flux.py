"""Fused blocks of FLUX: 12 launches (double) and 7 (single) besides GEMMs and attention; diffusers' take 80 and 42.

Double blocks have separate streams for text and image, joined in attention. Single blocks have one stream for both,
and the feed-forward is parallel to attention. Everything between two GEMMs is one op. Projections, modulation and
output layers are called as modules, so adapters, quantised layers and hooks on them keep working.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching.activations import for_layers, project
from omni_kernels.patching.layers import (
    added_projections,
    beside,
    clipped,
    entrance,
    feed_forward,
    for_each,
    joint_attention,
    modulations,
    projections,
    real_rotation,
    self_attention,
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
    "attn": "FluxAttention",
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
    "attn": "FluxAttention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "act_mlp": "GELU",
}
PROCESSOR = "FluxAttnProcessor"

#: Cosines and sines, [S, Dh] each, for the text's tokens and then the image's.
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
    return (
        _unfit_attention(block, "attn.norm_q", "attn.norm_k")
        or not_plain_rms_norm(block, part(block, "attn").head_dim, "attn.norm_added_q", "attn.norm_added_k")
        or not_tanh_gelu(block, "ff.net.0", "ff_context.net.0")
    )


def single_unfit(block: torch.nn.Module) -> str | None:
    """Why `single_forward` cannot replace this block's own forward; None if it can."""
    return (
        unlike(block, SINGLE_STANDS_FOR)
        or not_plain_layer_norm(block, "norm.norm")
        or _unfit_attention(block, "attn.norm_q", "attn.norm_k")
        or not_tanh_gelu(block, "act_mlp")
    )


def _unfit_attention(block: torch.nn.Module, *norms: str) -> str | None:
    reason = not_plain_attention(block, "attn", PROCESSOR)
    if reason is None and part(block, "attn").fused_projections:
        return "attn has fused projections"
    return reason or not_plain_rms_norm(block, part(block, "attn").head_dim, *norms)


def double_forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Tables | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image), the same as from the block's own forward. Falls back to it in cases that are not covered here."""
    x, text = hidden_states, encoder_hidden_states
    if joint_attention_kwargs or not _serves(block, DOUBLE_STANDS_FOR, image_rotary_emb, x, text, temb):
        return NotImplemented
    norm1, t_norm1, run = block.norm1, block.norm1_context, ops.trusted(x)
    text = for_each(x, text)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulations(norm1.linear(norm1.silu(temb)), 6)
    t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = modulations(t_norm1.linear(t_norm1.silu(temb)), 6)

    T = text.shape[1]
    attended_text, attended = joint_attention(
        block.attn,
        for_layers(projections(block.attn), run.ada_layer_norm, x, scale1, shift1, eps=norm1.norm.eps),
        for_layers(added_projections(block.attn), run.ada_layer_norm, text, t_scale1, t_shift1, eps=t_norm1.norm.eps),
        real_rotation(image_rotary_emb, T),
        real_rotation(image_rotary_emb, 0, T),
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
    return clipped(t_h), h


def single_forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Tables | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image), the same as from the block's own forward. Falls back to it in cases that are not covered here."""
    x, text = hidden_states, encoder_hidden_states
    if joint_attention_kwargs or not _serves(block, SINGLE_STANDS_FOR, image_rotary_emb, x, text, temb):
        return NotImplemented
    norm, T, run = block.norm, text.shape[1], ops.trusted(x)
    shift, scale, gate = modulations(norm.linear(norm.silu(temb)), 3)
    joint = torch.cat([text, x], 1)
    layers = projections(block.attn, block.proj_mlp)
    y = for_layers(layers, run.ada_layer_norm, joint, scale, shift, eps=norm.norm.eps)
    attended = self_attention(block.attn, y, real_rotation(image_rotary_emb))
    out = block.proj_out(beside(attended, project(block.proj_mlp, y)))
    h, _ = run.gate_residual_norm(joint, out, gate, norm=None)
    h = clipped(h)
    return h[:, :T], h[:, T:]


def _serves(
    block: Any, parts: dict[str, str], tables: Tables | None, x: torch.Tensor, text: torch.Tensor, temb: torch.Tensor
) -> bool:
    attn = block.attn
    return (
        computes(x, text, temb, beside=tables or ())
        and len(text) in (1, len(x))
        and len(temb) in (1, len(x))
        and attends(attn, PROCESSOR)
        and not attn.fused_projections
        and stands(block, parts)
    )
