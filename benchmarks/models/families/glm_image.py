"""GLM-Image."""

from __future__ import annotations

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, picture, tiny, wake

TEXT, WIDTH = 12, 32


def _pipe() -> diffusers.GlmImagePipeline:
    transformer = diffusers.GlmImageTransformer2DModel(
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=32,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=64,
    )
    wake(transformer)
    return diffusers.GlmImagePipeline(
        tokenizer=None,
        processor=None,
        text_encoder=None,
        vision_language_encoder=None,
        vae=kl_vae(16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16),
        transformer=transformer,
        scheduler=flow(),
    )


def _prior(tokens: int) -> torch.Tensor:
    return torch.arange(tokens)[None] % 64


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prior_token_ids": _prior(16),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
_GUIDED = {"negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2), "guidance_scale": 4.0}
_LARGER = {"width": 96, "prior_token_ids": _prior(24)}


@tiny("GlmImagePipeline")
def glm_image() -> Tiny:
    return Tiny(_pipe(), _REQUEST, _GUIDED, _LARGER)


@tiny("GlmImagePipeline (image)")
def with_image() -> Tiny:
    image = {
        "image": [[picture()]],
        "prior_token_image_ids": [_prior(16)[0]],
        "source_image_grid_thw": [torch.tensor([[1, 4, 4]])],
    }
    return Tiny(_pipe(), _REQUEST | image, _GUIDED, _LARGER)
