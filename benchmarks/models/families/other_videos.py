"""Mochi, Allegro and Latte."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, ones, tiny, wake

TEXT, WIDTH = 12, 32

_TEXTS: dict[str, Any] = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
_MASKS = {"prompt_attention_mask": ones(1, TEXT), "negative_prompt_attention_mask": ones(1, TEXT)}
_GUIDED = {"guidance_scale": 4.5}
_ENCODER: dict[str, Any] = {"tokenizer": None, "text_encoder": None}


@tiny("MochiPipeline")
def mochi() -> Tiny:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        max_sequence_length=TEXT,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = diffusers.MochiPipeline(**_ENCODER, vae=vae, scheduler=flow(), transformer=wake(transformer))
    masks = {name: mask.bool() for name, mask in _MASKS.items()}
    return Tiny(pipe, _TEXTS | masks | {"num_frames": 7}, _GUIDED, {"width": 96, "num_frames": 13})


@tiny("AllegroPipeline")
def allegro() -> Tiny:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=4,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(prediction_type="v_prediction")
    pipe = diffusers.AllegroPipeline(**_ENCODER, vae=vae, scheduler=scheduler, transformer=transformer)
    return Tiny(
        pipe, _TEXTS | _MASKS | {"negative_prompt": None, "num_frames": 8}, _GUIDED, {"width": 96, "num_frames": 12}
    )


@tiny("LattePipeline")
def latte() -> Tiny:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=3,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipe = diffusers.LattePipeline(**_ENCODER, vae=kl_vae(), scheduler=scheduler, transformer=wake(transformer))
    request = _TEXTS | {"negative_prompt": None, "video_length": 4, "mask_feature": False}
    return Tiny(pipe, request, _GUIDED, {"width": 96})
