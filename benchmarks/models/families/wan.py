"""Wan and what is built on it."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, numbers, tiny, wan_vae

TEXT, WIDTH = 12, 32


def _transformer(**config: Any) -> diffusers.WanTransformer3DModel:
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**sizes | config)


def _parts(**config: Any) -> dict[str, Any]:
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae(), "scheduler": flow(shift=3.0)}
    return {**parts, "transformer": _transformer(**config)}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 5,
}
_GUIDED = {"guidance_scale": 4.0}
_LARGER = {"width": 96, "num_frames": 9}


@tiny("WanPipeline")
def wan() -> Tiny:
    return Tiny(diffusers.WanPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("WanPipeline (2.2, two transformers)")
def wan_22() -> Tiny:
    pipe = diffusers.WanPipeline(**_parts(), transformer_2=_transformer(), boundary_ratio=0.6)
    return Tiny(pipe, _REQUEST, _GUIDED, _LARGER)
