"""Fused blocks of Qwen-Image 2.1: 6 launches besides the GEMMs and attention, where diffusers' blocks take 42.

A block has one stream for text, condition images and the target image. All blocks share one modulation, which the model
passes in: a scale and the tanh of a gate, without shift, with a row of its own for the tokens that do not depend on
the timestep. Everything between two GEMMs is one op, including the end of a block with the beginning of the next
(`ahead`; the first block takes 2 more launches). Projections are called as modules, so adapters, quantised layers and
hooks on them keep working.

Keys and values of the prefix are kept from the first step. Later steps write the target's beside them. What attention
does in the first step is left to the block's processor: it gets queries and keys that are normalised and rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.patching import ahead
from omni_kernels.patching.activations import Quantized, for_layers, project
from omni_kernels.patching.layers import (
    attention_with_kept,
    clipped,
    complex_rotation,
    modulations,
    projections,
    queries_keys_values,
    through,
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

#: The modules that the fused forward replaces, so does not call: path → class name.
STANDS_FOR = {
    "img_norm1": "LayerNorm",
    "img_norm2": "LayerNorm",
    "attn": "QwenImage21Attention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "img_mlp": "QwenImage21SwiGLUFeedForward",
    "img_mlp.activation_fn": "SiLU",
}
PROCESSOR, FLEX_PROCESSOR = "QwenImage21AttnProcessor", "QwenImage21FlexAttnProcessor"

#: Scale and gate for attention, and for the feed-forward; and which of two rows each token takes.
Modulation = tuple[Sequence[torch.Tensor], torch.Tensor | None]


def unfit(block: torch.nn.Module) -> str | None:
    """Why `forward` cannot replace this block's own forward; None if it can."""
    reason = unlike(block, STANDS_FOR) or not_plain_layer_norm(block, "img_norm1", "img_norm2")
    if reason is not None:
        return reason
    attn = part(block, "attn")
    flex = type(attn.processor).__name__ == FLEX_PROCESSOR
    return not_plain_attention(block, "attn", FLEX_PROCESSOR if flex else PROCESSOR) or not_plain_rms_norm(
        block, attn.inner_dim // attn.heads, "attn.norm_q", "attn.norm_k"
    )


def forward(
    block: Any,
    hidden_states: torch.Tensor,
    modulation: torch.Tensor,
    rotary_emb: torch.Tensor | None = None,
    attention_mask: Any | None = None,
    target_token_mask: torch.Tensor | None = None,
    layer_cache: Any | None = None,
    kv_cache_mode: str | None = None,
    cache_write_slice: slice | None = None,
    segments: list[tuple[int, int, bool]] | None = None,
    key_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same as the block's own forward. Falls back to it if a module is hooked or a gradient is needed."""
    x, attn = hidden_states, block.attn
    if (
        not computes(x, modulation)
        or (target_token_mask is None and len(modulation) not in (1, len(x)))
        or (target_token_mask is not None and (len(modulation) != len(x) + 1 or len(target_token_mask) != x.shape[1]))
        or not (attends(attn, PROCESSOR) or attends(attn, FLEX_PROCESSOR))
        or not stands(block, STANDS_FOR)
    ):
        return NotImplemented
    run, given = ops.trusted(x), (modulation, target_token_mask)
    made = ahead.take(x, block, given)
    if made is None:
        parts, index = _rows(len(x), *given)
        # The processor below takes the states, too, so they are also made in their dtype.
        y = for_layers(
            projections(attn), run.ada_layer_norm, x, parts[0], index=index, eps=block.img_norm1.eps, beside=True
        )
    else:
        (parts, index), y = made
    scale1, gate1, scale2, gate2 = parts

    rotation = complex_rotation(rotary_emb)
    if (
        kv_cache_mode == "cached"
        and layer_cache is not None
        and segments is None
        and not _is_block_mask(attention_mask)
    ):
        kept_k, kept_v = layer_cache.get()
        attended = attention_with_kept(attn, y, rotation, kept_k, kept_v, attention_mask)
    else:
        options = {
            "attention_mask": attention_mask, "layer_cache": layer_cache, "kv_cache_mode": kv_cache_mode,
            "cache_write_slice": cache_write_slice, "segments": segments, "key_valid": key_valid,
        }  # fmt: skip
        states = y.beside if isinstance(y, Quantized) else y
        attended = attn.processor(_Projected(attn, *queries_keys_values(attn, y, rotation)), states, **options)
    attended = through(attn.to_out, attended)
    mlp = block.img_mlp
    h, y = for_layers(
        (mlp.gate_layer, mlp.proj), run.gate_residual_norm,
        x, attended, gate1, scale2, index=index, gate_tanh=True, eps=block.img_norm2.eps,
    )  # fmt: skip
    fed = mlp.out(for_layers((mlp.out,), run.swiglu, project(mlp.gate_layer, y), project(mlp.proj, y)))
    # In fp16 the states must be clipped before the next norm, so nothing is computed ahead.
    following = None if x.dtype == torch.float16 else ahead.next_of(block, x)
    if following is None:
        h, _ = run.gate_residual_norm(h, fed, gate2, index=index, gate_tanh=True, norm=None)
        return clipped(h)
    h, y = for_layers(
        projections(following.attn), run.gate_residual_norm,
        h, fed, gate2, scale1, index=index, gate_tanh=True, eps=following.img_norm1.eps, beside=True,
    )  # fmt: skip
    ahead.leave(h, following, given, ((parts, index), y))
    return h


def _rows(B: int, modulation: torch.Tensor, target: torch.Tensor | None) -> Modulation:
    """The modulation as the ops take it: [B or 1, 1, D] each or, with an index [B, S], [2B, D].

    With a mask of the target's tokens, the last row of the modulation is that of all other tokens, in all samples.
    """
    if target is None:
        return modulations(modulation, 4), None
    both = torch.cat([modulation[-1:].expand(B, -1), modulation[:-1]])
    return modulations(both, 4, target), target.expand(B, -1)


def _is_block_mask(mask: Any) -> bool:
    return mask is not None and not isinstance(mask, torch.Tensor)


class _Projected:
    """Stands for an attention whose projections, norms and rotation have run; a processor does only the rest."""

    def __init__(self, attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.heads, self.inner_dim = attn.heads, attn.inner_dim
        self._q, self._k, self._v = q.flatten(2), k.flatten(2), v.flatten(2)
        self.to_out = self._same, self._same

    def to_q(self, x: torch.Tensor) -> torch.Tensor:
        return self._q

    def to_k(self, x: torch.Tensor) -> torch.Tensor:
        return self._k

    def to_v(self, x: torch.Tensor) -> torch.Tensor:
        return self._v

    def norm_q(self, x: torch.Tensor) -> torch.Tensor:
        return x

    norm_k = _same = norm_q
