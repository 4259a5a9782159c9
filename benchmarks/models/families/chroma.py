"""Chroma."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, kl_vae, mask, numbers, picture, tiny

TEXT, WIDTH = 12, 32


def _parts() -> dict[str, Any]:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    transformer.register_to_config(guidance_embeds=False)  # the inpainting pipeline reads it
    vae = kl_vae(16, scaling_factor=0.36, shift_factor=0.12)
    parts = {"text_encoder": None, "tokenizer": None, "vae": vae, "transformer": transformer}
    return {**parts, "scheduler": flow(use_dynamic_shifting=True)}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": torch.ones(1, TEXT),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
_IMAGE = {"image": picture(), "strength": 0.8}
_GUIDED = {
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_attention_mask": torch.ones(1, TEXT),
    "guidance_scale": 4.0,
}
_LARGER = {"width": 96}


@tiny("ChromaPipeline")
def chroma() -> Tiny:
    return Tiny(diffusers.ChromaPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("ChromaImg2ImgPipeline")
def image_to_image() -> Tiny:
    return Tiny(diffusers.ChromaImg2ImgPipeline(**_parts()), _REQUEST | _IMAGE, _GUIDED, _LARGER, 10)


@tiny("ChromaInpaintPipeline")
def inpaint() -> Tiny:
    request = _REQUEST | _IMAGE | {"mask_image": mask()}
    return Tiny(diffusers.ChromaInpaintPipeline(**_parts()), request, _GUIDED | {"true_cfg_scale": 4.0}, _LARGER, 10)
