"""The embedded models that the program trains, by name."""

from __future__ import annotations

from . import qwen_image, qwen_image_edit, wan, z_image

__all__ = ["MODELS"]

MODELS = {row.name: row for row in (qwen_image.MODEL, z_image.MODEL, qwen_image_edit.MODEL, wan.MODEL)}
