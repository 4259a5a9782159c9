"""Stable Diffusion 3.5."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, tiny

TEXT, WIDTH = 12, 32


def _transformer(**config: Any) -> diffusers.SD3Transformer2DModel:
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
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return diffusers.SD3Transformer2DModel(**sizes | config)


def _parts() -> dict[str, Any]:
    encoders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    return {**encoders, "vae": kl_vae(16), "scheduler": flow(shift=3.0), "transformer": _transformer()}


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
