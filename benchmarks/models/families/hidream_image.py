"""HiDream-I1."""

from __future__ import annotations

import diffusers

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, tiny

DOUBLE, SINGLE = 3, 3


@tiny("HiDreamImagePipeline")
def hidream_image() -> Tiny:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[24, 16],
        text_emb_dim=64,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=tuple(range(DOUBLE + SINGLE)),
    )
    encoders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")}
    vae = kl_vae(16, shift_factor=0.1)
    pipe = diffusers.HiDreamImagePipeline(**encoders, vae=vae, scheduler=flow(shift=3.0), transformer=transformer)
    pipe.default_sample_size = 8  # all requests are resized to so many latents per side
    request = {
        "prompt_embeds_t5": numbers(1, 8, 24),
        "prompt_embeds_llama3": numbers(DOUBLE + SINGLE, 1, 8, 16, seed=2),
        "pooled_prompt_embeds": numbers(1, 64, seed=3),
        "negative_prompt_embeds_t5": numbers(1, 8, 24, seed=4),
        "negative_prompt_embeds_llama3": numbers(DOUBLE + SINGLE, 1, 8, 16, seed=5),
        "negative_pooled_prompt_embeds": numbers(1, 64, seed=6),
        "guidance_scale": 1.0,
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, request, {"guidance_scale": 5.0}, {"width": 128})
