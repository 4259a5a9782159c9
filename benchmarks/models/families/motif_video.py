"""Motif-Video."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance

from benchmarks.models.tiny import Tiny, flow, numbers, ones, picture, tiny, wan_vae

TEXT, WIDTH = 12, 32


def _parts(guider: Any) -> dict[str, Any]:
    transformer = diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_single_layers=4,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae(), "scheduler": flow(shift=7.0)}
    return {**parts, "transformer": transformer, "guider": guider, "feature_extractor": None}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "height": 64,
    "width": 64,
    "num_frames": 5,
}
_LARGER = {"width": 96, "num_frames": 9}


@tiny("MotifVideoPipeline")
def motif_video() -> Tiny:
    pipe = diffusers.MotifVideoPipeline(**_parts(ClassifierFreeGuidance(guidance_scale=1.0)))
    return Tiny(pipe, _REQUEST, {}, _LARGER)


@tiny("MotifVideoPipeline (guidance)")
def motif_video_guidance() -> Tiny:
    return Tiny(diffusers.MotifVideoPipeline(**_parts(AdaptiveProjectedGuidance())), _REQUEST, {}, _LARGER)


@tiny("MotifVideoImage2VideoPipeline")
def motif_video_image_to_video() -> Tiny:
    pipe = diffusers.MotifVideoImage2VideoPipeline(**_parts(AdaptiveProjectedGuidance()))
    return Tiny(pipe, _REQUEST | {"image": picture(), "prompt": None}, {}, _LARGER)
