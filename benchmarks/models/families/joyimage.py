"""JoyImage-Edit."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.joyimage import image_processor

from benchmarks.models.tiny import Tiny, flow, numbers, ones, picture, tiny, wake, wan_vae

TEXT, WIDTH = 12, 32
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": WIDTH,
    "num_layers": 4,
    "rope_dim_list": [4, 6, 6],
}


def _small_processor() -> image_processor.JoyImageEditImageProcessor:
    """The pipelines' own, which scales pictures to one of the sizes in a table."""
    image_processor.BUCKETS[64] = [(64, 64), (64, 96)]
    return image_processor.JoyImageEditImageProcessor(vae_scale_factor=8, basesize=64)


def _parts(transformer: torch.nn.Module) -> dict[str, Any]:
    wake(transformer)
    encoders = {"text_encoder": None, "tokenizer": None, "processor": None}
    return {**encoders, "scheduler": flow(shift=3.0), "vae": wan_vae(), "transformer": transformer}


_GUIDED = {
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_embeds_mask": ones(1, TEXT),
    "guidance_scale": 4.0,
}
_PROMPT = {"prompt_embeds": numbers(1, TEXT, WIDTH), "prompt_embeds_mask": ones(1, TEXT), "guidance_scale": 1.0}


@tiny("JoyImageEditPipeline")
def edit() -> Tiny:
    pipe = diffusers.JoyImageEditPipeline(**_parts(diffusers.JoyImageEditTransformer3DModel(**_SIZES)))
    pipe.vae_image_processor = _small_processor()
    return Tiny(pipe, _PROMPT | {"image": picture()}, _GUIDED, {"image": picture().resize((96, 64))})


@tiny("JoyImageEditPlusPipeline")
def edit_plus() -> Tiny:
    pipe = diffusers.JoyImageEditPlusPipeline(**_parts(diffusers.JoyImageEditPlusTransformer3DModel(**_SIZES)))
    pipe.image_processor = _small_processor()

    def encode_prompt(**others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return numbers(1, TEXT, WIDTH), ones(1, TEXT)

    pipe.encode_prompt_multiple_images = encode_prompt
    images = [picture(), picture(seed=1)]
    request = {"prompt": "a cat", "images": images, "guidance_scale": 1.0, "height": 64, "width": 64}
    return Tiny(pipe, request, _GUIDED, {"width": 96})
