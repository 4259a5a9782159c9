"""What a request gave: images, what the cache did, how long it took, and the settings that make it again."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from omni_runtime import files

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

    def __post_init__(self) -> None:
        if _has_nan(self.images):
            raise NotANumberError(_NAN)

    def save(self, path: str | Path) -> list[Path]:
        """Write the images as PNG, with the settings in a text chunk.

        The first goes to `path`, further ones to `<stem>-2.png`, `<stem>-3.png` and so on. Directories are made.

        Raises:
            TypeError: the images are tensors or arrays (`output_type` other than "pil").
            files.WriteError: a file that could not be written, such as on a full disk. It is not there, or as it was;
                the pictures before it are kept, and the text says how many.
        """
        path = Path(path)
        for image in self.images:
            if not hasattr(image, "convert"):
                raise TypeError(f'only PIL images can be saved, not {type(image).__name__}: use output_type="pil"')
        paths = [
            path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            for number in range(1, len(self.images) + 1)
        ]
        files.make_directory(path.parent)
        kept = 0
        try:
            for image, target in zip(self.images, paths, strict=True):
                write_png(image, target, self.settings)
                kept += 1
        except files.WriteError as error:
            if len(paths) == 1:
                raise
            raise error.keeping(f"{kept} of {len(paths)} pictures were kept") from error
        return paths


def write_png(image: Any, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a PIL image as PNG whose tEXt chunk "omni" holds `settings` as JSON. Raises as `files.write` does."""
    files.write(path, png(image, settings))


def png(image: Any, settings: Mapping[str, Any]) -> bytes:
    """A PIL image as PNG whose tEXt chunk "omni" holds `settings` as JSON."""
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    chunk.add_text(PNG_KEY, json.dumps(settings))  # ASCII, as tEXt wants it
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunk)
    return buffer.getvalue()


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a PNG that `OmniResult.save` wrote. Raises ValueError where there are none."""
    from PIL import Image

    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(PNG_KEY)
    if text is None:
        raise ValueError(f"{path} holds no settings of omni")
    return files.parse_json(text, f"the text chunk {PNG_KEY!r} of {path}")


class NotANumberError(ValueError):
    """A result that holds NaN: no picture could be made of it but a black one."""


_NAN = (
    "the picture is not a number (NaN): the model, its weights or a scheduler with so few steps gave no finite values; "
    "try more steps, another dtype (float16 overflows first), or no cache"
)


@contextmanager
def not_a_number() -> Iterator[None]:
    """While open, in this thread, a NaN that numpy is to turn into a pixel is an error.

    diffusers makes pictures of 8 bits by `(images * 255).round().astype("uint8")`, of which numpy only warns where a
    value is NaN; the pixel is black then. Other floating-point warnings of numpy stay warnings.

    Raises:
        NotANumberError: (a ValueError) from within the block.
    """
    with np.errstate(invalid="log", call=_CastsOfNaN()):
        yield


class _CastsOfNaN:
    """What `np.errstate(invalid="log")` tells of invalid operations, by `write`."""

    def write(self, message: str) -> None:
        if "in cast" in message:
            raise NotANumberError(_NAN)
        warnings.warn(message.strip().removeprefix("Warning: "), RuntimeWarning, stacklevel=2)


def _has_nan(images: Any) -> bool:
    """Whether tensors or arrays among `images` hold NaN; PIL images cannot."""
    if isinstance(images, list | tuple):
        return any(map(_has_nan, images))
    if isinstance(images, np.ndarray):
        return images.dtype.kind in "fc" and bool(np.isnan(images).any())
    if isinstance(images, torch.Tensor):
        return images.is_floating_point() and bool(images.isnan().any())
    return False


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
