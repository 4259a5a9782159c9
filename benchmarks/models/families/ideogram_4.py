"""Ideogram 4: guidance has a transformer of its own, and is always on."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from benchmarks.models.families.flux_2 import flux_2_vae
from benchmarks.models.tiny import Tiny, flow, numbers, tiny, wake

TEXT, WIDTH = 12, 32


def _transformer() -> diffusers.Ideogram4Transformer2DModel:
    transformer = diffusers.Ideogram4Transformer2DModel(
        in_channels=32,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=48,
        adaln_dim=16,
        llm_features_dim=WIDTH,
        mrope_section=(2, 1, 1),
    )
    wake(transformer)
    return transformer


@tiny("Ideogram4Pipeline")
def ideogram_4() -> Tiny:
    pipe = diffusers.Ideogram4Pipeline(
        scheduler=flow(),
        vae=flux_2_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=_transformer(),
        unconditional_transformer=_transformer(),
    )

    def encode_prompt(grid_h: int, grid_w: int, **others: Any) -> tuple[torch.Tensor, ...]:
        embeds = torch.cat([numbers(1, TEXT, WIDTH), torch.zeros(1, grid_h * grid_w, WIDTH)], dim=1)
        return embeds, *pipe._prepare_ids([TEXT], grid_h, grid_w, TEXT, embeds.device)

    pipe.encode_prompt = encode_prompt
    request = {"prompt": "a cat", "max_sequence_length": TEXT, "guidance_scale": 4.0, "guidance_schedule": None}
    request |= {"height": 64, "width": 64}
    return Tiny(pipe, request, larger={"width": 96})
