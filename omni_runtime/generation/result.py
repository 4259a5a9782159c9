"""The result of a request: its images or videos, the cache's report, its times, and the settings that reproduce it."""

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
from omni_runtime.generation import video

if TYPE_CHECKING:
    from omni_runtime.cache.report import CacheReport

#: The PNG text chunk that holds the settings, as JSON.
PNG_KEY = "omni"


@dataclass(frozen=True)
class Timings:
    """Seconds of one request, measured on the device that ran it.

    Attributes:
        total: from the pipeline's call to its result.
        before: from the call to the denoising loop: encoding the prompt and other preparations.
        steps: one value per denoising step.
        after: from the last step to the result: decoding the latents.
    """

    total: float
    before: float
    steps: list[float] = field(repr=False)
    after: float

    def to_dict(self) -> dict[str, Any]:
        """Return the seconds by name, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class OmniResult:
    """One prompt's result.

    Attributes:
        images: PIL images, or what the pipeline returns for another `output_type`; None from a pipeline of videos.
        cache: the cache's report: which steps were computed and which were skipped. None without a cache.
        timings: the request's seconds.
        prompt: the prompt; None if embeddings were given instead.
        seed: the seed that reproduces the images; None if a generator was given.
        settings: everything that the request depended on, ready for JSON.
        peak_memory: the largest number of bytes that tensors held on the device, including the model; None on the CPU.
        frames: the videos, each a list of PIL images, or what the pipeline returns for another `output_type`; None from
            a pipeline of images.

    Raises:
        NotANumberError: the images or frames are tensors or arrays that hold NaN.
    """

    images: Any
    cache: CacheReport | None
    timings: Timings
    prompt: str | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    peak_memory: int | None = None
    frames: Any = None

    def __post_init__(self) -> None:
        if _has_nan(self.images) or _has_nan(self.frames):
            raise NotANumberError(_NAN)

    def save(self, path: str | Path, fps: float | None = None) -> list[Path]:
        """Write the images as PNG, or the videos as MP4 or animated WebP, with the settings inside.

        The first one goes to `path`, further ones to `<stem>-2.png`, `<stem>-3.png` and so on. Missing directories are
        created.

        Args:
            path: for videos, it ends in ".mp4" or ".webp".
            fps: frames per second of videos; by default the request's `frame_rate`, else 16, as Wan has.

        Returns:
            The paths of the files.

        Raises:
            TypeError: the images or frames are tensors or arrays (`output_type` other than "pil").
            ValueError: the path has a wrong ending, or `fps` is given for images or not positive.
            ModuleNotFoundError: MP4 needs the package av.
            files.WriteError: a file cannot be written, for example because the disk is full. An existing file of that
                name is unchanged. Images that were already written are kept, and the message says how many.
        """
        path = Path(path)
        every: list[list[Any]] = [[image] for image in self.images] if self.frames is None else self.frames
        for image in (one for images in every for one in images):
            if not hasattr(image, "convert"):
                raise TypeError(f'only PIL images can be saved, not {type(image).__name__}: use output_type="pil"')
        if self.frames is None and (fps is not None or path.suffix.lower() == ".mp4"):
            raise ValueError(f"{path}: these are pictures, not videos: give a .png file and no fps")
        if self.frames is not None and (missing := video.encoder_missing(path.suffix)):
            raise (ValueError if path.suffix.lower() not in video.SUFFIXES else ModuleNotFoundError)(missing)
        paths = [
            path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            for number in range(1, len(every) + 1)
        ]
        files.make_directory(path.parent)
        kept = 0
        try:
            for images, target in zip(every, paths, strict=True):
                if self.frames is None:
                    write_png(images[0], target, self.settings)
                else:
                    rate = fps or self.settings.get("frame_rate") or video.FPS
                    files.write(target, video.encode(path.suffix, images, self.settings, rate))
                kept += 1
        except files.WriteError as error:
            if len(paths) == 1:
                raise
            things = "pictures" if self.frames is None else "videos"
            raise error.keeping(f"{kept} of {len(paths)} {things} were kept") from error
        return paths


def write_png(image: Any, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a PIL image as PNG whose tEXt chunk "omni" holds `settings` as JSON. Raises as `files.write` does."""
    files.write(path, png(image, settings))


def png(image: Any, settings: Mapping[str, Any]) -> bytes:
    """A PIL image as PNG whose tEXt chunk "omni" holds `settings` as JSON."""
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    chunk.add_text(PNG_KEY, json.dumps(settings))  # ASCII, as a tEXt chunk requires
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunk)
    return buffer.getvalue()


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a PNG or video that `OmniResult.save` wrote.

    Raises:
        ValueError: the file holds no settings.
        ModuleNotFoundError: MP4 needs the package av.
    """
    from PIL import Image

    if Path(path).suffix.lower() in video.SUFFIXES:
        text, place = video.settings_text(path), "description"
    else:
        place = f"text chunk {PNG_KEY!r}"
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(PNG_KEY)
    if text is None:
        raise ValueError(f"{path} holds no settings of omni")
    return files.parse_json(text, f"the {place} of {path}")


class NotANumberError(ValueError):
    """The result holds NaN. A picture made from it would be black."""


_NAN = (
    "the picture contains NaN: the model, its weights or a scheduler with so few steps gave values that are not "
    "finite; try more steps, another dtype (float16 overflows first), or no cache"
)


@contextmanager
def not_a_number() -> Iterator[None]:
    """Context manager: in this thread, raise an error when numpy casts NaN to a pixel.

    diffusers makes 8-bit pictures with `(images * 255).round().astype("uint8")`. numpy only warns about NaN there, and
    the pixel becomes black. Other floating-point warnings of numpy stay warnings.

    Raises:
        NotANumberError: a value is NaN (raised inside the block; a subclass of ValueError).
    """
    with np.errstate(invalid="log", call=_CastsOfNaN()):
        yield


class _CastsOfNaN:
    """Receives numpy's messages about invalid operations: `np.errstate(invalid="log")` calls `write`."""

    def write(self, message: str) -> None:
        if "in cast" in message:
            raise NotANumberError(_NAN)
        warnings.warn(message.strip().removeprefix("Warning: "), RuntimeWarning, stacklevel=2)


def _has_nan(images: Any) -> bool:
    """Whether a tensor or array in `images` holds NaN. PIL images cannot."""
    if isinstance(images, list | tuple):
        return any(map(_has_nan, images))
    if isinstance(images, np.ndarray):
        return images.dtype.kind in "fc" and bool(np.isnan(images).any())
    if isinstance(images, torch.Tensor):
        return images.is_floating_point() and bool(images.isnan().any())
    return False


def jsonable(value: Any) -> Any:
    """Convert `value` for JSON.

    Numbers, text and None stay as they are. Containers are converted entry by entry. Anything else becomes a short
    description, such as "<Tensor (1, 16)>".
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    shape = getattr(value, "shape", None) or getattr(value, "size", None)
    return f"<{type(value).__name__} {tuple(shape)}>" if isinstance(shape, tuple) else f"<{type(value).__name__}>"


def identified(value: Any) -> Any:
    """Like `jsonable`, but pictures, tensors and arrays become a digest of their contents."""
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
