"""`/v1/videos`: a video is made in the background; its job is asked for, and then its content."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from omni_runtime.generation import video
from omni_runtime.serving.http import encoding, logs
from omni_runtime.serving.http.errors import ApiError, invalid
from omni_runtime.serving.http.fields import VideoBody, validated
from omni_runtime.serving.http.gate import Passage
from omni_runtime.serving.http.reading import pictures, read
from omni_runtime.serving.http.service import Service
from omni_runtime.serving.jobs import Job, State

STATUS = {State.QUEUED: "queued", State.RUNNING: "in_progress"}


@dataclass(eq=False)
class Making:
    """A video that is made, or was.

    Attributes:
        id: its id, which cannot be guessed.
        body: what was asked for.
        job: the engine's job, while it is made. A finished job has all frames.
        asked: the arguments of the pipeline in `document`.
        seed: the seed.
        free: called when it is no longer made: its references are no longer held.
        fps: frames per second.
        kind: "mp4" or "webp".
        created, completed: Unix times.
        files: names of the kept files, by variant.
        facts: what was computed.
        error: why there is no video.
        deleted: whether it was deleted before it was finished.
    """

    body: VideoBody
    job: Job | None
    asked: Mapping[str, Any]
    seed: int | None
    free: Callable[[], None]
    fps: float
    kind: str
    id: str = field(default_factory=lambda: f"video_{secrets.token_urlsafe(18)}")
    created: int = field(default_factory=lambda: int(time.time()))
    completed: int | None = None
    files: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    error: ApiError | None = None
    deleted: bool = False
    task: asyncio.Task[None] | None = None

    def document(self, service: Service) -> dict[str, Any]:
        """OpenAI's object of a video."""
        asked, job = self.asked, self.job
        steps = asked.get("num_inference_steps") or service.about()["omni"]["defaults"]["steps"]
        over = self.completed is not None or self.error is not None
        share = 100 if self.completed else 0 if job is None or not steps else min(99, 100 * job.steps // steps)
        frames = self.facts.get("frames") or asked.get("num_frames")
        size = self.facts.get("size") or (
            f"{asked['width']}x{asked['height']}" if asked.get("width") and asked.get("height") else "auto"
        )
        state = State.RUNNING if job is None else job.state
        error = None if self.error is None else {"code": self.error.code, "message": str(self.error)}
        return {
            "id": self.id,
            "object": "video",
            "model": service.name,
            "status": ("failed" if error else "completed") if over else STATUS.get(state, "in_progress"),
            "progress": share,
            "created_at": self.created,
            "completed_at": self.completed,
            "expires_at": None if not self.completed else self.completed + int(service.settings.keep_seconds),
            "prompt": self.body.prompt,
            "seconds": "" if not frames else f"{frames / self.fps:g}",
            "size": size,
            "remixed_from_video_id": None,
            "error": error,
            "omni": {"format": self.kind, "fps": self.fps, "seed": self.seed, **self.facts},
        }


def router(service: Service) -> APIRouter:
    """The routes of videos."""
    routes = APIRouter()
    every: OrderedDict[str, Making] = OrderedDict()
    of_body = {"schema": VideoBody.model_json_schema()}

    @routes.post("/v1/videos", openapi_extra={"requestBody": {"content": {"multipart/form-data": of_body}}})
    async def create(request: Request) -> Response:
        """Begin a video."""
        fields, files = await read(request, service.settings)
        service.check_ready()
        if not service.makes_video:
            raise invalid(None, f"{service.name} makes pictures: use /v1/images/generations", "unsupported")
        making = await _begun(service, fields, files, request.scope["state"]["passage"])
        every[making.id] = making
        _forget_old(every, service.settings.keep_files + service.settings.queue + service.settings.in_flight)
        making.task = asyncio.create_task(_finish(service, making))
        request.scope["state"]["passage"].note(video=making.id[:12])
        return JSONResponse(making.document(service))

    def found(name: str) -> Making:
        if name not in every:
            raise ApiError(404, "there is no such video, or it has expired", param="video_id", code="not_found")
        return every[name]

    @routes.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str) -> Response:
        """How far a video is."""
        return JSONResponse(found(video_id).document(service))

    @routes.get("/v1/videos/{video_id}/content")
    async def content(video_id: str, variant: str = "video") -> Response:
        """The video itself, or its first frame as `thumbnail`."""
        making = found(video_id)
        if making.error is not None:
            raise ApiError(404, "there is no video: it could not be made", param="video_id", code="failed")
        if making.completed is None:
            raise ApiError(409, "the video is not finished yet", param="video_id", code="not_finished")
        if variant not in making.files:
            raise invalid("variant", f"variant must be one of {', '.join(making.files)}", "unsupported")
        kept = service.files.get(making.files[variant])
        if kept is None:
            raise ApiError(404, "the video has expired", param="video_id", code="expired")
        return Response(kept.data, media_type=kept.media_type)

    @routes.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> Response:
        """Forget a video; it is cancelled if it is not finished."""
        making = found(video_id)
        del every[video_id]
        making.deleted = True
        if making.job is not None:
            making.job.cancel()
        for name in making.files.values():
            service.files.remove(name)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    return routes


async def _begun(service: Service, fields: Any, files: dict[str, list[bytes]], passage: Passage) -> Making:
    body: VideoBody = validated(VideoBody, fields, service.settings)
    service.check_model(body)
    for name in files:
        if name != "input_reference":
            raise invalid(name, f"unknown file {name!r}: a reference is input_reference", "unknown_parameter")
        if "image" not in service.takes:
            raise invalid(name, f"{service.name} makes videos from text alone", "unsupported")
    kind = body.output_format or ("webp" if video.encoder_missing(".mp4") else "mp4")
    if missing := video.encoder_missing(f".{kind}"):
        raise invalid("output_format", f"output_format: {missing}", "unsupported")
    sent = files.pop("input_reference", [])
    references = await asyncio.to_thread(pictures, sent, service.settings, passage.hold, "input_reference")
    more: dict[str, Any] = {"image": references[0]} if references else {}
    takes_rate = "frame_rate" in service.takes
    fps = body.fps or service.omni.defaults.get("frame_rate") or _default(service, "frame_rate") or video.FPS
    if takes_rate and body.fps:
        more["frame_rate"] = body.fps
    frames = body.frames if body.seconds is None else _frames(service, body.seconds * fps)
    if frames is not None and frames > service.settings.max_frames:
        raise invalid("seconds", f"seconds: there may be {service.settings.max_frames} frames at most", "too_large")
    more["num_frames"] = frames
    one, cache = await asyncio.to_thread(service.prepared, body, more)
    job = service.submit(one, cache)
    asked = {name: one.arguments.get(name) for name in ("num_inference_steps", "num_frames", "width", "height")}
    return Making(body, job, asked, one.seed, passage.hand_over(), float(fps), kind)


def _default(service: Service, name: str) -> Any:
    return service.takes[name].default if name in service.takes else None


def _frames(service: Service, wanted: float) -> int:
    """The nearest number of frames that the model can make: one more than a multiple of what its VAE joins."""
    joined = getattr(service.omni.pipe, "vae_scale_factor_temporal", None) or 1
    return max(0, round((wanted - 1) / joined)) * joined + 1


async def _finish(service: Service, making: Making) -> None:
    """Wait for the video, and keep it, if it was not deleted meanwhile."""
    began, job = time.monotonic(), making.job
    assert job is not None
    try:
        result = await job
        frames = result.frames[0]
        written = service.written(result)
        clip = await asyncio.to_thread(encoding.clip, frames, making.kind, written, making.fps)
        first = await asyncio.to_thread(encoding.picture, frames[0], "webp")
        if making.deleted:
            raise ApiError(404, "the video was deleted", code="deleted")
        making.files = {
            "video": service.files.keep(clip, encoding.MEDIA[making.kind]),
            "thumbnail": service.files.keep(first, encoding.MEDIA["webp"]),
        }
        size = "{}x{}".format(*frames[0].size)
        making.facts = {"frames": len(frames), "size": size, **service.facts(job, result)}
        making.completed = int(time.time())
    except Exception as error:
        making.error = service.failed(error, job, making.id[:12])
    finally:
        making.job = None
        making.free()
    facts = {name: making.facts.get(name) for name in ("method", "steps", "computed", "batch")}
    logs.event(
        "video", id=making.id[:12], outcome="ok" if making.error is None else making.error.code,
        seconds=round(time.monotonic() - began, 4), **facts,
    )  # fmt: skip


def _forget_old(every: OrderedDict[str, Making], most: int) -> None:
    for name in [name for name, making in every.items() if making.job is None][: max(0, len(every) - most)]:
        del every[name]
