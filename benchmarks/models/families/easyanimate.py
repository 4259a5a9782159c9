"""EasyAnimate."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from benchmarks.models.tiny import Tiny, always, flow, numbers, ones, tiny

TEXT, WIDTH = 12, 32
CHANNELS = 4


def _parts(in_channels: int = CHANNELS) -> dict[str, Any]:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=CHANNELS,
        time_embed_dim=16,
        text_embed_dim=WIDTH,
        num_layers=4,
        mmdit_layers=2,
        sample_width=8,
        sample_height=8,
        patch_size=2,
    )
    vae = diffusers.AutoencoderKLMagvit(
        block_out_channels=[8, 8, 8, 8],
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": flow()}
    return {**parts, "transformer": transformer}


def _video(frames: int) -> torch.Tensor:
    return numbers(1, 3, frames, 64, 64, seed=3).sigmoid()


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 5,
}
_GUIDED = {"guidance_scale": 5.0}
_LARGER = {"width": 96, "num_frames": 9}


@tiny("EasyAnimatePipeline")
def easyanimate() -> Tiny:
    return Tiny(diffusers.EasyAnimatePipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("EasyAnimateControlPipeline")
def easyanimate_control() -> Tiny:
    pipe = diffusers.EasyAnimateControlPipeline(**_parts(3 * CHANNELS))
    # the pipeline calls its own encode_prompt with an argument that it doesn't take
    texts = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
    pipe.encode_prompt = always(tuple(_REQUEST[name] for name in texts))
    request = _REQUEST | {"control_video": _video(5)}
    return Tiny(pipe, request, _GUIDED, _LARGER | {"control_video": _video(9)})


@tiny("EasyAnimateInpaintPipeline")
def easyanimate_inpaint() -> Tiny:
    pipe = diffusers.EasyAnimateInpaintPipeline(**_parts(2 * CHANNELS + 1))
    # all is masked: with a partial mask, the pipeline asks its autoencoder for a setting that it hasn't
    request = _REQUEST | {"video": _video(5), "mask_video": 255 * torch.ones(1, 1, 5, 64, 64)}
    larger = _LARGER | {"video": _video(9), "mask_video": 255 * torch.ones(1, 1, 9, 64, 64)}
    return Tiny(pipe, request, _GUIDED, larger)
