"""Qwen-Image's blocks, fused: 12 launches beside the GEMMs and attention, where diffusers' takes 75.

Text and image have a stream each, and meet in attention. Everything between two GEMMs is one op; queries, keys and
values are written straight into the joint sequence. Projections, modulation and the feed-forward's output layer are
called as the modules that they are, so that adapters, quantised layers and hooks on them count.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.ops.qk_norm_rope import MAX_HEAD_SIZE
from omni_kernels.patching.structure import (
    computes,
    dispatcher,
    not_plain_layer_norm,
    not_plain_rms_norm,
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
    attn = part(block, "attn")
    if type(attn.processor).__name__ != PROCESSOR:
        return f"attn.processor is {type(attn.processor).__name__}, not {PROCESSOR}"
    if dispatcher(attn.processor) is None:
        return f"{PROCESSOR} does not call dispatch_attention_fn"
    size = attn.inner_dim // attn.heads
    if size % 2 or size > MAX_HEAD_SIZE:
        return f"heads have {size} channels; an even number up to {MAX_HEAD_SIZE} is needed"
    for path in ("img_mlp.net.0", "txt_mlp.net.0"):
        if part(block, path).approximate != "tanh":
            return f"{path} has approximate={part(block, path).approximate!r}, not 'tanh'"
    return not_plain_rms_norm(block, size, "attn.norm_q", "attn.norm_k") or not_plain_rms_norm(
        block, size, "attn.norm_added_q", "attn.norm_added_k"
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

    attended_text, attended = _attention(
        block.attn,
        ops.ada_layer_norm(x, scale1, shift1, index=index, eps=block.img_norm1.eps),
        ops.ada_layer_norm(text, t_scale1, t_shift1, eps=block.txt_norm1.eps),
        encoder_hidden_states_mask,
        image_rotary_emb,
    )
    h, y = ops.gate_residual_norm(x, attended, gate1, scale2, shift2, index=index, eps=block.img_norm2.eps)
    t_h, t_y = ops.gate_residual_norm(text, attended_text, t_gate1, t_scale2, t_shift2, eps=block.txt_norm2.eps)
    h, _ = ops.gate_residual_norm(h, _feed_forward(block.img_mlp, y), gate2, index=index, norm=None)
    t_h, _ = ops.gate_residual_norm(t_h, _feed_forward(block.txt_mlp, t_y), t_gate2, norm=None)
    return _clipped(t_h), _clipped(h)


def _attention(
    attn: Any,
    x: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image) of the joint attention, through the dispatcher that the processor calls and its own settings."""
    (B, S, _), T = x.shape, text.shape[1]
    if mask is not None:
        mask = torch.cat([mask, torch.ones((B, S), dtype=torch.bool, device=x.device)], 1)[:, None, None, :]
    heads = (-1, attn.inner_dim // attn.heads)
    q, k, v = (projection(x).unflatten(-1, heads) for projection in (attn.to_q, attn.to_k, attn.to_v))
    t_q, t_k, t_v = (
        projection(text).unflatten(-1, heads) for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    )
    freqs, t_freqs = (None, None) if rotary is None else map(torch.view_as_real, rotary)
    joint = [t.new_empty((B, T + S, *t.shape[2:])) for t in (q, k, v)]
    ops.qk_norm_rope(
        t_q, t_k, t_v, *(t[:, :T] for t in joint), freqs=t_freqs,
        q_weight=attn.norm_added_q.weight, k_weight=attn.norm_added_k.weight, eps=attn.norm_added_q.eps,
    )  # fmt: skip
    ops.qk_norm_rope(
        q, k, v, *(t[:, T:] for t in joint), freqs=freqs,
        q_weight=attn.norm_q.weight, k_weight=attn.norm_k.weight, eps=attn.norm_q.eps,
    )  # fmt: skip
    j_q, j_k, j_v = joint
    attended = dispatcher(attn.processor)(
        j_q,
        j_k,
        j_v,
        attn_mask=mask,
        dropout_p=0.0,
        is_causal=False,
        backend=attn.processor._attention_backend,
        parallel_config=attn.processor._parallel_config,
    )
    attended = attended.flatten(2, 3).to(q.dtype)
    out = attended[:, T:].contiguous()
    for module in attn.to_out:
        out = module(out)
    return attn.to_add_out(attended[:, :T].contiguous()), out


def _feed_forward(mlp: Any, x: torch.Tensor | None) -> torch.Tensor:
    first, *others = mlp.net
    x = ops.gelu(first.proj(x))
    for module in others:
        x = module(x)
    return x


def _clipped(h: torch.Tensor) -> torch.Tensor:
    return h.clip(-65504, 65504) if h.dtype == torch.float16 else h
