"""`POST /v1/images/generations` and `POST /v1/images/edits`.

Each picture is a request of its own to the engine, with the seeds seed, seed + 1, and so on. So the pictures of one
client and those of others share forwards.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from omni_runtime.compare import quality
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import OmniResult
from omni_runtime.serving.http import encoding
from omni_runtime.serving.http.connection import SILENCE, EventStream, sent_event, while_connected
from omni_runtime.serving.http.errors import ApiError, invalid, outcome_of
from omni_runtime.serving.http.fields import ImageBody, validated
from omni_runtime.serving.http.gate import Passage
from omni_runtime.serving.http.partials import Partials
from omni_runtime.serving.http.reading import pictures, read
from omni_runtime.serving.http.service import Cache, Service, with_seed
from omni_runtime.serving.jobs import Job

#: Names of the events of a stream, by whether there were references.
EVENTS = {False: "image_generation", True: "image_edit"}
#: OpenAI's clients expect a count of tokens at the end of a stream. There are none here.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@dataclass(frozen=True)
class Order:
    """One client's request, checked.

    Attributes:
        service: the model.
        body: the fields.
        one: the request for the first picture.
        cache: the cache method and its configuration.
        references: the reference pictures.
        passage: the request on its way, for the log.
        base: the server's address, as the client knows it.
        began: when the request came, by `time.monotonic`.
    """

    service: Service
    body: ImageBody
    one: GenerationRequest
    cache: Cache
    references: Sequence[Image.Image]
    passage: Passage
    base: str
    began: float

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width; None if the pipeline decides."""
        height, width = self.one.arguments.get("height"), self.one.arguments.get("width")
        return (height, width) if height and width else None

    @property
    def ratio(self) -> float:
        """Width over height if the pipeline decides: that of the last reference."""
        return self.references[-1].width / self.references[-1].height if self.references else 1.0

    def submit(self, number: int, watch: Watch | None = None, reference: bool = False) -> Job:
        """Give the engine the picture of this number; without a cache if it is the `reference`."""
        more: dict[str, Any] = {}
        if watch is not None and self.body.partial_images and self.service.no_partials is None:
            show = watch.partial(number, reference)  # the reference has them, too: their times are compared
            more["callback_on_step_end"] = Partials(self.body.partial_images, show, self.size, self.ratio)
        one = with_seed(self.one, number, **more)
        on_step = watch.step(number, reference) if watch is not None and self.body.progress else None
        return self.service.submit(one, (None, {}) if reference else self.cache, on_step)


class Watch:
    """Passes what happens in the engine's threads on to a queue of the event loop."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, int, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, kind: str, number: int, what: Any) -> None:
        """Put one item into the queue, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: no one listens any more
            self._loop.call_soon_threadsafe(self.queue.put_nowait, (kind, number, what))

    def partial(self, number: int, reference: bool) -> Callable[[int, Any], None]:
        """What `Partials` calls."""
        return lambda index, image: self.put("partial", number, (index, image, reference))

    def done(self, kind: str, number: int) -> Callable[[Job], None]:
        """What a job calls when it is over."""
        return lambda job: self.put(kind, number, None)

    def step(self, number: int, reference: bool) -> Callable[[Any], None]:
        """What the engine calls after each step."""
        return lambda step: self.put("step", number, (step, reference))


def router(service: Service) -> APIRouter:
    """The routes of pictures."""
    routes = APIRouter()
    of_body = {"schema": ImageBody.model_json_schema()}

    @routes.post("/v1/images/generations", openapi_extra={"requestBody": {"content": {"application/json": of_body}}})
    async def generations(request: Request) -> Response:
        """Make pictures from a prompt."""
        fields, files = await read(request, service.settings)
        service.check_ready()
        if files:
            raise invalid(next(iter(files)), "pictures go to /v1/images/edits", "unsupported")
        if service.needs_image:
            raise invalid("image", f"{service.name} needs a picture: use /v1/images/edits", "unsupported")
        return await _answered(service, request, fields, [])

    @routes.post("/v1/images/edits", openapi_extra={"requestBody": {"content": {"multipart/form-data": of_body}}})
    async def edits(request: Request) -> Response:
        """Make pictures from a prompt and reference pictures."""
        fields, files = await read(request, service.settings)
        service.check_ready()
        for name in ("mask", "input_reference"):
            if name in files:
                raise invalid(name, f"{name} is not supported", "unsupported")
        if not files:
            raise invalid("image", "image is missing: send it as a file of a form", "missing_required_parameter")
        if "image" not in service.takes:
            raise invalid("image", f"{service.name} makes pictures from text alone", "unsupported")
        return await _answered(service, request, fields, files["image"])

    return routes


async def _answered(service: Service, request: Request, fields: Any, files: list[bytes]) -> Response:
    passage: Passage = request.scope["state"]["passage"]
    began = time.monotonic()
    if service.makes_video:
        raise invalid(None, f"{service.name} makes videos: use /v1/videos", "unsupported")
    body: ImageBody = validated(ImageBody, fields, service.settings)
    service.check_model(body)
    references = await asyncio.to_thread(pictures, files, service.settings, passage.hold)
    files.clear()
    more = {"image": references[0] if len(references) == 1 else references} if references else {}
    one, cache = await asyncio.to_thread(service.prepared, body, more)
    if body.compare and cache[0] is None:
        raise invalid("compare", "compare needs a cache: this request has none")
    base = str(request.base_url).rstrip("/")
    order = Order(service, body, one, cache, references, passage, base, began)
    passage.note(n=body.n, size=body.size, stream=body.stream or None)
    if body.stream:
        watch = Watch()
        jobs = _submitted(order, watch)
        passage.note(outcome="cancelled")  # unless the stream comes to its end
        return EventStream(_events(order, watch, jobs), lambda: _cancel(jobs))
    return JSONResponse(await while_connected(request, _document(order)))


def _submitted(order: Order, watch: Watch | None = None) -> list[Job]:
    """The jobs of an order; none is left if the engine does not take them all."""
    jobs: list[Job] = []
    try:
        jobs.extend(order.submit(number, watch) for number in range(order.body.n))
    except BaseException:
        _cancel(jobs)
        raise
    return jobs


def _cancel(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.cancel()


async def _result(order: Order, job: Job) -> OmniResult:
    try:
        return await job
    except Exception as error:
        raise order.service.failed(error, job, order.passage.id) from None


async def _document(order: Order) -> dict[str, Any]:
    """The answer with all pictures."""
    jobs = _submitted(order)
    try:
        results = await asyncio.gather(*(_result(order, job) for job in jobs))
        data = [await _entry(order, job, result) for job, result in zip(jobs, results, strict=True)]
        if order.body.compare:
            jobs.append(order.submit(0, reference=True))
            data[0]["omni"]["reference"] = await _reference(order, results[0], jobs[-1])
    finally:
        _cancel(jobs)
    _note(order, [entry["omni"] for entry in data])
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": order.body.output_format,
        "size": _size(results[0]),
        "data": data,
        "omni": _about(order),
    }


def _about(order: Order) -> dict[str, Any]:
    """The field `omni` of an answer, besides those of its pictures."""
    return {
        "id": order.passage.id,
        "model": order.service.name,
        "seconds": round(time.monotonic() - order.began, 4),
    }


def _note(order: Order, facts: Sequence[dict[str, Any]]) -> None:
    """Put what was made into the log line."""
    order.passage.note(
        method=facts[0]["method"],
        steps=sum(one["steps"] for one in facts),
        computed=sum(one["computed"] for one in facts),
        batch=round(sum(one["batch"] for one in facts) / len(facts), 2),
    )


def _size(result: OmniResult) -> str:
    return "{}x{}".format(*result.images[0].size)


async def _entry(order: Order, job: Job, result: OmniResult) -> dict[str, Any]:
    """One picture of an answer."""
    written = await asyncio.to_thread(_written, order, result.images[0], order.service.written(result))
    return {**written, "omni": order.service.facts(job, result)}


def _written(order: Order, image: Any, settings: dict[str, Any] | None) -> dict[str, str]:
    """A picture in the form that the client wants it."""
    kind = order.body.output_format
    data = encoding.picture(image, kind, order.body.output_compression, settings)
    if order.body.response_format == "b64_json":
        return {"b64_json": base64.b64encode(data).decode()}
    return {"url": f"{order.base}/files/{order.service.files.keep(data, encoding.MEDIA[kind])}"}


async def _reference(order: Order, result: OmniResult, job: Job) -> dict[str, Any]:
    """The same picture without a cache, and how far the picture is from it."""
    reference = await _result(order, job)
    entry = await _entry(order, job, reference)
    psnr = float(await asyncio.to_thread(quality.psnr, result.images[0], reference.images[0]))
    return {**entry, "identical": psnr == float("inf"), "psnr": None if psnr == float("inf") else round(psnr, 2)}


# Streams


async def _events(order: Order, watch: Watch, jobs: list[Job]) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    facts: list[dict[str, Any]] = []
    try:
        for number, job in enumerate(jobs):
            job.add_done_callback(watch.done("done", number))
        async for data in _happenings(order, watch, jobs, facts):
            yield sent_event(data["type"], data) if data else b": waiting\n\n"
        _note(order, facts)
        order.passage.note(outcome="ok")
    except ApiError as error:
        order.passage.note(outcome=outcome_of(error.status))
        yield sent_event("error", error.body())


async def _happenings(
    order: Order, watch: Watch, jobs: list[Job], facts: list[dict[str, Any]]
) -> AsyncGenerator[dict[str, Any], None]:
    """Each event; an empty one if nothing has happened for a while."""
    left, first = len(jobs), None
    while left:
        try:
            kind, number, what = await asyncio.wait_for(watch.queue.get(), SILENCE)
        except asyncio.TimeoutError:
            yield {}
            continue
        if kind == "step":
            yield _step(number, *what)
        elif kind == "partial":
            index, image, of_reference = what
            shown = await asyncio.to_thread(_written, order, image, None)
            more = {**shown, "partial_image_index": index, "index": number}
            more |= {"reference": True} if of_reference else {}
            yield _event(order, "partial_image", image.size, more)
        elif kind == "done":
            left -= 1
            result = await _result(order, jobs[number])
            entry = await _entry(order, jobs[number], result)
            facts.append(entry["omni"])
            entry["omni"] |= _about(order) | {"seconds": entry["omni"]["seconds"]}
            if order.body.partial_images and order.service.no_partials is not None:
                entry["omni"]["partial_images"] = f"none: {order.service.no_partials}"
            more = {**entry, "usage": USAGE, "index": number}
            yield _event(order, "completed", result.images[0].size, more)
            if order.body.compare:
                first, left = result, left + 1
                jobs.append(order.submit(0, watch, reference=True))
                jobs[-1].add_done_callback(watch.done("reference", 0))
        elif kind == "reference" and first is not None:
            left -= 1
            entry = await _reference(order, first, jobs[-1])
            yield {"type": "omni.reference", "size": _size(first), **entry}


def _event(order: Order, kind: str, size: tuple[int, int], more: dict[str, Any]) -> dict[str, Any]:
    """The fields of OpenAI's events."""
    return {
        "type": f"{EVENTS[bool(order.references)]}.{kind}",
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": order.body.output_format,
        "quality": order.body.quality or "auto",
        "size": "{}x{}".format(*size),
        **more,
    }


def _step(number: int, step: Any, reference: bool) -> dict[str, Any]:
    return {
        "type": "omni.step",
        "index": number,
        "step": step.step,
        "steps": step.steps,
        "computed": step.computed,
        "reference": reference,
    }
