"""Requests: prompts, images, seeds and sizes, checked against the pipeline class before the pipeline runs.

Most checks need only the class, so a wrong request fails before any weight is loaded.
"""

from __future__ import annotations

import inspect
import math
import numbers
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni_runtime.generation.checks import suggestion, whole_number
from omni_runtime.generation.video import makes_video

#: Parts of the class names of pipelines that need an image. For others (FLUX Kontext) the image is optional.
NEEDS_IMAGE = ("Edit", "Img2Img", "Inpaint")

#: Pipelines that take one image per prompt. Given several, they would fail with an unclear error.
ONE_IMAGE = frozenset(
    [
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
    ]
)


@dataclass(frozen=True)
class GenerationRequest:
    """One call of the pipeline.

    Attributes:
        prompt: the prompt; None if embeddings are given instead.
        seed: the seed of the request's CPU generator; None if the caller gives a generator.
        arguments: all other arguments of the pipeline's call.
    """

    prompt: str | None
    seed: int | None
    arguments: dict[str, Any]

    def call(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call.

        The generator is on the CPU, so a seed gives the same noise on every device. Lists are copied, because Z-Image's
        pipeline writes into its list of prompts.
        """
        arguments = {name: list(value) if type(value) is list else value for name, value in self.arguments.items()}
        if self.prompt is not None:
            arguments["prompt"] = self.prompt
        if self.seed is not None:
            arguments["generator"] = torch.Generator("cpu").manual_seed(self.seed)
        return arguments


def build(
    pipeline_class: type,
    prompt: str | Sequence[str] | None,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    image: Any = None,
    seed: int | Sequence[int] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> list[GenerationRequest]:
    """Build one request per prompt. An argument that is None takes its value from `defaults`, else from the pipeline.

    Raises:
        ValueError: an argument has an unusable value, or a required one is missing; the message names it.
        TypeError: the pipeline has no such argument, or it has the wrong type; the message names it.
        FileNotFoundError: there is no image file of that name.
    """
    signature = inspect.signature(pipeline_class.__call__).parameters
    given = {name: value for name, value in arguments.items() if value is not None}
    given = {name: value for name, value in (defaults or {}).items() if name in signature} | given
    default_negative = given.pop("negative_prompt", None)
    if "output_type" in signature and makes_video(pipeline_class):
        given.setdefault("output_type", "pil")  # like pipelines of images; some of videos return arrays
    _check_names(pipeline_class, signature, given)
    _check_types(signature, given)

    prompts = _prompts(pipeline_class, signature, prompt, given)
    negatives = _negative_prompts(pipeline_class, signature, negative_prompt, len(prompts))
    images = _images(pipeline_class, signature, image, prompt)
    seeds = _seeds(seed, len(prompts), given)
    requests = []
    for one, negative, picture, number in zip(prompts, negatives, images, seeds, strict=True):
        call = dict(given)
        if negative is None and "negative_prompt_embeds" not in given:
            negative = default_negative
        if negative is not None:
            call["negative_prompt"] = negative
        if picture is not None:
            call["image"] = picture
        requests.append(GenerationRequest(one, number, call))
    return requests


def check_size(pipe: Any, requests: Sequence[GenerationRequest]) -> None:
    """Check that the loaded pipeline would not round a height or width.

    Raises:
        ValueError: a side is not a multiple of the pipeline's scale factor; the message gives the nearest multiples.
    """
    processor = getattr(pipe, "image_processor", None)
    multiple = getattr(getattr(processor, "config", None), "vae_scale_factor", 1)
    for request in requests:
        for side in ("height", "width"):
            value = request.arguments.get(side)
            if value is not None and value % multiple:
                below = value - value % multiple
                near = f"{below} or {below + multiple}" if below else f"{multiple}"
                raise ValueError(f"{side} {value} is not a multiple of {multiple}; nearest: {near}")


def step_count(pipeline_class: type, arguments: Mapping[str, Any]) -> int | None:
    """Return the number of steps that the pipeline will run; None if other arguments decide it, too."""
    signature = inspect.signature(pipeline_class.__call__).parameters
    if "num_inference_steps" not in signature or any(name in signature for name in ("strength", "denoising_end")):
        return None
    if any(arguments.get(name) is not None for name in ("sigmas", "timesteps")):
        return None
    steps = arguments.get("num_inference_steps", signature["num_inference_steps"].default)
    return steps if isinstance(steps, int) else None


def _check_names(pipeline_class: type, signature: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if "return_dict" in given:
        raise TypeError("generate returns a list of results: it takes no return_dict")
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values()):
        return
    for name in given:
        if name not in signature or name == "self":
            raise TypeError(
                f"{pipeline_class.__name__} takes no {name!r}"
                f"{suggestion(name, [*signature, 'seed', 'prompt', 'image'])}"
            )


def _check_types(signature: Mapping[str, Any], given: dict[str, Any]) -> None:
    """Check that counts are positive whole numbers and other values have the type of their default."""
    for name, value in given.items():
        default = signature[name].default if name in signature else None
        if name in ("num_inference_steps", "height", "width", "num_frames", "num_images_per_prompt"):
            given[name] = whole_number(name, value, least=1)
        elif isinstance(default, bool):
            _check_type(name, value, bool, "True or False")
        elif isinstance(default, int | float):
            _check_type(name, value, numbers.Real, "a number")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, not {value}")
        elif isinstance(default, str):
            _check_type(name, value, str, "text")


def _check_type(name: str, value: Any, kind: type, words: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {words}, not {value!r}")


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence):
        raise TypeError(f"{name} must be text or a list of texts, not {type(value).__name__}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be text or a list of texts; the list holds {text!r}")
    if not texts:
        raise ValueError(f"{name} is an empty list")
    return list(texts)


def _prompts(
    pipeline_class: type, signature: Mapping[str, Any], prompt: Any, given: Mapping[str, Any]
) -> list[str] | list[None]:
    if prompt is None:
        if "prompt_embeds" not in given:
            raise ValueError(f"{pipeline_class.__name__} needs a prompt")
        return [None]
    if "prompt_embeds" in given:
        raise ValueError("prompt and prompt_embeds cannot both be given")
    if "prompt" not in signature:
        raise ValueError(f"{pipeline_class.__name__} takes no prompt")
    return _texts("prompt", prompt)


def _negative_prompts(
    pipeline_class: type, signature: Mapping[str, Any], negative_prompt: Any, count: int
) -> Sequence[str | None]:
    if negative_prompt is None:
        return [None] * count
    if "negative_prompt" not in signature:
        raise ValueError(f"{pipeline_class.__name__} takes no negative_prompt")
    texts = _texts("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        return texts * count
    if len(texts) != count:
        raise ValueError(
            f"{_count(len(texts), 'negative prompt')} for {_count(count, 'prompt')}: give one, or one for each"
        )
    return texts


def _images(pipeline_class: type, signature: Mapping[str, Any], image: Any, prompt: Any) -> Sequence[Any]:
    """Return one entry per prompt: an image, a list of references, or None."""
    name = pipeline_class.__name__
    count = 1 if prompt is None or isinstance(prompt, str) else len(prompt)
    if image is None:
        if "image" in signature and any(part in name for part in NEEDS_IMAGE):
            raise ValueError(f"{name} needs an image")
        return [None] * count
    if "image" not in signature:
        raise ValueError(f"{name} makes images from text alone: it takes no image")
    many = isinstance(image, Sequence) and not isinstance(image, str)
    if many and not len(image):
        raise ValueError("image is an empty list")
    if many and not isinstance(prompt, str) and prompt is not None:
        if len(image) != count:
            raise ValueError(f"{_count(len(image), 'image')} for {_count(count, 'prompt')}: give one, or one for each")
        each = [_open(one) for one in image]
    else:
        each = [_open(image)] * count
    for one in each:
        if name in ONE_IMAGE and isinstance(one, list) and len(one) > 1:
            raise ValueError(f"{name} takes one image per prompt, not {len(one)}")
    return each


def _open(image: Any) -> Any:
    """Open a path, or each path of a list, as an RGB picture. Return PIL images, tensors and arrays unchanged."""
    if isinstance(image, list | tuple):
        return [_open(one) for one in image]
    if isinstance(image, str | Path):
        from PIL import Image, ImageOps, UnidentifiedImageError

        path = Path(image).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no image file {str(image)!r}")
        try:
            with Image.open(path) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError(f"{image} is not an image that Pillow can read") from None
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise ValueError(f"{image} cannot be read to its end: {error}") from error
    if not (hasattr(image, "convert") or hasattr(image, "shape")):
        raise TypeError(f"image must be a picture, a tensor, an array or a path, not {type(image).__name__}")
    return image


def _seeds(seed: Any, count: int, given: Mapping[str, Any]) -> Sequence[int | None]:
    if "generator" in given:
        if seed is not None:
            raise ValueError("seed and generator cannot both be given")
        return [None] * count
    if seed is None:
        return [secrets.randbelow(2**32) for _ in range(count)]
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise ValueError(f"{_count(len(seed), 'seed')} for {_count(count, 'prompt')}: give one, or one for each")
        return [_seed(one) for one in seed]
    return [_seed(seed)] * count


def _seed(value: Any) -> int:
    number = whole_number("seed", value, least=0)
    if number >= 2**64:
        raise ValueError(f"seed must be below 2**64, not {number}")
    return number


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
