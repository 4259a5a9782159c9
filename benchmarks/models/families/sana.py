"""Sana, Sana-Sprint and Sana's ControlNet."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, numbers, ones, picture, tiny, wake

TEXT, WIDTH = 12, 24


def _sizes(**config: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 32,
        "caption_channels": WIDTH,
        "sample_size": 8,
    }
    return sizes | config


def _vae() -> diffusers.AutoencoderDC:
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        scaling_factor=0.4,
    )


def _parts(**parts: Any) -> dict[str, Any]:
    made = {"tokenizer": None, "text_encoder": None, "vae": _vae(), "scheduler": flow(shift=3.0)}
    return {**made, "transformer": diffusers.SanaTransformer2DModel(**_sizes()), **parts}


def _sprint() -> dict[str, Any]:
    sizes = _sizes(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    transformer = diffusers.SanaTransformer2DModel(**sizes)
    return _parts(transformer=transformer, scheduler=diffusers.SCMScheduler())


_SPRINT_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "height": 64,
    "width": 64,
    "use_resolution_binning": False,
}
_REQUEST = _SPRINT_REQUEST | {
    "negative_prompt": None,
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "guidance_scale": 1.0,
}
_GUIDED = {"guidance_scale": 4.5}
_LARGER = {"width": 96}


@tiny("SanaPipeline")
def sana() -> Tiny:
    return Tiny(diffusers.SanaPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("SanaControlNetPipeline")
def controlnet() -> Tiny:
    control = wake(diffusers.SanaControlNetModel(**_sizes(num_layers=2)))
    pipe = diffusers.SanaControlNetPipeline(**_parts(controlnet=control))
    return Tiny(pipe, _REQUEST | {"control_image": picture()}, _GUIDED, _LARGER)


@tiny("SanaPAGPipeline")
def perturbed_attention() -> Tiny:
    pipe = diffusers.SanaPAGPipeline(**_parts(), pag_applied_layers="transformer_blocks.1")
    return Tiny(pipe, _REQUEST | {"pag_scale": 3.0}, _GUIDED, _LARGER)


@tiny("SanaSprintPipeline")
def sprint() -> Tiny:
    request = _SPRINT_REQUEST | {"intermediate_timesteps": None}
    return Tiny(diffusers.SanaSprintPipeline(**_sprint()), request, larger=_LARGER)


@tiny("SanaSprintImg2ImgPipeline")
def sprint_image_to_image() -> Tiny:
    request = _SPRINT_REQUEST | {"intermediate_timesteps": None, "image": picture(), "strength": 0.9}
    return Tiny(diffusers.SanaSprintImg2ImgPipeline(**_sprint()), request, larger=_LARGER)
