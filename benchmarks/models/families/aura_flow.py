"""AuraFlow."""

from __future__ import annotations

import diffusers

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, ones, tiny

TEXT, WIDTH = 12, 32


@tiny("AuraFlowPipeline")
def aura_flow() -> Tiny:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=3,
        num_single_dit_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )
    pipe = diffusers.AuraFlowPipeline(None, None, kl_vae(4), transformer, flow(shift=1.73))
    request = {
        "prompt_embeds": numbers(1, TEXT, WIDTH),
        "prompt_attention_mask": ones(1, TEXT),
        "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
        "negative_prompt_attention_mask": ones(1, TEXT),
        "guidance_scale": 1.0,
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, request, {"guidance_scale": 3.5}, {"width": 96})
