"""PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, kl_vae, numbers, ones, tiny

TEXT, WIDTH = 12, 24


def _parts(**config: Any) -> dict[str, Any]:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=8,
        num_layers=4,
        cross_attention_dim=48,
        caption_channels=WIDTH,
        sample_size=config.pop("sample_size", 8),
        norm_type="ada_norm_single",
        **config,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    parts = {"tokenizer": None, "text_encoder": None, "vae": kl_vae(4), "scheduler": scheduler}
    return {**parts, "transformer": transformer}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "negative_prompt": None,
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "use_resolution_binning": False,
}
_GUIDED = {"guidance_scale": 4.5}
_LARGER = {"width": 96}


@tiny("PixArtAlphaPipeline")
def alpha() -> Tiny:
    pipe = diffusers.PixArtAlphaPipeline(**_parts(sample_size=128))
    return Tiny(pipe, _REQUEST, _GUIDED, _LARGER)


@tiny("PixArtSigmaPipeline")
def sigma() -> Tiny:
    return Tiny(diffusers.PixArtSigmaPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("PixArtSigmaPAGPipeline")
def sigma_perturbed_attention() -> Tiny:
    return Tiny(diffusers.PixArtSigmaPAGPipeline(**_parts()), _REQUEST | {"pag_scale": 3.0}, _GUIDED, _LARGER)
