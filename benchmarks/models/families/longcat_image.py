"""LongCat-Image."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

from benchmarks.models.tiny import Tiny, flow, kl_vae, limit_area, numbers, picture, tiny

TEXT, WIDTH = 12, 32


def _parts(text_processor: Any = None) -> dict[str, Any]:
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 6, 6],
    )
    parts = {"text_encoder": None, "tokenizer": None, "text_processor": text_processor, "transformer": transformer}
    return {
        **parts,
        "vae": kl_vae(16, scaling_factor=0.36, shift_factor=0.12),
        "scheduler": flow(use_dynamic_shifting=True),
    }


def _encode_prompt(prompt_embeds: torch.Tensor, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return prompt_embeds, prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=TEXT)


class _TextProcessor:
    """Stands for Qwen2.5-VL's."""

    image_processor = None


_REQUEST = {"prompt_embeds": numbers(1, TEXT, WIDTH), "guidance_scale": 1.0}
_GUIDED = {"guidance_scale": 4.0, "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2)}


@tiny("LongCatImagePipeline")
def longcat_image() -> Tiny:
    pipe = diffusers.LongCatImagePipeline(**_parts())
    pipe.encode_prompt = _encode_prompt
    request = _REQUEST | {"height": 64, "width": 64, "enable_prompt_rewrite": False}
    return Tiny(pipe, request, _GUIDED, {"width": 96})


@tiny("LongCatImageEditPipeline")
def edit() -> Tiny:
    limit_area(pipeline_longcat_image_edit)
    pipe = diffusers.LongCatImageEditPipeline(**_parts(_TextProcessor()))
    pipe.encode_prompt = _encode_prompt
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, {"image": picture().resize((128, 64))})
