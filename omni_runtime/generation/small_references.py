"""QwenImageEditPipeline for a model that edits small pictures.

diffusers' pipeline scales every reference to about 1024² pixels, 4096 tokens. A folder whose `pipeline.json` says
`{"reference_pixels": 4096}` was trained on references of about 64², 16 tokens, and is loaded through `load`. diffusers
itself is not changed. The classes here have the names of the classes that they extend, so `save_pretrained` writes the
same index, and code that looks at a class's name finds the usual one.
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
    """Load the pipeline from a directory.

    Args:
        location: a directory that `save_pretrained` wrote.
        reference_pixels: the area that references are scaled to; sides are rounded to multiples of 32.
        arguments: arguments for `from_pretrained`.
    """
    parts = dict(arguments)
    if "processor" not in parts:
        parts["processor"] = processor_class().from_pretrained(f"{location}/processor")
    pipe = pipeline_class().from_pretrained(location, **parts)
    pipe.reference_pixels = reference_pixels
    return pipe


@functools.cache
def pipeline_class() -> Any:
    """Return diffusers' class, changed to scale references to about `reference_pixels` pixels."""
    import diffusers

    inherited: Any = diffusers.QwenImageEditPipeline
    original = inspect.unwrap(inherited.__call__)

    class QwenImageEditPipeline(inherited):
        reference_pixels = 1024 * 1024

        @functools.wraps(inherited.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run the inherited call with a copy of its globals, in which `calculate_dimensions` uses our area."""
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
            """Save as the inherited method does, and write `pipeline.json`."""
            super().save_pretrained(save_directory, *args, **kwargs)
            settings = json.dumps({"reference_pixels": self.reference_pixels})
            files.write(Path(save_directory) / "pipeline.json", settings + "\n")

    return QwenImageEditPipeline


@functools.cache
def processor_class() -> Any:
    """Return transformers' class without its video part, which cannot be created without torchvision."""
    import transformers

    inherited: Any = transformers.Qwen2VLProcessor

    class Qwen2VLProcessor(inherited):
        __module__ = inherited.__module__  # the pipeline's index names it

        @classmethod
        def get_attributes(cls) -> list[str]:
            """Return the names of the parts that a processor holds, saves and loads."""
            return ["image_processor", "tokenizer"]

    return Qwen2VLProcessor


def _scaled(calculate_dimensions: Any, area: int, target_area: int, ratio: float) -> Any:
    return calculate_dimensions(area, ratio)
