"""DiT."""

from __future__ import annotations

import diffusers

from benchmarks.models.tiny import Tiny, kl_vae, tiny


@tiny("DiTPipeline")
def dit() -> Tiny:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8
    )
    pipe = diffusers.DiTPipeline(transformer, kl_vae(4), diffusers.DDIMScheduler())
    request = {"class_labels": [1], "guidance_scale": 1.0, "output_type": "pt"}
    return Tiny(pipe, request, {"guidance_scale": 4.0}, {"class_labels": [1, 2]})
