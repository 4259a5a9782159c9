"""What a request gave: images, what the cache did, how long it took, and the settings that make it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from omni_runtime.cache.report import CacheReport

#: The PNG text chunk that holds the settings, as JSON.
PNG_KEY = "omni"


@dataclass(frozen=True)
class Timings:
    """Seconds of one request, measured on the device that ran it.

    Attributes:
        total: from the call of the pipeline to its result.
        before: encoding the prompt and whatever else precedes the denoising loop.
        steps: each denoising step.
        after: from the last step to the result: decoding the latents.
    """

    total: float
    before: float
    steps: list[float]
    after: float

    def to_dict(self) -> dict[str, Any]:
        """The seconds by name, fit for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class OmniResult:
    """One prompt's result.

    Attributes:
        images: PIL images, or whatever `output_type` made the pipeline return.
        cache: what was computed and what was skipped; None without a cache.
        timings: seconds.
        prompt: the prompt; None where embeddings were given.
        seed: makes the same images again; None where a generator was given.
        settings: all that the request depended on, fit for JSON.
        peak_memory: bytes that tensors took on the device at most, the model's included; None on the CPU.
    """

    images: Any
    cache: CacheReport | None
    timings: Timings
    prompt: str | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    peak_memory: int | None = None

    def save(self, path: str | Path) -> list[Path]:
        """Write the images as PNG, with the settings in a text chunk.

        The first goes to `path`, further ones to `<stem>-2.png`, `<stem>-3.png` and so on. Directories are made.

        Raises:
            TypeError: the images are tensors or arrays (`output_type` other than "pil").
        """
        path = Path(path)
        for image in self.images:
            if not hasattr(image, "convert"):
                raise TypeError(f'only PIL images can be saved, not {type(image).__name__}: use output_type="pil"')
        paths = [
            path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            for number in range(1, len(self.images) + 1)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        for image, target in zip(self.images, paths, strict=True):
            write_png(image, target, self.settings)
        return paths


def write_png(image: Any, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a PIL image as PNG whose tEXt chunk "omni" holds `settings` as JSON."""
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    chunk.add_text(PNG_KEY, json.dumps(settings))  # ASCII, as tEXt wants it
    image.save(path, format="PNG", pnginfo=chunk)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a PNG that `OmniResult.save` wrote. Raises ValueError where there are none."""
    from PIL import Image

    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(PNG_KEY)
    if text is None:
        raise ValueError(f"{path} holds no settings of omni")
    return json.loads(text)


def jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: numbers, text and None as they are, containers through, anything else described."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    shape = getattr(value, "shape", None) or getattr(value, "size", None)
    return f"<{type(value).__name__} {tuple(shape)}>" if isinstance(shape, tuple) else f"<{type(value).__name__}>"


def identified(value: Any) -> Any:
    """Like `jsonable`, but a picture, tensor or array by a digest of its contents."""
    if isinstance(value, Mapping):
        return {str(key): identified(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [identified(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if hasattr(value, "convert"):
        return [value.mode, list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]
    return jsonable(value)
