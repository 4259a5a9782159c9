"""QwenImageEditPipeline for a model that edits small pictures.

diffusers' pipeline scales every reference to about 1024² pixels, 4096 tokens. A folder whose `pipeline.json` says
`{"reference_pixels": 4096}` was trained on references of about 64², 16 tokens, and is loaded through `load`. Nothing of
diffusers is changed: the classes here bear the names of those that they extend, so that `save_pretrained` writes the
same index and whoever asks for a class's name gets the usual one.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from omni_runtime import files

__all__ = ["load", "pipeline_class", "processor_class"]


def load(location: str, reference_pixels: int, arguments: Mapping[str, Any]) -> Any:
    """The pipeline of that directory.

    Args:
        location: a directory that `save_pretrained` wrote.
        reference_pixels: area that references are scaled to; sides are rounded to multiples of 32.
        arguments: for `from_pretrained`.
    """
    parts = dict(arguments)
    if "processor" not in parts:
        parts["processor"] = processor_class().from_pretrained(f"{location}/processor")
    pipe = pipeline_class().from_pretrained(location, **parts)
    pipe.reference_pixels = reference_pixels
    return pipe


@functools.cache
def pipeline_class() -> Any:
    """diffusers' class with references scaled to about `reference_pixels` pixels."""
    import diffusers

    inherited: Any = diffusers.QwenImageEditPipeline
    original = inspect.unwrap(inherited.__call__)

    class QwenImageEditPipeline(inherited):
        reference_pixels = 1024 * 1024

        @functools.wraps(inherited.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The inherited call, over a copy of its module's globals in which one function has another area."""
            scaled = functools.partial(_scaled, original.__globals__["calculate_dimensions"], self.reference_pixels)
            call = types.FunctionType(
                original.__code__,
                {**original.__globals__, "calculate_dimensions": scaled},
                original.__name__,
                original.__defaults__,
                original.__closure__,
            )
            call.__kwdefaults__ = original.__kwdefaults__
            with torch.no_grad():
                return call(self, *args, **kwargs)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            """As inherited, and `pipeline.json`."""
            super().save_pretrained(save_directory, *args, **kwargs)
            settings = json.dumps({"reference_pixels": self.reference_pixels})
            files.write(Path(save_directory) / "pipeline.json", settings + "\n")

    return QwenImageEditPipeline


@functools.cache
def processor_class() -> Any:
    """transformers' class without its part for video, which cannot even be made where torchvision is missing."""
    import transformers

    inherited: Any = transformers.Qwen2VLProcessor

    class Qwen2VLProcessor(inherited):
        __module__ = inherited.__module__  # the pipeline's index names it

        @classmethod
        def get_attributes(cls) -> list[str]:
            """The parts that a processor is made of, saves and loads."""
            return ["image_processor", "tokenizer"]

    return Qwen2VLProcessor


def _scaled(calculate_dimensions: Any, area: int, target_area: int, ratio: float) -> Any:
    return calculate_dimensions(area, ratio)
