"""From an HTTP request to its fields and pictures. Nothing of more than the allowed size is read or decoded."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from PIL import Image, ImageOps
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from omni_runtime.serving.http.errors import ApiError, invalid
from omni_runtime.serving.http.settings import MIB, Settings

Read = TypeVar("Read")

#: Formats of reference pictures, by Pillow's names.
READABLE = ("PNG", "JPEG", "WEBP")
#: Field names of files.
FILES = ("image", "image[]", "mask", "input_reference")


async def read(request: Request, settings: Settings) -> tuple[Any, dict[str, list[bytes]]]:
    """The fields of a request, and its files by the name of their field.

    Raises:
        ApiError: the body is neither JSON nor a form, is too large, or did not arrive in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _in_time(_form(request, settings), settings)
    if kind == "application/json":
        return _json(await _in_time(_body(request, min(MIB, settings.max_body)), settings)), {}
    raise invalid(None, "the body must be application/json or multipart/form-data", "unsupported_content_type")


async def _in_time(body: Awaitable[Read], settings: Settings) -> Read:
    try:
        return await asyncio.wait_for(body, settings.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, "the body of the request did not arrive in time", code="timeout") from None


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large(limit)
    return bytes(body)


def too_large(limit: int) -> ApiError:
    """The answer to a body of more than `limit` bytes."""
    return ApiError(413, f"the body of the request may have {limit} bytes at most", code="too_large")


def _json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise invalid(None, "the body is not valid JSON", "invalid_json") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


async def _form(request: Request, settings: Settings) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    try:
        form = await request.form(max_files=settings.max_references + 1, max_fields=64)
    except (MultiPartException, HTTPException) as error:
        message = getattr(error, "message", None) or getattr(error, "detail", "")
        raise invalid(None, f"the form cannot be read: {message}", "invalid_form") from None
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in FILES:
                    raise invalid(name[:64], f"unknown file {name[:64]!r}", "unknown_parameter")
                files.setdefault(name.removesuffix("[]"), []).append(await value.read())
            elif name in fields:
                raise invalid(name[:64], f"{name[:64]} is given twice")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, files


def pictures(
    files: Sequence[bytes], settings: Settings, hold: Callable[[int], None], name: str = "image"
) -> list[Image.Image]:
    """Decode reference pictures to RGB. Their sizes are checked before they are decoded.

    Args:
        files: the pictures as they were sent.
        settings: the limits.
        hold: called with the bytes of each before it is decoded; raises an ApiError if there is no room for them.
        name: the field that they were sent as.

    Raises:
        ApiError: there are too many, one is too large, or it cannot be read.
    """
    if len(files) > settings.max_references:
        raise invalid(name, f"{name}: there may be {settings.max_references} pictures at most", "too_large")
    return [_picture(data, settings, hold, name) for data in files]


def _picture(data: bytes, settings: Settings, hold: Callable[[int], None], name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=READABLE) as picture:
            if picture.width * picture.height > settings.max_reference_pixels:
                raise Image.DecompressionBombError
            hold(4 * picture.width * picture.height)  # Pillow keeps RGB in four bytes
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombError, MemoryError):
        most = settings.max_reference_pixels
        raise invalid(name, f"{name}: a picture may have {most} pixels at most", "too_large") from None
    except ApiError:
        raise
    except Exception:  # a damaged file can raise anything
        known = ", ".join(READABLE)
        raise invalid(name, f"{name} is not a picture that can be read ({known})", "invalid_image") from None
