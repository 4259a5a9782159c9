"""Lumina-Next and Lumina-Image 2.0."""

from __future__ import annotations

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, ones, tiny, wake

TEXT, WIDTH = 12, 16

_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
_GUIDED = {"guidance_scale": 4.0}
_LARGER = {"width": 96}


@tiny("Lumina2Pipeline")
def lumina_2() -> Tiny:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=16,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 32, 32),
        cap_feat_dim=WIDTH,
    )
    pipe = diffusers.Lumina2Pipeline(transformer, flow(shift=6.0), kl_vae(16), None, None)
    return Tiny(pipe, _REQUEST, _GUIDED, _LARGER)


@tiny("LuminaPipeline")
def lumina_next() -> Tiny:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    with torch.no_grad():
        transformer.pad_token.normal_()  # made by torch.empty
    pipe = diffusers.LuminaPipeline(wake(transformer), flow(), kl_vae(4), None, None)
    return Tiny(pipe, _REQUEST, _GUIDED, _LARGER)
