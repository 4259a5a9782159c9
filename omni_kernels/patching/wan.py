"""Fused blocks of Wan: 9 launches besides the GEMMs and attention, where diffusers' take 76; 11 and 85 with an image.

Video tokens attend to each other, then to the text and, in Wan 2.1's image-to-video models, to an image. q and k are
normalised over all heads of a token. The modulation is fp32, one for all tokens or one per token (Wan 2.2 TI2V).
Everything between two GEMMs is one op. Projections are called as modules, so adapters, quantised layers and hooks on
them keep working.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching.activations import for_layers, project
from omni_kernels.patching.layers import (
    States,
    attend,
    entrance,
    feed_forward,
    projections,
    real_rotation,
    self_attention,
    through,
    two_rows,
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
    "norm1": "FP32LayerNorm",
    "norm2": "FP32LayerNorm",
    "norm3": "FP32LayerNorm",
    "attn1": "WanAttention",
    "attn1.norm_q": "RMSNorm",
    "attn1.norm_k": "RMSNorm",
    "attn2": "WanAttention",
    "attn2.norm_q": "RMSNorm",
    "attn2.norm_k": "RMSNorm",
    "ffn": "FeedForward",
    "ffn.net.0": "GELU",
}
#: The same for a block that also attends to an image.
STANDS_FOR_WITH_IMAGE = STANDS_FOR | {"attn2.norm_added_k": "RMSNorm"}
PROCESSOR = "WanAttnProcessor"
#: Number of text tokens, which follow the image's tokens. diffusers' processor has the same constant.
TEXT_TOKENS = 512


def unfit(block: torch.nn.Module) -> str | None:
    """Why `forward` cannot replace this block's own forward; None if it can."""
    reason = unlike(block, STANDS_FOR)
    if reason is None and part(block, "attn2.add_k_proj") is not None:
        reason = unlike(block, STANDS_FOR_WITH_IMAGE)
    reason = reason or not_plain_layer_norm(block, "norm1", "norm3")
    if reason is not None:
        return reason
    for path in ("attn1", "attn2"):
        reason = reason or not_plain_attention(block, path, PROCESSOR)
        if reason is None and part(block, path).fused_projections:
            reason = f"{path} has fused projections"
    D = part(block, "attn1").inner_dim
    reason = reason or not_plain_rms_norm(block, D, "attn1.norm_q", "attn1.norm_k")
    for name in ("norm_q", "norm_k", "norm_added_k"):
        if part(block, f"attn2.{name}") is not None:
            reason = reason or not_plain_rms_norm(block, D, f"attn2.{name}")
    return reason or not_tanh_gelu(block, "ffn.net.0")


def forward(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Same as the block's own forward. Falls back to it if a module is hooked or a gradient is needed."""
    x, attn1, attn2, norm2 = hidden_states, block.attn1, block.attn2, block.norm2
    if (
        not computes(x, beside=(encoder_hidden_states, temb, *(rotary_emb or ())))
        or len(temb) not in (1, len(x))
        or attn1.fused_projections
        or attn2.fused_projections
        or not attends(attn1, PROCESSOR)
        or not attends(attn2, PROCESSOR)
        or not stands(block, STANDS_FOR if attn2.add_k_proj is None else STANDS_FOR_WITH_IMAGE)
    ):
        return NotImplemented
    # temb is [B, 6, D] or [B, S, 6, D]. The sum is fp32, whatever the dtypes of its terms.
    two = two_rows(temb) if temb.dim() == 4 and len(temb) == len(x) else None
    rows, index = (temb, None) if two is None else two
    modulation = rows + block.scale_shift_table.float()
    by_token = modulation.dim() == 4 or index is not None
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(-2) if by_token else modulation.chunk(6, -2)
    run = ops.trusted(x)
    tables = None if rotary_emb is None else tuple(t.flatten(0, 2) for t in rotary_emb)  # of [1, S, 1, Dh]

    normed = for_layers(projections(attn1), run.ada_layer_norm, x, scale1, shift1, index=index, eps=block.norm1.eps)
    attended = through(attn1.to_out, self_attention(attn1, normed, real_rotation(tables), across_heads=True))
    h, y = for_layers(
        (attn2.to_q,), run.gate_residual_norm,
        x, attended, gate1, index=index, weight=norm2.weight, bias=norm2.bias, eps=norm2.eps,
    )  # fmt: skip
    attended = through(attn2.to_out, _cross_attention(attn2, y, encoder_hidden_states))
    h, y = for_layers(
        entrance(block.ffn), run.gate_residual_norm, h, attended, None, scale2, shift2, index=index, eps=block.norm3.eps
    )
    h, _ = run.gate_residual_norm(h, feed_forward(block.ffn, y), gate2, index=index, norm=None)
    return h


def _cross_attention(attn: Any, x: States, context: torch.Tensor) -> torch.Tensor:
    """Attention of x [B, S, D] to the text's tokens, plus attention to the image's tokens if there is an image."""
    size = (attn.heads, -1)

    def normed(norm: Any, t: torch.Tensor) -> torch.Tensor:
        return ops.trusted(t).rms_norm(t, norm.weight, eps=norm.eps).unflatten(2, size)

    q = normed(attn.norm_q, project(attn.to_q, x))
    to_image = None
    if attn.add_k_proj is not None:
        tokens = context.shape[1] - TEXT_TOKENS
        image, context = context[:, :tokens], context[:, tokens:]
        k, v = normed(attn.norm_added_k, attn.add_k_proj(image)), attn.add_v_proj(image).unflatten(2, size)
        to_image = attend(attn.processor, q, k, v, across_ranks=False)
    k, v = normed(attn.norm_k, attn.to_k(context)), attn.to_v(context).unflatten(2, size)
    # Every rank has the whole text. diffusers does not use the parallel configuration here either.
    attended = attend(attn.processor, q, k, v, across_ranks=False)
    return attended if to_image is None else attended + to_image
