"""Fused blocks of vLLM-Omni's models: its own block classes, which share their names with those of diffusers.

They differ in how attention is built. One packed layer makes queries, keys and values (`to_qkv`), sharded over the
ranks of tensor parallelism, and `attn` takes the joint sequence. Norms take scale and shift with them. As in the fused
blocks of diffusers, everything between two layers is one op, and queries, keys and values are written directly into the
joint sequence. Layers, the feed-forward and attention are called as modules, so its adapters, quantised layers and
attention backends keep working.

Under sequence parallelism, where text and image go to attention apart, the block's own forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.ops.qk_norm_rope import MAX_HEAD_SIZE
from omni_kernels.patching import ahead
from omni_kernels.patching.layers import Rotation, clipped, complex_rotation, for_each, modulations
from omni_kernels.patching.structure import computes, not_plain_rms_norm, part, stands, unlike

#: The modules of a Qwen-Image block that the fused forward replaces, so does not call: path → class name.
QWEN_IMAGE = {
    "img_norm1": "AdaLayerNorm",
    "img_norm1.layernorm": "LayerNorm",
    "img_norm2": "AdaLayerNorm",
    "img_norm2.layernorm": "LayerNorm",
    "txt_norm1": "AdaLayerNorm",
    "txt_norm1.layernorm": "LayerNorm",
    "txt_norm2": "AdaLayerNorm",
    "txt_norm2.layernorm": "LayerNorm",
    "attn": "QwenImageCrossAttention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "attn.norm_added_q": "RMSNorm",
    "attn.norm_added_k": "RMSNorm",
    "attn.rope": "RotaryEmbedding",
}


def qwen_image_unfit(block: torch.nn.Module) -> str | None:
    """Why `qwen_image_forward` cannot replace this block's own forward; None if it can."""
    reason = unlike(block, QWEN_IMAGE)
    if reason is not None:
        return reason
    for path in (path for path in QWEN_IMAGE if path.endswith("layernorm")):
        norm = part(block, path)
        if norm.weight is not None or norm.bias is not None or len(norm.normalized_shape) != 1:
            return f"{path} has weights or normalises several dimensions"
    attn = part(block, "attn")
    size = attn.head_dim
    if not _rotates_pairs(part(block, "attn.rope")):
        return "attn.rope does not rotate pairs by tables of half a head"
    if _metadata(attn) is None:
        return "its attention knows no AttentionMetadata"
    return (
        _unfit_heads(size)
        or not_plain_rms_norm(block, size, "attn.norm_q", "attn.norm_k")
        or not_plain_rms_norm(block, size, "attn.norm_added_q", "attn.norm_added_k")
    )


def qwen_image_forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: torch.Tensor | None = None,
    hidden_states_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image), the same as from the block's own forward. Falls back to it in cases that are not covered here."""
    x, text, index = hidden_states, encoder_hidden_states, modulate_index
    ranks = getattr(block.attn.parallel_config, "sequence_parallel_size", 1) or 1
    if (
        ranks > 1
        or text.shape[0] not in (1, x.shape[0])
        or (index is not None and not isinstance(index, torch.Tensor))
        or not computes(x, text, temb)
        or not stands(block, QWEN_IMAGE)
    ):
        return NotImplemented
    run, text = ops.trusted(x), for_each(x, text)
    (_, _, gate1, shift2, scale2, gate2), y = _begin(block, "img", x, temb, index)
    (_, _, t_gate1, t_shift2, t_scale2, t_gate2), t_y = _begin(block, "txt", text, temb)
    attended_text, attended = _joint_attention(
        block.attn, y, t_y, *image_rotary_emb, hidden_states_mask, encoder_hidden_states_mask
    )
    h, z = run.gate_residual_norm(x, attended, gate1, scale2, shift2, index=index, eps=block.img_norm2.eps)
    t_h, t_z = run.gate_residual_norm(text, attended_text, t_gate1, t_scale2, t_shift2, eps=block.txt_norm2.eps)
    h = _end(block, "img", h, block.img_mlp(z), gate2, temb, index)
    t_h = _end(block, "txt", t_h, block.txt_mlp(t_z), t_gate2, temb)
    return t_h, h


def _begin(
    block: Any, stream: str, x: torch.Tensor, temb: torch.Tensor, index: torch.Tensor | None = None
) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """A stream's modulation (shift, scale and gate, for attention and feed-forward), and the output of its first norm.

    Uses what the block before has computed ahead, if anything.
    """
    made: tuple[Sequence[torch.Tensor], torch.Tensor] | None = ahead.take(x, block, (temb, index))
    if made is not None:
        return made
    modulation = _modulation(block, stream, temb, index)
    shift, scale, *_ = modulation
    eps = getattr(block, f"{stream}_norm1").eps
    return modulation, ops.trusted(x).ada_layer_norm(x, scale, shift, index=index, eps=eps)


def _end(
    block: Any,
    stream: str,
    x: torch.Tensor,
    fed: torch.Tensor,
    gate: torch.Tensor,
    temb: torch.Tensor,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """The block's output of a stream. Also computes the next block's modulation and first norm ahead, if possible."""
    # In fp16 the states must be clipped before the next norm, so nothing is computed ahead.
    following = None if x.dtype == torch.float16 else ahead.next_of(block, x, f"{stream}_mod")
    run = ops.trusted(x)
    if following is None:
        h, _ = run.gate_residual_norm(x, fed, gate, index=index, norm=None)
        return clipped(h)
    modulation = _modulation(following, stream, temb, index)
    shift, scale, *_ = modulation
    eps = getattr(following, f"{stream}_norm1").eps
    h, y = run.gate_residual_norm(x, fed, gate, scale, shift, index=index, eps=eps)
    ahead.leave(h, following, (temb, index), (modulation, y))
    return h


def _modulation(block: Any, stream: str, temb: torch.Tensor, index: torch.Tensor | None) -> Sequence[torch.Tensor]:
    if stream == "txt" and block.zero_cond_t:
        temb = temb.chunk(2, 0)[0]
    return modulations(getattr(block, f"{stream}_mod")(temb), 6, index)


def _joint_attention(
    attn: Any,
    x: torch.Tensor,
    text: torch.Tensor,
    freqs: torch.Tensor,
    text_freqs: torch.Tensor,
    mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of both streams, the text first, with the output layers. Returns (text, image).

    Args:
        freqs, text_freqs: complex64 [S, Dh/2].
        mask, text_mask: bool [B, S]; None: all tokens.
    """
    T, Dh, (B, S) = text.shape[1], attn.head_dim, x.shape[:2]
    heads, kv_heads = attn.query_num_heads, attn.kv_num_heads
    q, k, v = (x.new_empty((B, T + S, count, Dh)) for count in (heads, kv_heads, kv_heads))
    streams: tuple[tuple[Any, torch.Tensor, slice, Any, Any, Rotation], ...] = (
        (attn.add_kv_proj, text, slice(0, T), attn.norm_added_q, attn.norm_added_k, complex_rotation(text_freqs)),
        (attn.to_qkv, x, slice(T, None), attn.norm_q, attn.norm_k, complex_rotation(freqs)),
    )
    for packed, states, place, norm_q, norm_k, rotation in streams:
        made, _ = packed(states)
        own_q, own_k, own_v = made.unflatten(-1, (-1, Dh)).split([heads, kv_heads, kv_heads], 2)
        ops.trusted(x).qk_norm_rope(
            own_q, own_k, own_v, q[:, place], k[:, place], v[:, place], **rotation,
            q_weight=norm_q.weight, k_weight=norm_k.weight, eps=norm_q.eps,
        )  # fmt: skip
    metadata = None
    if mask is not None or text_mask is not None:
        masks = ((text_mask, text), (mask, x))
        all_ = [one if one is not None else t.new_ones(t.shape[:2], dtype=torch.bool) for one, t in masks]
        metadata = _metadata(attn)(attn_mask=torch.cat(all_, 1))
    joint = attn.attn(q, k, v, metadata).flatten(2, 3).to(x.dtype)
    return attn.to_add_out(joint[:, :T]), attn.to_out(joint[:, T:])


def _metadata(attn: Any) -> Any:
    """The class of what an attention passes to its backend; None if the attention's module has none."""
    return type(attn).forward.__globals__.get("AttentionMetadata")


#: The modules of a Z-Image block that the fused forward replaces.
Z_IMAGE = {
    "attention_norm1": "RMSNorm",
    "attention_norm2": "RMSNorm",
    "ffn_norm1": "RMSNorm",
    "ffn_norm2": "RMSNorm",
    "attention": "ZImageAttention",
    "attention.norm_q": "RMSNorm",
    "attention.norm_k": "RMSNorm",
    "attention.rope": "RotaryEmbedding",
}


def z_image_unfit(block: torch.nn.Module) -> str | None:
    """Why `z_image_forward` cannot replace this block's own forward; None if it can."""
    reason = unlike(block, Z_IMAGE) or _unfit_heads(part(block, "attention").head_dim)
    if reason is None and not _rotates_pairs(part(block, "attention.rope")):
        reason = "attention.rope does not rotate pairs by tables of half a head"
    return reason


def z_image_forward(
    block: Any,
    x: torch.Tensor,
    attn_mask: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    adaln_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same as the block's own forward, which takes no notice of the mask. Falls back to it where it must."""
    if not computes(x) or not stands(block, Z_IMAGE):
        return NotImplemented
    scale1 = gate1 = scale2 = gate2 = None
    tanh = bool(block.modulation)
    if tanh:
        scale1, gate1, scale2, gate2 = modulations(block.adaLN_modulation(adaln_input), 4)
    norm1, norm2, norm3, norm4 = block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2
    run = ops.trusted(x)
    y = run.ada_layer_norm(x, scale1, norm="rms", weight=norm1.weight, eps=norm1.variance_epsilon)
    h, y = run.gate_residual_norm(
        x, _self_attention(block.attention, y, cos, sin), gate1, scale2,
        x_weight=norm2.weight, x_eps=norm2.variance_epsilon,
        norm="rms", weight=norm3.weight, eps=norm3.variance_epsilon, gate_tanh=tanh,
    )  # fmt: skip
    h, _ = run.gate_residual_norm(
        h, block.feed_forward(y), gate2, x_weight=norm4.weight, x_eps=norm4.variance_epsilon, norm=None, gate_tanh=tanh
    )
    return h


def _self_attention(attn: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Self-attention of x [B, S, D] with its output layer. cos, sin: [S, Dh/2], or [B, S, Dh/2] of equal samples."""
    (B, S), Dh = x.shape[:2], attn.head_dim
    heads, kv_heads = attn.to_qkv.num_heads, attn.to_qkv.num_kv_heads
    made, _ = attn.to_qkv(x)  # a quantised layer may flatten batch and tokens
    own_q, own_k, v = made.view(B, S, -1, Dh).split([heads, kv_heads, kv_heads], 2)
    q, k = x.new_empty((B, S, heads, Dh)), x.new_empty((B, S, kv_heads, Dh))
    cos, sin = (table[0] if table.dim() == 3 else table for table in (cos, sin))
    ops.trusted(x).qk_norm_rope(
        own_q, own_k, None, q, k, None, freqs=torch.stack((cos, sin), -1).float(),
        q_weight=attn.norm_q.weight, k_weight=attn.norm_k.weight, eps=attn.norm_q.variance_epsilon,
    )  # fmt: skip
    attended = attn.attn(q, k, v).flatten(2, 3).to(x.dtype)
    out: torch.Tensor = attn.to_out[0](attended)
    return out.view(B, S, -1)


def _unfit_heads(size: int) -> str | None:
    if size % 2 or size > MAX_HEAD_SIZE:
        return f"heads have {size} channels; an even number up to {MAX_HEAD_SIZE} is needed"
    return None


def _rotates_pairs(rope: Any) -> bool:
    return rope.interleaved and rope.half_head_dim
