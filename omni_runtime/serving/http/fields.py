"""The fields of the requests: those of OpenAI's API, and our own."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from omni_runtime.generation.checks import suggestion
from omni_runtime.serving.http.errors import ApiError, invalid
from omni_runtime.serving.http.settings import Settings

FORMATS = ("png", "jpeg", "webp")
#: Fields of OpenAI's API that are accepted and change nothing here.
IGNORED = ("user", "safety_identifier", "style", "moderation", "input_fidelity")
#: The values of OpenAI's field `quality` that are no presets of ours, and their presets; None: the server's own cache.
QUALITIES = {"auto": None, "low": "fast", "medium": "balanced", "standard": "balanced", "hd": "high"}


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _parsed(value: Any) -> Any:
    """A form has an object as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON object") from None


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Object = Annotated[dict[str, Any], BeforeValidator(_parsed)]


class Body(BaseModel):
    """What every request has."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    prompt: str = Field(description="what the picture or video should show")
    model: str | None = Field(None, description="the name of the model, as in /v1/models; may be left out")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto: the model's own size")
    seed: Whole | None = Field(None, ge=0, lt=2**64, description="makes the same picture again; by default random")
    steps: Whole | None = Field(None, ge=1, description="denoising steps; by default the model's own number")
    guidance: Number | None = Field(None, ge=0, le=1000, description="how closely to follow the prompt")
    negative_prompt: str | None = Field(None, description="what it should not show")
    cache_backend: str | None = Field(None, description="the cache method; null or 'none': no cache")
    cache_config: Object | None = Field(None, description="keys of the cache method")
    quality: Literal["auto", "low", "medium", "standard", "hd", "exact", "high", "balanced", "fast"] | None = Field(
        None, description="chooses the cache by a preset, instead of cache_backend; auto: the server's own cache"
    )
    user: str | None = None
    safety_identifier: str | None = None
    style: str | None = None
    moderation: str | None = None
    input_fidelity: str | None = None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _text(cls, value: str | None) -> str | None:
        try:
            (value or "").encode()
        except UnicodeEncodeError:
            raise ValueError("must be text that UTF-8 can hold") from None
        return value

    @property
    def preset(self) -> str | None:
        """The preset of the cache `auto` that `quality` asks for; None for the cache of the other fields."""
        return QUALITIES.get(self.quality, self.quality) if self.quality is not None else None

    @property
    def width_and_height(self) -> tuple[int, int] | None:
        """The size; None for the model's own."""
        if self.size in (None, "auto"):
            return None
        match = re.fullmatch(r"([1-9]\d{0,18})[xX×]([1-9]\d{0,18})", self.size or "")
        if match is None:
            raise invalid("size", "size must be WIDTHxHEIGHT in pixels, like 1024x1024, or auto")
        return int(match[1]), int(match[2])

    def check(self, settings: Settings) -> None:
        """Check the fields against the server's limits.

        Raises:
            ApiError: a value is above its limit; the message gives the limit.
        """
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if text is not None and len(text) > settings.max_prompt:
                raise invalid(
                    name, f"{name} must have {settings.max_prompt} characters at most, not {len(text)}", "too_long"
                )
        _at_most("steps", self.steps, settings.max_steps)
        if self.preset is not None and {"cache_backend", "cache_config"} & self.model_fields_set:
            raise invalid("quality", "quality chooses the cache by itself: leave cache_backend and cache_config out")
        size = self.width_and_height
        if size is not None:
            if max(size) > settings.max_side:
                raise invalid("size", f"size: a side must be {settings.max_side} pixels at most", "too_large")
            if size[0] * size[1] > settings.max_pixels:
                raise invalid("size", f"size: there may be {settings.max_pixels} pixels at most", "too_large")


class ImageBody(Body):
    """`POST /v1/images/generations`."""

    n: Whole = Field(1, ge=1, description="number of pictures; they have the seeds seed, seed + 1, ...")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Whole = Field(90, ge=0, le=100, description="quality of JPEG and WebP")
    background: Literal["opaque", "auto"] = "auto"
    stream: bool = False
    partial_images: Whole = Field(0, ge=0, le=3, description="unfinished pictures in a stream")
    progress: bool = Field(False, description="in a stream: an event omni.step after each step")
    compare: bool = Field(False, description="also make the picture without a cache, and return the PSNR between them")

    def check(self, settings: Settings) -> None:
        """As `Body.check`."""
        super().check(settings)
        _at_most("n", self.n, settings.max_n)
        if self.compare and self.n > 1:
            raise invalid("compare", "compare is for one picture: n must be 1")
        if self.partial_images and not self.stream:
            raise invalid("partial_images", "partial_images needs stream")
        if self.progress and not self.stream:
            raise invalid("progress", "progress needs stream")
        if self.stream and self.response_format == "url":
            raise invalid("response_format", "a stream holds the pictures themselves: response_format must be b64_json")


class VideoBody(Body):
    """`POST /v1/videos`."""

    seconds: Number | None = Field(None, gt=0, description="length; frames may be given instead")
    frames: Whole | None = Field(None, ge=1, description="number of frames; by default the model's own")
    fps: Number | None = Field(None, gt=0, le=240, description="frames per second; by default the model's own, or 16")
    output_format: Literal["mp4", "webp"] | None = Field(None, description="by default mp4 if the server can")

    def check(self, settings: Settings) -> None:
        """As `Body.check`."""
        super().check(settings)
        if self.seconds is not None and self.frames is not None:
            raise invalid("seconds", "seconds and frames cannot both be given")
        _at_most("frames", self.frames, settings.max_frames)


def _at_most(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise invalid(name, f"{name} must be {limit} at most", "too_large")


def validated(kind: type[Body], given: Any, settings: Settings) -> Any:
    """The fields of a request, checked.

    Args:
        kind: the class of its fields.
        given: the fields by name.

    Raises:
        ApiError: a field is unknown, missing, or has a wrong value; it names the first such field.
    """
    if not isinstance(given, dict):
        raise invalid(None, "the body must be a JSON object")
    if "num_inference_steps" in given:  # another name for steps
        given = dict(given)
        steps = given.pop("num_inference_steps")
        if given.setdefault("steps", steps) != steps:
            raise invalid("steps", "steps and num_inference_steps differ: give one of them")
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise _of_validation(error, kind) from None
    body.check(settings)
    return body


def _of_validation(error: ValidationError, kind: type[Body]) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0])[:64] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        known = [*kind.model_fields, "num_inference_steps"]
        return invalid(name, f"unknown field {name!r}{suggestion(str(name), known)}", "unknown_parameter")
    if first["type"] == "missing":
        return invalid(name, f"{name} is missing", "missing_required_parameter")
    words = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return invalid(name, f"{name} {words[:1].lower()}{words[1:]}" if name else words)
