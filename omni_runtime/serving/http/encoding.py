"""Pictures and videos as files, with their settings inside where the format is ours."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from omni_runtime.generation import video
from omni_runtime.generation.result import png

#: Output format → media type.
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}


def picture(image: Any, kind: str, quality: int = 90, settings: Mapping[str, Any] | None = None) -> bytes:
    """A PIL image as PNG, JPEG or WebP. `quality` is for the last two, `settings` for PNG."""
    if kind == "png":
        return png(image, settings or {})
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=kind.upper(), quality=quality)
    return buffer.getvalue()


def clip(frames: Any, kind: str, settings: Mapping[str, Any], fps: float) -> bytes:
    """The frames of a video as MP4 or animated WebP."""
    return video.encode(f".{kind}", frames, settings, fps)
