"""ERNIE-Image."""

from __future__ import annotations

import diffusers

from benchmarks.models.families.flux_2 import flux_2_vae
from benchmarks.models.tiny import Tiny, flow, numbers, tiny, wake

TEXT, WIDTH = 12, 32


@tiny("ErnieImagePipeline")
def ernie_image() -> Tiny:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=4,
        ffn_hidden_size=48,
        in_channels=32,
        out_channels=32,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    wake(transformer)
    pipe = diffusers.ErnieImagePipeline(
        transformer=transformer, vae=flux_2_vae(), text_encoder=None, tokenizer=None, scheduler=flow(shift=3.0)
    )
    request = {"prompt_embeds": [numbers(TEXT, WIDTH)], "guidance_scale": 1.0, "height": 64, "width": 64}
    guided = {"negative_prompt_embeds": [numbers(TEXT, WIDTH, seed=2)], "guidance_scale": 4.0}
    return Tiny(pipe, request, guided, {"width": 96})
