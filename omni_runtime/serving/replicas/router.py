"""The front of several replicas: an ASGI application that passes requests on, and sends them again if a replica dies.

A request is passed on with its whole body. Its seed is fixed first, so a replica that is asked again gives the same
pictures. An answer that is no stream is sent when it is complete. Of a stream that is asked for again, events that the
client has are left out. So a request that was taken is answered, unless it ends `ATTEMPTS` replicas.

What replicas would hold in their memory is held here, or beside them: videos, and pictures under an address.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol

from omni_runtime.serving.http import logs
from omni_runtime.serving.http.errors import CLIENT_LEFT, ApiError
from omni_runtime.serving.http.service import State
from omni_runtime.serving.http.settings import Settings
from omni_runtime.serving.http.store import Kept
from omni_runtime.serving.replicas.application import Ask, Head, LostError
from omni_runtime.serving.replicas.streams import Stream, start
from omni_runtime.serving.replicas.videos import Video

__all__ = ["ATTEMPTS", "FullError", "LostError", "Replicas", "Router", "seeded"]

#: So often a request is passed on if its replica dies each time.
ATTEMPTS = 4
#: From this attempt on, such requests are passed on one at a time: one of them may be what ends the replicas.
ALONE = 3
#: Seconds before a request is passed on again.
PAUSE = 0.2
#: Answers that are the same for all, and are kept.
CONSTANT = re.compile(r"/|/openapi\.json|/v1/models(/[^/]+)*")
#: Addresses, as the log and the metrics name them.
ROUTES = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
    "/v1/videos/{video_id}/content",
    "/v1/videos/{video_id}",
    "/v1/models",
    "/v1/models/{name}",
    "/files/{name}",
    "/health",
    "/ready",
    "/metrics",
    "/openapi.json",
    "/",
)

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class FullError(Exception):
    """Too many requests wait."""


class Replicas(Protocol):
    """What a router needs of its replicas."""

    state: State

    @property
    def ready(self) -> bool:
        """Whether requests are taken, and a replica is there to answer them."""

    def ask(self, ask: Ask, follow: bool = False) -> AsyncGenerator[Any, None]:
        """The answer of one of them: `Application.ask`, or `followed` if `follow`. Raises LostError and FullError."""

    async def kept(self, name: str) -> Kept | None:
        """A picture that one of them has kept."""

    async def measured(self) -> str:
        """What they and the front have counted."""

    def retry_after(self) -> int:
        """Seconds after which there is probably room."""


class Router:
    """See the module's docstring.

    Args:
        replicas: the replicas.
        settings: the limits.

    Attributes:
        again: how many requests were passed on again.
    """

    def __init__(self, replicas: Replicas, settings: Settings) -> None:
        self._replicas = replicas
        self._settings = settings
        self._constant: dict[str, tuple[Head, bytes]] = {}
        self._videos: OrderedDict[str, Video] = OrderedDict()
        self._alone = asyncio.Lock()
        self.again = 0

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        path, method = scope["path"], scope["method"]
        route = _route(path)
        scope["route"] = SimpleNamespace(path=route)
        if route in ("/health", "/ready", "/metrics") and method == "GET":
            await self._about(route, send)
        elif route == "/files/{name}" and method == "GET":
            await self._file(path.rpartition("/")[2], send)
        elif route is not None and route.startswith("/v1/videos/"):
            await self._of_video(method, path, scope, send)
        else:
            self._check_ready()
            ask = seeded(await _read(scope, receive, self._settings.body_seconds))
            passing = self._begin_video(ask, send) if route == "/v1/videos" else self._pass_on(ask, send)
            await _while_connected(receive, passing)

    def _check_ready(self) -> None:
        words = {
            State.LOADING: "the model is being loaded: try again later",
            State.FAILED: "the model could not be loaded",
            State.STOPPING: "the server is stopping",
        }
        state = self._replicas.state
        if state is not State.READY:
            after = 5 if state is State.LOADING else None
            raise ApiError(503, words[state], code=f"model_{state.value}", retry_after=after)

    async def _about(self, route: str, send: Send) -> None:
        state = self._replicas.state
        if route == "/metrics":
            text = await self._replicas.measured()
            await _answer(send, 200, text.encode(), b"text/plain; version=0.0.4; charset=utf-8")
            return
        good = state is not State.FAILED if route == "/health" else self._replicas.ready
        word = "ok" if good else "failed"
        if route == "/ready":
            word = "no_replica" if state is State.READY and not good else state.value
        await _answer(send, 200 if good else 503, json.dumps({"status": word}).encode())

    async def _file(self, name: str, send: Send) -> None:
        kept = await self._replicas.kept(name)
        if kept is None:
            raise ApiError(404, "there is no such file, or it has expired", code="not_found")
        more = [(b"cache-control", b"private, max-age=3600")]
        await _answer(send, 200, kept.data, kept.media_type.encode(), more)

    # Passing on

    async def _pass_on(self, ask: Ask, send: Send) -> None:
        key = f"{ask.header(b'host').decode('latin-1')} {ask.path}"
        constant = ask.method == "GET" and CONSTANT.fullmatch(ask.path) is not None and not ask.query
        if constant and key in self._constant:
            await _answered(send, *self._constant[key])
            return
        stream = Stream(send)
        try:
            await self._tried(ask, lambda: self._once(ask, stream, key if constant else None))
        except ApiError as error:
            if not stream.begun:
                raise
            await stream.end(error)

    async def _once(self, ask: Ask, stream: Stream, constant: str | None) -> None:
        """Pass a request on, and send its answer."""
        async with contextlib.aclosing(self._replicas.ask(ask)) as parts:
            head = await anext(parts, None)
            if head is None or head.status == 503:
                raise LostError("the replica takes no requests")
            if head.header(b"content-type").startswith(b"text/event-stream"):
                await stream.begin(head)
                async for part in parts:
                    await stream.take(part)
                await stream.end()
                return
            body = b"".join([part async for part in parts])
        if constant is not None and head.status == 200:
            if len(self._constant) >= 64:
                self._constant.clear()
            self._constant[constant] = head, body
        await _answered(stream.send, head, body)

    async def _tried(self, ask: Ask, once: Callable[[], Awaitable[None]]) -> None:
        """Do `once`, and do it again if the replica was lost.

        Raises:
            ApiError: the replicas were lost each time, or too many requests wait.
        """
        for number in range(1, ATTEMPTS + 1):
            if number > 1:
                self.again += 1
                logs.event("again", id=ask.id, attempt=number)
                await asyncio.sleep(PAUSE)
            async with self._alone if number >= ALONE else contextlib.nullcontext():
                try:
                    await once()
                    return
                except LostError:
                    continue
                except FullError:
                    after = self._replicas.retry_after()
                    words = "too many requests wait already: try again later"
                    raise ApiError(429, words, code="queue_full", retry_after=after) from None
        words = f"this request was tried {ATTEMPTS} times, and no replica has finished it"
        raise ApiError(503, words, code="replica_lost")

    # Videos

    async def _begin_video(self, ask: Ask, send: Send) -> None:
        if ask.method != "POST":
            await self._pass_on(ask, send)
            return
        video = Video(self._settings.keep_seconds)
        video.task = asyncio.create_task(self._make_video(ask, video))
        begun = asyncio.ensure_future(video.begun.wait())
        try:
            await asyncio.wait({video.task, begun}, return_when=asyncio.FIRST_COMPLETED)
            if not begun.done():
                await video.task  # it raises why
        finally:
            begun.cancel()
            if not video.begun.is_set():
                video.task.cancel()
        if video.document is not None:
            self._videos[video.id] = video
            self._forget_old()
        assert video.head is not None
        body = video.refused if video.document is None else json.dumps(video.document).encode()
        await _answered(send, video.head, body)

    async def _make_video(self, ask: Ask, video: Video) -> None:
        async def once() -> None:
            async with contextlib.aclosing(self._replicas.ask(ask, follow=True)) as parts:
                async for part in parts:
                    video.take(part)
            if not video.over:
                raise LostError("the video was left unfinished")

        try:
            await self._tried(ask, once)
        except ApiError as error:
            if not video.begun.is_set():
                raise
            video.fail(error)

    async def _of_video(self, method: str, path: str, scope: dict[str, Any], send: Send) -> None:
        _, _, _, name, *content = path.split("/")
        video = self._videos.get(name)
        if video is None or video.document is None:
            raise ApiError(404, "there is no such video, or it has expired", param="video_id", code="not_found")
        if method == "DELETE" and not content:
            del self._videos[name]
            if video.task is not None:
                video.task.cancel()
            await _answer(send, 200, json.dumps({"id": name, "object": "video.deleted", "deleted": True}).encode())
        elif method != "GET":
            raise ApiError(405, "this address takes no such method")
        elif not content:
            await _answer(send, 200, json.dumps(video.document).encode())
        else:
            query = scope.get("query_string", b"").decode("latin-1")
            kind, data = video.content(re.sub(r".*\bvariant=(\w*).*|.*", r"\1", query) or "video")
            await _answer(send, 200, data, kind.encode())

    @property
    def unfinished(self) -> int:
        """The number of videos that are being made."""
        return sum(not video.over for video in self._videos.values())

    def _forget_old(self) -> None:
        """Forget videos that have expired, and the oldest ones of too many or too large ones."""
        now, most = time.monotonic(), self._settings
        for name, video in [*self._videos.items()]:
            held = sum(one.held for one in self._videos.values())
            full = len(self._videos) > most.keep_files + most.queue + most.in_flight or held > most.keep_bytes
            if video.over and (video.expires < now or (full and len(self._videos) > 1)):
                del self._videos[name]


def seeded(ask: Ask) -> Ask:
    """The request with a seed, if it is one for pictures or a video and has none."""
    if ask.method != "POST" or not ask.path.startswith("/v1/"):
        return ask
    kind, seed = ask.header(b"content-type"), secrets.randbelow(2**32)
    if kind.lower().startswith(b"application/json"):
        try:
            given = json.loads(ask.body)
        except (ValueError, RecursionError):
            return ask
        if not isinstance(given, dict) or given.get("seed") is not None:
            return ask
        body = json.dumps(given | {"seed": seed}).encode()
    else:
        boundary = re.search(rb'boundary="?([^";,]+)', kind)
        if boundary is None or b'name="seed"' in ask.body:
            return ask
        first = b'--%b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n%d\r\n' % (boundary[1], seed)
        body = first + ask.body
    headers = [(key, value) for key, value in ask.headers if key.lower() != b"content-length"]
    return replace(ask, body=body, headers=(*headers, (b"content-length", b"%d" % len(body))))


def _route(path: str) -> str | None:
    """The route of an address; None if there is none."""
    for route in ROUTES:
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route), path):
            return route
    return None


async def _read(scope: dict[str, Any], receive: Receive, seconds: float) -> Ask:
    """A request with its whole body."""
    body = bytearray()

    async def all_of_it() -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(CLIENT_LEFT, "the client has left", code="cancelled")
            body.extend(message.get("body", b""))
            more = message.get("more_body", False)

    try:
        await asyncio.wait_for(all_of_it(), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, "the body of the request did not arrive in time", code="timeout") from None
    return Ask(
        id=scope["state"]["passage"].id,
        method=scope["method"],
        path=scope["path"],
        query=scope.get("query_string", b""),
        headers=tuple((bytes(key), bytes(value)) for key, value in scope["headers"]),
        scheme=scope.get("scheme", "http"),
        client=scope.get("client"),
        server=scope.get("server"),
        body=bytes(body),
    )


async def _while_connected(receive: Receive, work: Any) -> None:
    """Do the work; it is cancelled when the client leaves."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
    raise ApiError(CLIENT_LEFT, "the client has left", code="cancelled")


async def _answered(send: Send, head: Head, body: bytes) -> None:
    await send(start(head))
    await send({"type": "http.response.body", "body": body})


async def _answer(send: Send, status: int, body: bytes, kind: bytes = b"application/json", more: Any = ()) -> None:
    headers = ((b"content-type", kind), (b"content-length", b"%d" % len(body)), *more)
    await _answered(send, Head(status, headers), body)
