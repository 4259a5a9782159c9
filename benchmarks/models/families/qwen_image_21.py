"""Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, numbers, picture, tiny

TEXT, WIDTH, CHANNELS = 12, 32, 16


class _Processor:
    """Stands for Qwen3-VL's: the pipeline asks it for the length of the system prompt and one token."""

    tokenizer = property(lambda self: self)

    def apply_chat_template(self, messages: Any, **others: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, text: str) -> list[int]:
        return [0]


def _pipe() -> diffusers.QwenImage21Pipeline:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    parts = {"text_encoder": None, "processor": _Processor(), "transformer": transformer, "vae": vae}
    return diffusers.QwenImage21Pipeline(**parts, scheduler=flow(use_dynamic_shifting=True))


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "true_cfg_scale": 1.0,
    "height": 64,
    "width": 64,
}
_GUIDED = {
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "true_cfg_scale": 4.0,
}
_LARGER = {"width": 96}


@tiny("QwenImage21Pipeline")
def qwen_image_21() -> Tiny:
    return Tiny(_pipe(), _REQUEST, _GUIDED, _LARGER)


@tiny("QwenImage21Pipeline (no cache of keys)")
def without_keys() -> Tiny:
    return Tiny(_pipe(), _REQUEST | {"use_kv_cache": False}, _GUIDED, _LARGER)


@tiny("QwenImage21Pipeline (image)")
def with_image() -> Tiny:
    pipe = _pipe()
    slots = torch.zeros(1, TEXT, dtype=torch.bool)
    slots[:, 2:6] = True  # the picture's 4×4 tokens, four for each slot

    def encode_prompt(prompt_embeds: torch.Tensor, **others: Any) -> tuple[torch.Tensor, None, torch.Tensor]:
        return prompt_embeds, None, slots

    pipe.encode_prompt = encode_prompt
    return Tiny(pipe, _REQUEST | {"image": [picture()], "output_resolution": 64}, _GUIDED, _LARGER)
