"""Fused blocks of FLUX.2: 8 launches (double) and 4 (single) besides GEMMs and attention; diffusers' take 80 and 42.

Double blocks have separate streams for text and image, joined in attention. Single blocks have one stream for both,
and one projection for queries, keys, values and the feed-forward's input. All blocks of a kind share one modulation,
which the model passes in. Everything between two GEMMs is one op, including the end of a block with the beginning of
the next (`ahead`; the first block of a kind takes 2 more launches, or 1). Projections are called as modules, so
adapters, quantised layers and hooks on them keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching import ahead
from omni_kernels.patching.activations import for_layers, project
from omni_kernels.patching.layers import (
    States,
    added_projections,
    attend,
    clipped,
    for_each,
    joint_attention,
    normed_and_rotated,
    projections,
    real_rotation,
)
from omni_kernels.patching.structure import (
    attends,
    computes,
    not_plain_attention,
    not_plain_layer_norm,
    not_plain_rms_norm,
    part,
    stands,
    unlike,
)

#: The modules that the fused forwards replace, so do not call: path → class name.
DOUBLE_STANDS_FOR = {
    "norm1": "LayerNorm",
    "norm1_context": "LayerNorm",
    "norm2": "LayerNorm",
    "norm2_context": "LayerNorm",
    "attn": "Flux2Attention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "attn.norm_added_q": "RMSNorm",
    "attn.norm_added_k": "RMSNorm",
    "ff": "Flux2FeedForward",
    "ff.act_fn": "Flux2SwiGLU",
    "ff.act_fn.gate_fn": "SiLU",
    "ff_context": "Flux2FeedForward",
    "ff_context.act_fn": "Flux2SwiGLU",
    "ff_context.act_fn.gate_fn": "SiLU",
}
SINGLE_STANDS_FOR = {
    "norm": "LayerNorm",
    "attn": "Flux2ParallelSelfAttention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "attn.mlp_act_fn": "Flux2SwiGLU",
    "attn.mlp_act_fn.gate_fn": "SiLU",
}
DOUBLE_PROCESSOR, SINGLE_PROCESSOR = "Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"

#: Cosines and sines, [S, Dh] each, for the text's tokens and then the image's.
Tables = tuple[torch.Tensor, torch.Tensor]


def double_unfit(block: torch.nn.Module) -> str | None:
    """Why `double_forward` cannot replace this block's own forward; None if it can."""
    reason = (
        unlike(block, DOUBLE_STANDS_FOR)
        or not_plain_layer_norm(block, "norm1", "norm1_context", "norm2", "norm2_context")
        or not_plain_attention(block, "attn", DOUBLE_PROCESSOR)
    )
    if reason is not None:
        return reason
    attn = part(block, "attn")
    if attn.fused_projections:
        return "attn has fused projections"
    return not_plain_rms_norm(block, attn.head_dim, "attn.norm_q", "attn.norm_k") or not_plain_rms_norm(
        block, attn.head_dim, "attn.norm_added_q", "attn.norm_added_k"
    )


def single_unfit(block: torch.nn.Module) -> str | None:
    """Why `single_forward` cannot replace this block's own forward; None if it can."""
    return (
        unlike(block, SINGLE_STANDS_FOR)
        or not_plain_layer_norm(block, "norm")
        or not_plain_attention(block, "attn", SINGLE_PROCESSOR)
        or not_plain_rms_norm(block, part(block, "attn").head_dim, "attn.norm_q", "attn.norm_k")
    )


def double_forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb_mod_img: torch.Tensor,
    temb_mod_txt: torch.Tensor,
    image_rotary_emb: Tables | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image), the same as from the block's own forward. Falls back to it in cases that are not covered here."""
    x, text, mod, t_mod = hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt
    if (
        joint_attention_kwargs
        or not computes(x, text, mod, t_mod, beside=image_rotary_emb or ())
        or len(text) not in (1, len(x))
        or not _modulates(mod, x)
        or not _modulates(t_mod, x, text.shape[1])
        or block.attn.fused_projections
        or not attends(block.attn, DOUBLE_PROCESSOR)
        or not stands(block, DOUBLE_STANDS_FOR)
    ):
        return NotImplemented
    T, run, text = text.shape[1], ops.trusted(x), for_each(x, text)
    shift1, scale1, gate1, shift2, scale2, gate2 = _parts(mod, 6)
    t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = _parts(t_mod, 6)

    attended_text, attended = joint_attention(
        block.attn,
        _begin(block, "norm1", x, mod, scale1, shift1),
        _begin(block, "norm1_context", text, t_mod, t_scale1, t_shift1),
        real_rotation(image_rotary_emb, T),
        real_rotation(image_rotary_emb, 0, T),
    )
    h, y = for_layers(
        (block.ff.linear_in,), run.gate_residual_norm, x, attended, gate1, scale2, shift2, eps=block.norm2.eps
    )
    t_h, t_y = for_layers(
        (block.ff_context.linear_in,), run.gate_residual_norm,
        text, attended_text, t_gate1, t_scale2, t_shift2, eps=block.norm2_context.eps,
    )  # fmt: skip
    fed, t_fed = _feed_forward(block.ff, y), _feed_forward(block.ff_context, t_y)
    following = _next_of(block, x)
    h = _end(following, "norm1", h, fed, gate2, mod, scale1, shift1)
    t_h = _end(following, "norm1_context", t_h, t_fed, t_gate2, t_mod, t_scale1, t_shift1)
    return clipped(t_h), h


def single_forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    temb_mod: torch.Tensor,
    image_rotary_emb: Tables | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Same as the block's own forward. Falls back to it in cases that are not covered here."""
    x, text, mod = hidden_states, encoder_hidden_states, temb_mod
    given = (x, mod) if text is None else (x, mod, text)
    if (
        joint_attention_kwargs
        or not computes(*given, beside=image_rotary_emb or ())
        or not _modulates(mod, x, x.shape[1] + (0 if text is None else text.shape[1]))
        or not attends(block.attn, SINGLE_PROCESSOR)
        or not stands(block, SINGLE_STANDS_FOR)
    ):
        return NotImplemented
    if text is not None:
        text_seq_len, x = text.shape[1], torch.cat([text, x], 1)
    shift, scale, gate = _parts(mod, 3)
    y = _begin(block, "norm", x, mod, scale, shift)
    out = _attention_and_feed_forward(block.attn, y, image_rotary_emb)
    following = None if split_hidden_states else _next_of(block, x)
    h = clipped(_end(following, "norm", x, out, gate, mod, scale, shift))
    return (h[:, :text_seq_len], h[:, text_seq_len:]) if split_hidden_states else h


def _attention_and_feed_forward(attn: Any, x: States, tables: Tables | None) -> torch.Tensor:
    """Both of a single block, from its one input projection to its one output projection."""
    projected = project(attn.to_qkv_mlp_proj, x)
    run = ops.trusted(projected)
    # With tensor parallelism, each rank has a part of every section, so the sections keep their ratio.
    qkv, fed = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
    qkv = projected.shape[-1] * qkv // (qkv + fed)
    q, k, v = projected[..., :qkv].unflatten(-1, (3, -1, attn.head_dim)).unbind(2)
    gate, up = projected[..., qkv:].chunk(2, -1)
    q, k = normed_and_rotated(attn, q, k, real_rotation(tables))
    attended = attend(attn.processor, q, k, v)
    D = attended.shape[2]
    both = attended.new_empty((*attended.shape[:2], D + gate.shape[2]))
    both[..., :D].copy_(attended)
    run.swiglu(gate, up, out=both[..., D:])
    out: torch.Tensor = attn.to_out(both)
    return out


def _feed_forward(mlp: Any, x: States | None) -> torch.Tensor:
    gate, up = project(mlp.linear_in, x).chunk(2, -1)
    out: torch.Tensor = mlp.linear_out(for_layers((mlp.linear_out,), ops.trusted(gate).swiglu, gate, up))
    return out


def _modulates(given: torch.Tensor, x: torch.Tensor, tokens: int | None = None) -> bool:
    """Whether a projected timestep is [B or 1, n·D] or [B or 1, tokens or 1, n·D], for x [B, S, D]; tokens: S."""
    tokens = x.shape[1] if tokens is None else tokens
    return len(given) in (1, len(x)) and (given.dim() == 2 or given.shape[1] in (1, tokens))


def _parts(given: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """Shifts, scales and gates [B or 1, S or 1, D] of a projected timestep."""
    return (given.unsqueeze(1) if given.dim() == 2 else given).chunk(count, -1)


def _begin(
    block: Any, norm: str, x: torch.Tensor, given: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> States:
    """The output of a stream's first norm: what the block before has computed ahead, if anything."""
    made: States | None = ahead.take(x, block, (given,))
    if made is not None:
        return made
    run, layers = ops.trusted(x), _entrance(block, norm)
    found: States = for_layers(layers, run.ada_layer_norm, x, scale, shift, eps=block._modules[norm].eps)
    return found


def _entrance(block: Any, norm: str) -> Sequence[Any]:
    """The layers that take the output of a stream's first norm."""
    if norm == "norm":
        return (block.attn.to_qkv_mlp_proj,)
    return projections(block.attn) if norm == "norm1" else added_projections(block.attn)


def _next_of(block: Any, x: torch.Tensor) -> Any:
    """The block whose first norms are computed ahead, if any. In fp16, states are clipped before they are normed."""
    return None if x.dtype == torch.float16 else ahead.next_of(block, x)


def _end(
    following: Any,
    norm: str,
    x: torch.Tensor,
    fed: torch.Tensor,
    gate: torch.Tensor,
    given: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """The block's output of a stream. With a next block, which has the same modulation, computes its norm ahead."""
    if following is None:
        h, _ = ops.trusted(x).gate_residual_norm(x, fed, gate, norm=None)
        return h
    run, eps = ops.trusted(x), following._modules[norm].eps
    h, y = for_layers(_entrance(following, norm), run.gate_residual_norm, x, fed, gate, scale, shift, eps=eps)
    ahead.leave(h, following, (given,), y)
    return h
