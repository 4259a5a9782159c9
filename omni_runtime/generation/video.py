"""Videos as files: animated WebP, and MP4 if the package `av` (PyAV, which brings FFmpeg along) is installed.

Both hold the request's settings as JSON: WebP in the EXIF field ImageDescription, MP4 in the comment. WebP is written
without loss, so its frames are those that were generated, and every browser plays it in an <img>. MP4 (H.264) is
smaller, and loses a little.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FPS", "SUFFIXES", "encode", "encoder_missing", "makes_video", "read_frames", "settings_text", "webp"]

#: Frames per second if nothing else is said: that of Wan.
FPS = 16.0

#: File name endings of videos.
SUFFIXES = (".mp4", ".webp")

_DESCRIPTION = 0x010E  # EXIF's ImageDescription
_QUALITY = "14"  # H.264's constant rate factor: 0 is lossless, 23 usual


def makes_video(pipeline_class: type) -> bool:
    """Whether the pipeline makes videos: its call takes a number of frames."""
    return "num_frames" in inspect.signature(pipeline_class.__call__).parameters


def encoder_missing(suffix: str) -> str | None:
    """What is needed to write a video of this file name ending, and how to get it; None if nothing is missing."""
    if suffix.lower() not in SUFFIXES:
        return f"videos are {' or '.join(SUFFIXES)}, not {suffix or 'without an ending'}"
    if suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        return "MP4 needs the package av: pip install av; .webp needs nothing"
    return None


def encode(suffix: str, frames: Sequence[Any], settings: Mapping[str, Any], fps: float) -> bytes:
    """A video of PIL images of one size, with `settings`, `fps` and the number of frames inside.

    Raises:
        ValueError: `suffix` is not in SUFFIXES, there are no frames, or `fps` is not positive.
        ModuleNotFoundError: MP4 needs the package av.
    """
    missing = encoder_missing(suffix)
    if missing is not None:
        raise (ValueError if suffix.lower() not in SUFFIXES else ModuleNotFoundError)(missing)
    if not frames:
        raise ValueError("a video needs at least one frame")
    if not fps > 0:
        raise ValueError(f"fps must be positive, not {fps}")
    text = json.dumps({**settings, "fps": fps, "frames": len(frames)})
    pictures = [frame.convert("RGB") for frame in frames]
    return _mp4(pictures, text, fps) if suffix.lower() == ".mp4" else webp(pictures, fps, text)


def webp(frames: Sequence[Any], fps: float, text: str | None = None, exact: bool = True) -> bytes:
    """Animated WebP of RGB images of one size: without loss if `exact`, and with `text` as its description."""
    from PIL import Image

    exif = Image.Exif()
    if text is not None:
        exif[_DESCRIPTION] = text
    ends = [round(1000 * number / fps) for number in range(len(frames) + 1)]  # whole milliseconds, without drift
    durations = [max(1, end - start) for start, end in itertools.pairwise(ends)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=list(frames[1:]),
        duration=durations,
        loop=0,
        lossless=exact,
        quality=80,
        exif=exif,
    )
    return buffer.getvalue()


def _mp4(frames: Sequence[Any], text: str, fps: float) -> bytes:
    from fractions import Fraction

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        container.metadata["comment"] = text
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = frames[0].size
        even = all(side % 2 == 0 for side in frames[0].size)
        stream.pix_fmt = "yuv420p" if even else "yuv444p"  # the usual one halves the colours' sides
        stream.options = {"crf": _QUALITY}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()


def settings_text(path: str | os.PathLike[str]) -> str | None:
    """The settings in a video file, as JSON text; None if it holds none.

    Raises:
        ModuleNotFoundError: MP4 needs the package av.
    """
    if os.fspath(path).lower().endswith(".mp4"):
        import av

        with av.open(os.fspath(path)) as container:
            return container.metadata.get("comment")
    from PIL import Image

    with Image.open(path) as image:
        return image.getexif().get(_DESCRIPTION)


def read_frames(path: str | os.PathLike[str]) -> list[Any]:
    """The frames (PIL, RGB) of a video that `encode` made.

    WebP joins frames that are alike into one that lasts longer. Such a frame is returned as often as it was written.
    """
    if os.fspath(path).lower().endswith(".mp4"):
        import av

        with av.open(os.fspath(path)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]
    from PIL import Image

    frames: list[Any] = []
    with Image.open(path) as image:
        settings = json.loads(image.getexif().get(_DESCRIPTION) or "{}")
        fps, count, end = settings.get("fps", FPS), settings.get("frames", 0), 0
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frame = image.convert("RGB")
            end += image.info.get("duration", 0)
            frames += [frame] * max(1, round(end * fps / 1000) - len(frames))
    return frames + frames[-1:] * (count - len(frames))  # the last one has no duration if it is the only one
