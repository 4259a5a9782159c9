"""SANA-Video."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, numbers, ones, picture, tiny, wan_vae

TEXT, WIDTH = 12, 32


def _parts() -> dict[str, Any]:
    transformer = diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=8,
        rope_max_seq_len=32,
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae(), "scheduler": flow(shift=3.0)}
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
    "frames": 5,
    "use_resolution_binning": False,
}
_GUIDED = {"guidance_scale": 6.0}
_LARGER = {"width": 96, "frames": 9}


@tiny("SanaVideoPipeline")
def sana_video() -> Tiny:
    return Tiny(diffusers.SanaVideoPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("SanaImageToVideoPipeline")
def sana_image_to_video() -> Tiny:
    pipe = diffusers.SanaImageToVideoPipeline(**_parts())
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)
