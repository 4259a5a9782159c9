"""Stable Diffusion 3.5."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, picture, tiny, wake

TEXT, WIDTH = 12, 32


def _sizes(**config: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64,
        "qk_norm": "rms_norm",
    }
    return sizes | config


def _parts(**parts: Any) -> dict[str, Any]:
    encoders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    transformer = diffusers.SD3Transformer2DModel(**_sizes(dual_attention_layers=(0,)))
    vae = kl_vae(16, shift_factor=0.06)
    return {**encoders, "vae": vae, "scheduler": flow(shift=3.0), "transformer": transformer, **parts}


def _controlnet(**config: Any) -> diffusers.SD3ControlNetModel:
    return wake(diffusers.SD3ControlNetModel(**_sizes(num_layers=2, qk_norm=None, **config)))


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "pooled_prompt_embeds": numbers(1, 64, seed=3),
    "negative_pooled_prompt_embeds": numbers(1, 64, seed=4),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
_GUIDED = {"guidance_scale": 4.0}
_LARGER = {"width": 96}


@tiny("StableDiffusion3Pipeline")
def stable_diffusion_3() -> Tiny:
    return Tiny(diffusers.StableDiffusion3Pipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("StableDiffusion3Pipeline (skip-layer guidance)")
def skip_layers() -> Tiny:
    guided = _GUIDED | {"skip_guidance_layers": [1, 2], "skip_layer_guidance_scale": 2.8}
    return Tiny(diffusers.StableDiffusion3Pipeline(**_parts()), _REQUEST, guided, _LARGER)


@tiny("StableDiffusion3Img2ImgPipeline")
def image_to_image() -> Tiny:
    request = _REQUEST | {"image": picture(), "strength": 0.9}
    return Tiny(diffusers.StableDiffusion3Img2ImgPipeline(**_parts()), request, _GUIDED, _LARGER)


@tiny("StableDiffusion3InpaintPipeline")
def inpaint() -> Tiny:
    request = _REQUEST | {"image": picture(), "mask_image": picture(seed=1).convert("L"), "strength": 0.9}
    return Tiny(diffusers.StableDiffusion3InpaintPipeline(**_parts()), request, _GUIDED, _LARGER)


@tiny("StableDiffusion3PAGPipeline")
def perturbed_attention() -> Tiny:
    return Tiny(diffusers.StableDiffusion3PAGPipeline(**_parts()), _REQUEST | {"pag_scale": 3.0}, _GUIDED, _LARGER)


@tiny("StableDiffusion3PAGImg2ImgPipeline")
def perturbed_attention_image_to_image() -> Tiny:
    request = _REQUEST | {"image": picture(), "strength": 0.9, "pag_scale": 3.0}
    return Tiny(diffusers.StableDiffusion3PAGImg2ImgPipeline(**_parts()), request, _GUIDED, _LARGER)


@tiny("StableDiffusion3ControlNetPipeline")
def controlnet() -> Tiny:
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**_parts(controlnet=_controlnet()))
    return Tiny(pipe, _REQUEST | {"control_image": picture()}, _GUIDED, _LARGER)


@tiny("StableDiffusion3ControlNetInpaintingPipeline")
def controlnet_inpaint() -> Tiny:
    control = _controlnet(extra_conditioning_channels=1)
    pipe = diffusers.StableDiffusion3ControlNetInpaintingPipeline(**_parts(controlnet=control))
    request = _REQUEST | {"control_image": picture(), "control_mask": picture(seed=1).convert("L")}
    return Tiny(pipe, request, _GUIDED, _LARGER)
