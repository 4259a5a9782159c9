"""Krea 2."""

from __future__ import annotations

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, numbers, qwen_vae, tiny, wake

TEXT, LAYERS, WIDTH = 12, 3, 32


@tiny("Krea2Pipeline")
def krea_2() -> Tiny:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=64,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=32,
        text_hidden_dim=WIDTH,
        num_text_layers=LAYERS,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    wake(transformer)
    pipe = diffusers.Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    request = {
        "prompt_embeds": numbers(1, TEXT, LAYERS, WIDTH),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "guidance_scale": 0.0,
        "height": 64,
        "width": 64,
    }
    guided = {
        "negative_prompt_embeds": numbers(1, TEXT, LAYERS, WIDTH, seed=2),
        "negative_prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "guidance_scale": 4.0,
    }
    return Tiny(pipe, request, guided, {"width": 96})
