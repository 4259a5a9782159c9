"""CogView 3 Plus and CogView 4."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, picture, tiny

TEXT, WIDTH = 16, 24


def _sizes(in_channels: int = 16) -> dict[str, Any]:
    return {
        "in_channels": in_channels,
        "out_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "pos_embed_max_size": 16,
        "sample_size": 8,
    }


def _cogview_4(in_channels: int = 16) -> dict[str, Any]:
    transformer = diffusers.CogView4Transformer2DModel(**_sizes(in_channels), rope_axes_dim=(16, 16))
    scheduler = flow(
        base_image_seq_len=256, base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": kl_vae(16), "scheduler": scheduler}
    return {**parts, "transformer": transformer}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
_GUIDED = {"guidance_scale": 5.0}
_LARGER = {"width": 96}


@tiny("CogView3PlusPipeline")
def cogview_3_plus() -> Tiny:
    transformer = diffusers.CogView3PlusTransformer2DModel(**_sizes())
    pipe = diffusers.CogView3PlusPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=kl_vae(16),
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return Tiny(pipe, _REQUEST, _GUIDED, _LARGER)


@tiny("CogView4Pipeline")
def cogview_4() -> Tiny:
    return Tiny(diffusers.CogView4Pipeline(**_cogview_4()), _REQUEST, _GUIDED, _LARGER)


@tiny("CogView4ControlPipeline")
def cogview_4_control() -> Tiny:
    pipe = diffusers.CogView4ControlPipeline(**_cogview_4(32))
    return Tiny(pipe, _REQUEST | {"control_image": picture()}, _GUIDED, _LARGER)
