"""Kandinsky 5."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, picture, tiny, wake

TEXT, WIDTH = 12, 32
CHANNELS = 4


def _parts(vae: Any, visual_cond: bool) -> dict[str, Any]:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=WIDTH,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=4,
        axes_dims=(4, 6, 6),
        visual_cond=visual_cond,
    )
    parts = {"vae": vae, "scheduler": flow(shift=7.0), "transformer": wake(transformer)}
    return {**parts, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


def _video_vae() -> diffusers.AutoencoderKLHunyuanVideo:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


_REQUEST = {
    "prompt_embeds_qwen": numbers(1, TEXT, WIDTH),
    "prompt_embeds_clip": numbers(1, 16, seed=2),
    "prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
    "negative_prompt_embeds_qwen": numbers(1, TEXT, WIDTH, seed=3),
    "negative_prompt_embeds_clip": numbers(1, 16, seed=4),
    "negative_prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
_GUIDED = {"guidance_scale": 5.0}
_LARGER = {"width": 96}


@tiny("Kandinsky5T2VPipeline")
def kandinsky5_video() -> Tiny:
    pipe = diffusers.Kandinsky5T2VPipeline(**_parts(_video_vae(), visual_cond=True))
    return Tiny(pipe, _REQUEST | {"num_frames": 5}, _GUIDED, _LARGER | {"num_frames": 9})


@tiny("Kandinsky5I2VPipeline")
def kandinsky5_image_to_video() -> Tiny:
    pipe = diffusers.Kandinsky5I2VPipeline(**_parts(_video_vae(), visual_cond=True))
    # the pipeline matches the first four latent frames with those that follow
    request = _REQUEST | {"num_frames": 25, "image": picture(), "height": 32, "width": 32}
    return Tiny(pipe, request, _GUIDED, {"width": 64, "num_frames": 29})


@tiny("Kandinsky5T2IPipeline")
def kandinsky5_image() -> Tiny:
    pipe = diffusers.Kandinsky5T2IPipeline(**_parts(kl_vae(CHANNELS), visual_cond=False))
    pipe.resolutions = [(64, 64), (96, 64)]
    return Tiny(pipe, _REQUEST, _GUIDED, _LARGER)


@tiny("Kandinsky5I2IPipeline")
def kandinsky5_image_to_image() -> Tiny:
    pipe = diffusers.Kandinsky5I2IPipeline(**_parts(kl_vae(CHANNELS), visual_cond=True))
    pipe.resolutions = [(64, 64), (96, 64)]
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)
