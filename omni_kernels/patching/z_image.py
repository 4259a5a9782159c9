"""Fused blocks of Z-Image: 5 launches besides the GEMMs and attention, where diffusers' blocks take 66.

A block has one stream, with RMSNorms before and after both attention and feed-forward. Modulation is a scale and the
tanh of a gate, without shift. The refiners use the same class; the context refiner's blocks have no modulation.
Projections and modulation are called as modules, so adapters, quantised layers and hooks on them keep working.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching.activations import for_layers, project
from omni_kernels.patching.layers import complex_rotation, modulations, projections, self_attention, through
from omni_kernels.patching.structure import (
    attends,
    computes,
    not_plain_attention,
    not_plain_rms_norm,
    part,
    stands,
    unlike,
)

#: The modules that the fused forward replaces, so does not call: path → class name.
STANDS_FOR = {
    "attention_norm1": "RMSNorm",
    "attention_norm2": "RMSNorm",
    "ffn_norm1": "RMSNorm",
    "ffn_norm2": "RMSNorm",
    "attention": "Attention",
    "attention.norm_q": "RMSNorm",
    "attention.norm_k": "RMSNorm",
    "feed_forward": "FeedForward",
}
PROCESSOR = "ZSingleStreamAttnProcessor"


def unfit(block: torch.nn.Module) -> str | None:
    """Why `forward` cannot replace this block's own forward; None if it can."""
    reason = unlike(block, STANDS_FOR)
    if reason is not None:
        return reason
    for path in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        if part(block, path) is None:
            return f"there is no {path}"
    attn = part(block, "attention")
    reason = not_plain_attention(block, "attention", PROCESSOR)
    for path in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        reason = reason or not_plain_rms_norm(block, attn.query_dim, path)
    return reason or not_plain_rms_norm(block, attn.inner_dim // attn.heads, "attention.norm_q", "attention.norm_k")


def forward(
    block: Any,
    x: torch.Tensor,
    attn_mask: torch.Tensor | None,
    freqs_cis: torch.Tensor | None,
    adaln_input: torch.Tensor | None = None,
    noise_mask: torch.Tensor | None = None,
    adaln_noisy: torch.Tensor | None = None,
    adaln_clean: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same as the block's own forward. Falls back to it if a module is hooked or a gradient is needed."""
    if not computes(x) or not attends(block.attention, PROCESSOR) or not stands(block, STANDS_FOR):
        return NotImplemented
    scale1 = gate1 = scale2 = gate2 = index = None
    tanh = bool(block.modulation)
    if tanh and noise_mask is not None:
        index = noise_mask != 1
        both = [block.adaLN_modulation(adaln_noisy), block.adaLN_modulation(adaln_clean)]
        scale1, gate1, scale2, gate2 = modulations(torch.cat(both), 4, index)
    elif tanh:
        scale1, gate1, scale2, gate2 = modulations(block.adaLN_modulation(adaln_input), 4)
    norm1, norm2, norm3, norm4 = block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2

    run = ops.trusted(x)
    y = for_layers(
        projections(block.attention), run.ada_layer_norm,
        x, scale1, index=index, norm="rms", weight=norm1.weight, eps=norm1.eps,
    )  # fmt: skip
    mask = attn_mask[:, None, None, :] if attn_mask is not None and attn_mask.ndim == 2 else attn_mask
    attended = self_attention(block.attention, y, complex_rotation(freqs_cis), mask)
    attended = through(block.attention.to_out, attended)
    mlp = block.feed_forward
    h, y = for_layers(
        (mlp.w1, mlp.w3), run.gate_residual_norm, x, attended, gate1, scale2, x_weight=norm2.weight, x_eps=norm2.eps,
        norm="rms", weight=norm3.weight, eps=norm3.eps, gate_tanh=tanh, index=index,
    )  # fmt: skip
    fed = mlp.w2(for_layers((mlp.w2,), run.swiglu, project(mlp.w1, y), project(mlp.w3, y)))
    h, _ = run.gate_residual_norm(
        h, fed, gate2, x_weight=norm4.weight, x_eps=norm4.eps, norm=None, gate_tanh=tanh, index=index
    )
    return h
