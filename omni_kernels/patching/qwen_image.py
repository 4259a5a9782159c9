"""Qwen-Image's blocks, fused: 12 launches beside the GEMMs and attention, where diffusers' takes 75.

Text and image have a stream each, and meet in attention. Everything between two GEMMs is one op; queries, keys and
values are written straight into the joint sequence. Projections, modulation and the feed-forward's output layer are
called as the modules that they are, so that adapters, quantised layers and hooks on them count.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching.layers import clipped, complex_rotation, feed_forward, joint_attention
from omni_kernels.patching.structure import (
    computes,
    not_plain_attention,
    not_plain_layer_norm,
    not_plain_rms_norm,
    not_tanh_gelu,
    part,
    stands,
    unlike,
)

#: The modules that are not called, by path, and their classes.
STANDS_FOR = {
    "img_norm1": "LayerNorm",
    "img_norm2": "LayerNorm",
    "txt_norm1": "LayerNorm",
    "txt_norm2": "LayerNorm",
    "attn": "Attention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "attn.norm_added_q": "RMSNorm",
    "attn.norm_added_k": "RMSNorm",
    "img_mlp": "FeedForward",
    "img_mlp.net.0": "GELU",
    "txt_mlp": "FeedForward",
    "txt_mlp.net.0": "GELU",
}
PROCESSOR = "QwenDoubleStreamAttnProcessor2_0"


def unfit(block: torch.nn.Module) -> str | None:
    """Why `forward` cannot stand in for this block's own; None where it can."""
    reason = unlike(block, STANDS_FOR) or not_plain_layer_norm(
        block, "img_norm1", "img_norm2", "txt_norm1", "txt_norm2"
    )
    if reason is not None:
        return reason
    size = part(block, "attn").inner_dim // part(block, "attn").heads
    return (
        not_plain_attention(block, "attn", PROCESSOR)
        or not_tanh_gelu(block, "img_mlp.net.0", "txt_mlp.net.0")
        or not_plain_rms_norm(block, size, "attn.norm_q", "attn.norm_k")
        or not_plain_rms_norm(block, size, "attn.norm_added_q", "attn.norm_added_k")
    )


def forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image), as the block's own forward returns them; where that differs, that is what runs."""
    x, text, index = hidden_states, encoder_hidden_states, modulate_index
    if (
        joint_attention_kwargs
        or not computes(x, text)
        or type(block.attn.processor).__name__ != PROCESSOR
        or not stands(block, STANDS_FOR)
    ):
        return type(block).forward(
            block, x, text, encoder_hidden_states_mask, temb, image_rotary_emb, joint_attention_kwargs, index
        )
    shift1, scale1, gate1, shift2, scale2, gate2 = block.img_mod(temb).chunk(6, -1)
    if block.zero_cond_t:
        temb = temb.chunk(2, 0)[0]
    t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = block.txt_mod(temb).chunk(6, -1)

    mask = encoder_hidden_states_mask
    if mask is not None:
        mask = torch.cat([mask, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)], 1)[:, None, None, :]
    freqs, t_freqs = image_rotary_emb or (None, None)
    attended_text, attended = joint_attention(
        block.attn,
        ops.ada_layer_norm(x, scale1, shift1, index=index, eps=block.img_norm1.eps),
        ops.ada_layer_norm(text, t_scale1, t_shift1, eps=block.txt_norm1.eps),
        complex_rotation(freqs),
        complex_rotation(t_freqs),
        mask,
    )
    h, y = ops.gate_residual_norm(x, attended, gate1, scale2, shift2, index=index, eps=block.img_norm2.eps)
    t_h, t_y = ops.gate_residual_norm(text, attended_text, t_gate1, t_scale2, t_shift2, eps=block.txt_norm2.eps)
    h, _ = ops.gate_residual_norm(h, feed_forward(block.img_mlp, y), gate2, index=index, norm=None)
    t_h, _ = ops.gate_residual_norm(t_h, feed_forward(block.txt_mlp, t_y), t_gate2, norm=None)
    return clipped(t_h), clipped(h)
