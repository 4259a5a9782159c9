"""Fused blocks of Qwen-Image: 10 launches besides the GEMMs and attention, where diffusers' blocks take 75.

Text and image have separate streams that are joined in attention. Everything between two GEMMs is one op, including the
end of a block with the beginning of the next (`ahead`; the first block takes 2 more launches). Queries, keys and values
are written directly into the joint sequence. Projections, modulation and the feed-forward's output layer are called as
modules, so adapters, quantised layers and hooks on them keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching import ahead
from omni_kernels.patching.activations import for_layers
from omni_kernels.patching.layers import (
    States,
    added_projections,
    clipped,
    complex_rotation,
    entrance,
    feed_forward,
    for_each,
    joint_attention,
    modulations,
    projections,
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

#: The modules that the fused forward replaces, so does not call: path → class name.
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
    """Why `forward` cannot replace this block's own forward; None if it can."""
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
    """(text, image), the same as from the block's own forward. Falls back to it in cases that are not covered here."""
    x, text, index = hidden_states, encoder_hidden_states, modulate_index
    if (
        joint_attention_kwargs
        or text.shape[0] not in (1, x.shape[0])
        or not computes(x, text, temb)
        or not attends(block.attn, PROCESSOR)
        or not stands(block, STANDS_FOR)
    ):
        return NotImplemented
    run, text = ops.trusted(x), for_each(x, text)
    (_, _, gate1, shift2, scale2, gate2), y = _begin(block, "img", x, temb, index)
    (_, _, t_gate1, t_shift2, t_scale2, t_gate2), t_y = _begin(block, "txt", text, temb)

    mask = encoder_hidden_states_mask
    if mask is not None:
        mask = torch.cat([mask, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)], 1)[:, None, None, :]
    freqs, t_freqs = image_rotary_emb or (None, None)
    attended_text, attended = joint_attention(
        block.attn, y, t_y, complex_rotation(freqs), complex_rotation(t_freqs), mask
    )
    h, z = for_layers(
        entrance(block.img_mlp), run.gate_residual_norm,
        x, attended, gate1, scale2, shift2, index=index, eps=block.img_norm2.eps,
    )  # fmt: skip
    t_h, t_z = for_layers(
        entrance(block.txt_mlp), run.gate_residual_norm,
        text, attended_text, t_gate1, t_scale2, t_shift2, eps=block.txt_norm2.eps,
    )  # fmt: skip
    h = _end(block, "img", h, feed_forward(block.img_mlp, z), gate2, temb, index)
    t_h = _end(block, "txt", t_h, feed_forward(block.txt_mlp, t_z), t_gate2, temb)
    return t_h, h


def _begin(
    block: Any, stream: str, x: torch.Tensor, temb: torch.Tensor, index: torch.Tensor | None = None
) -> tuple[Sequence[torch.Tensor], States]:
    """A stream's modulation (shift, scale and gate, for attention and feed-forward), and the output of its first norm.

    Uses what the block before has computed ahead, if anything.
    """
    made = ahead.take(x, block, (temb, index))
    if made is not None:
        return made
    modulation = _modulation(block, stream, temb, index)
    shift, scale, *_ = modulation
    norm = getattr(block, f"{stream}_norm1")
    return modulation, for_layers(
        _entrance(block, stream), ops.trusted(x).ada_layer_norm, x, scale, shift, index=index, eps=norm.eps
    )


def _entrance(block: Any, stream: str) -> Sequence[Any]:
    """The layers that take the output of a stream's first norm."""
    return projections(block.attn) if stream == "img" else added_projections(block.attn)


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
    norm = getattr(following, f"{stream}_norm1")
    h, y = for_layers(
        _entrance(following, stream), run.gate_residual_norm, x, fed, gate, scale, shift, index=index, eps=norm.eps
    )
    ahead.leave(h, following, (temb, index), (modulation, y))
    return h


def _modulation(block: Any, stream: str, temb: torch.Tensor, index: torch.Tensor | None) -> Sequence[torch.Tensor]:
    if stream == "txt" and block.zero_cond_t:
        temb = temb.chunk(2, 0)[0]
    return modulations(getattr(block, f"{stream}_mod")(temb), 6, index)
