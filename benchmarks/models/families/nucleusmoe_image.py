"""Nucleus-Image, a transformer with a mixture of experts."""

from __future__ import annotations

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, numbers, ones, qwen_vae, tiny

TEXT, WIDTH = 12, 24


@tiny("NucleusMoEImagePipeline")
def nucleus() -> Tiny:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=6,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
        num_experts=4,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):  # made by torch.empty
                weight.normal_(0, 0.1)
    pipe = diffusers.NucleusMoEImagePipeline(transformer, flow(shift=3.0), qwen_vae(), None, None)
    request = {
        "prompt_embeds": numbers(1, TEXT, WIDTH),
        "prompt_embeds_mask": ones(1, TEXT),
        "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
        "negative_prompt_embeds_mask": ones(1, TEXT),
        "guidance_scale": 1.0,
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, request, {"guidance_scale": 4.0}, {"width": 96})
