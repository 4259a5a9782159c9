"""FLUX.1."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, kl_vae, mask, numbers, picture, tiny, wake

TEXT, WIDTH, POOLED = 12, 32, 24


def sizes(**config: Any) -> dict[str, Any]:
    """The configuration of a tiny FLUX transformer."""
    shared: dict[str, Any] = {
        "in_channels": 64,
        "num_layers": 3,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return shared | config


def parts(**config: Any) -> dict[str, Any]:
    """The components of a tiny FLUX pipeline."""
    encoders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2")}
    vae = kl_vae(16, scaling_factor=0.36, shift_factor=0.12)
    transformer = diffusers.FluxTransformer2DModel(**sizes(**config))
    return {**encoders, "vae": vae, "scheduler": flow(use_dynamic_shifting=True), "transformer": transformer}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "pooled_prompt_embeds": numbers(1, POOLED, seed=2),
    "guidance_scale": 3.5,
    "height": 64,
    "width": 64,
}
_IMAGE = {"image": picture(), "strength": 0.8}
_MASK = {"mask_image": mask()}
_CONTROL = {"control_image": picture(seed=1)}
_GUIDED = {
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=3),
    "negative_pooled_prompt_embeds": numbers(1, POOLED, seed=4),
    "true_cfg_scale": 4.0,
}
_LARGER = {"width": 96}


@tiny("FluxPipeline")
def flux() -> Tiny:
    return Tiny(diffusers.FluxPipeline(**parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("FluxPipeline (schnell)")
def schnell() -> Tiny:
    return Tiny(diffusers.FluxPipeline(**parts(guidance_embeds=False)), _REQUEST, _GUIDED, _LARGER)


@tiny("FluxImg2ImgPipeline")
def image_to_image() -> Tiny:
    return Tiny(diffusers.FluxImg2ImgPipeline(**parts()), _REQUEST | _IMAGE, _GUIDED, _LARGER, 10)


@tiny("FluxInpaintPipeline")
def inpaint() -> Tiny:
    return Tiny(diffusers.FluxInpaintPipeline(**parts()), _REQUEST | _IMAGE | _MASK, _GUIDED, _LARGER, 10)


@tiny("FluxFillPipeline")
def fill() -> Tiny:
    pipe = diffusers.FluxFillPipeline(**parts(in_channels=64 + 64 + 256, out_channels=64))
    return Tiny(pipe, _REQUEST | {"image": picture()} | _MASK, larger=_LARGER)


@tiny("FluxControlPipeline")
def control() -> Tiny:
    pipe = diffusers.FluxControlPipeline(**parts(in_channels=128, out_channels=64))
    return Tiny(pipe, _REQUEST | _CONTROL, larger=_LARGER)


@tiny("FluxControlImg2ImgPipeline")
def control_image_to_image() -> Tiny:
    pipe = diffusers.FluxControlImg2ImgPipeline(**parts(in_channels=128, out_channels=64))
    return Tiny(pipe, _REQUEST | _IMAGE | _CONTROL, larger=_LARGER, steps=10)


@tiny("FluxControlInpaintPipeline")
def control_inpaint() -> Tiny:
    pipe = diffusers.FluxControlInpaintPipeline(**parts(in_channels=128, out_channels=64))
    return Tiny(pipe, _REQUEST | _IMAGE | _MASK | _CONTROL, larger=_LARGER, steps=10)


def _controlnet() -> diffusers.FluxControlNetModel:
    controlnet = diffusers.FluxControlNetModel(**sizes(num_layers=2, num_single_layers=2))
    wake(controlnet)
    return controlnet


@tiny("FluxControlNetPipeline")
def controlled() -> Tiny:
    pipe = diffusers.FluxControlNetPipeline(**parts(), controlnet=_controlnet())
    return Tiny(pipe, _REQUEST | _CONTROL, _GUIDED, _LARGER)


@tiny("FluxControlNetImg2ImgPipeline")
def controlled_image_to_image() -> Tiny:
    pipe = diffusers.FluxControlNetImg2ImgPipeline(**parts(), controlnet=_controlnet())
    return Tiny(pipe, _REQUEST | _IMAGE | _CONTROL, larger=_LARGER, steps=10)


@tiny("FluxControlNetInpaintPipeline")
def controlled_inpaint() -> Tiny:
    pipe = diffusers.FluxControlNetInpaintPipeline(**parts(), controlnet=_controlnet())
    return Tiny(pipe, _REQUEST | _IMAGE | _MASK | _CONTROL, larger=_LARGER, steps=10)


_KONTEXT = {"image": picture(), "max_area": 64 * 64, "_auto_resize": False}


@tiny("FluxKontextPipeline")
def kontext() -> Tiny:
    larger = {"width": 96, "max_area": 96 * 64}
    return Tiny(diffusers.FluxKontextPipeline(**parts()), _REQUEST | _KONTEXT, _GUIDED, larger)


@tiny("FluxKontextInpaintPipeline")
def kontext_inpaint() -> Tiny:
    request = _REQUEST | _KONTEXT | _MASK | {"strength": 0.8}
    larger = {"width": 96, "max_area": 96 * 64, "image": picture().resize((96, 64))}
    return Tiny(diffusers.FluxKontextInpaintPipeline(**parts()), request, _GUIDED, larger, 10)
