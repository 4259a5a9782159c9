"""VisualCloze."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from benchmarks.models.families import flux
from benchmarks.models.tiny import Tiny, numbers, picture, tiny

#: An example of the task, and a picture to do it with.
_GRID = [[picture(), picture(seed=1)], [picture(seed=2), None]]
_REQUEST = {"task_prompt": "a cat", "content_prompt": "a cat", "image": _GRID}


def _encode_prompt(**others: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return numbers(1, flux.TEXT, flux.WIDTH), numbers(1, flux.POOLED, seed=2), torch.zeros(flux.TEXT, 3)


def _parts() -> dict[str, Any]:
    return {**flux.parts(in_channels=64 + 64 + 256, out_channels=64), "resolution": 64}


@tiny("VisualClozeGenerationPipeline")
def generation() -> Tiny:
    pipe = diffusers.VisualClozeGenerationPipeline(**_parts())
    pipe.encode_prompt = _encode_prompt
    return Tiny(pipe, _REQUEST, larger={"image": [*_GRID[:1], *_GRID]})


@tiny("VisualClozePipeline")
def visualcloze() -> Tiny:
    pipe = diffusers.VisualClozePipeline(**_parts())
    for part in (pipe.generation_pipe, pipe.upsampling_pipe):
        part.encode_prompt = _encode_prompt
        part.set_progress_bar_config(disable=True)
    request = _REQUEST | {"upsampling_height": 64, "upsampling_width": 64, "upsampling_strength": 0.8}
    return Tiny(pipe, request, larger={"upsampling_width": 96}, steps=10)
