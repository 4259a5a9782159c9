"""Ovis-Image."""

from __future__ import annotations

import diffusers

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, tiny

TEXT, WIDTH = 12, 32


@tiny("OvisImagePipeline")
def ovis_image() -> Tiny:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = diffusers.OvisImagePipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=kl_vae(16, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    request = {"prompt_embeds": numbers(1, TEXT, WIDTH), "guidance_scale": 1.0, "height": 64, "width": 64}
    guided = {
        "negative_prompt": None,
        "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
        "guidance_scale": 4.0,
    }
    return Tiny(pipe, request, guided, {"width": 96})
