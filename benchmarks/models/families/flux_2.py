"""FLUX.2."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, mask, numbers, picture, tiny

TEXT, WIDTH = 12, 32


def flux_2_vae(latent_channels: int = 8) -> diffusers.AutoencoderKLFlux2:
    """FLUX.2's autoencoder: 8 times smaller, and packed in 2×2 patches."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=latent_channels
    )


def _parts(**config: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "in_channels": 32,
        "num_layers": 3,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    transformer = diffusers.Flux2Transformer2DModel(**sizes | config)
    parts = {"text_encoder": None, "tokenizer": None, "vae": flux_2_vae(), "transformer": transformer}
    return {**parts, "scheduler": flow(use_dynamic_shifting=True)}


_REQUEST = {"prompt_embeds": numbers(1, TEXT, WIDTH), "height": 64, "width": 64}
_KLEIN = _REQUEST | {"guidance_scale": 1.0}
_IMAGE = {"image": [picture()]}
_GUIDED = {"guidance_scale": 4.0, "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2)}
_LARGER = {"width": 96}


@tiny("Flux2Pipeline")
def flux_2() -> Tiny:
    return Tiny(diffusers.Flux2Pipeline(**_parts(guidance_embeds=True)), _REQUEST, larger=_LARGER)


@tiny("Flux2Pipeline (image)")
def with_image() -> Tiny:
    return Tiny(diffusers.Flux2Pipeline(**_parts(guidance_embeds=True)), _REQUEST | _IMAGE, larger=_LARGER)


@tiny("Flux2KleinPipeline")
def klein() -> Tiny:
    return Tiny(diffusers.Flux2KleinPipeline(**_parts()), _KLEIN, _GUIDED, _LARGER)


@tiny("Flux2KleinPipeline (image)")
def klein_with_image() -> Tiny:
    return Tiny(diffusers.Flux2KleinPipeline(**_parts()), _KLEIN | _IMAGE, _GUIDED, _LARGER)


@tiny("Flux2KleinInpaintPipeline")
def klein_inpaint() -> Tiny:
    request = _KLEIN | {"image": picture(), "mask_image": mask(), "strength": 0.8}
    larger = _LARGER | {"image": picture().resize((96, 64))}
    return Tiny(diffusers.Flux2KleinInpaintPipeline(**_parts()), request, _GUIDED, larger, 10)


@tiny("Flux2KleinKVPipeline")
def klein_keys() -> Tiny:
    return Tiny(diffusers.Flux2KleinKVPipeline(**_parts()), _REQUEST | _IMAGE, larger=_LARGER)
