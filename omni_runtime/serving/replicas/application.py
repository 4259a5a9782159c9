"""An ASGI application without a server: it answers requests that another process passes on.

`Ask` is a request with its whole body. `Application` gives it to the application, and yields what that answers: a
`Head`, then the parts of the body. If nobody takes the parts any more, the application is told that the client left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Application", "Ask", "Content", "Head", "LostError", "followed"]

#: So many parts of a body wait to be taken.
PARTS = 8
#: Seconds that an application has to end a request whose client has left.
PATIENCE = 30.0
#: Seconds between two looks at a video that is made.
PAUSE = 0.5


class LostError(Exception):
    """The replica has died, or stops, before its answer was complete."""


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        id: the request's id, which is in the answer.
        method, path, query, headers, scheme, client, server: as in ASGI.
        body: the whole body.
    """

    id: str
    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    scheme: str = "http"
    client: tuple[str, int] | None = None
    server: tuple[str, int | None] | None = None
    body: bytes = field(default=b"", repr=False)

    def header(self, name: bytes) -> bytes:
        """The value of a header; empty if there is none."""
        return next((value for key, value in self.headers if key.lower() == name), b"")


@dataclass(frozen=True)
class Head:
    """The start of an answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]

    def header(self, name: bytes) -> bytes:
        """The value of a header; empty if there is none."""
        return next((value for key, value in self.headers if key.lower() == name), b"")


@dataclass(frozen=True)
class Content:
    """The content of a finished video: its variants, each with its media type and its bytes."""

    variants: dict[str, tuple[str, bytes]] = field(repr=False)


class Application:
    """Runs an ASGI application without a server.

    Args:
        app: the application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._state: dict[str, Any] = {}
        self._life: asyncio.Task[None] | None = None
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def start(self) -> None:
        """Start the application.

        Raises:
            RuntimeError: it does not start.
        """
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._state}
        self._life = asyncio.create_task(self._app(scope, self._messages.get, self._told.put))
        await self._say("startup")

    async def stop(self) -> None:
        """Stop it. It finishes what is under way."""
        if self._life is not None and not self._life.done():
            await self._say("shutdown")

    async def _say(self, what: str) -> None:
        assert self._life is not None
        await self._messages.put({"type": f"lifespan.{what}"})
        told = asyncio.ensure_future(self._told.get())
        await asyncio.wait({told, self._life}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            told.cancel()
            error = self._life.exception()
            raise RuntimeError(f"the application has ended at its {what}: {error}") from error
        if told.result()["type"] != f"lifespan.{what}.complete":
            raise RuntimeError(f"the application fails at its {what}: {told.result().get('message', '')}")

    async def ask(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """Yield the head of the answer, and the parts of its body."""
        parts: asyncio.Queue[Head | bytes | None] = asyncio.Queue(PARTS)
        left, given = asyncio.Event(), False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": ask.body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            if left.is_set():
                return
            if message["type"] == "http.response.start":
                await parts.put(Head(message["status"], tuple((bytes(k), bytes(v)) for k, v in message["headers"])))
            elif message.get("body"):
                await parts.put(bytes(message["body"]))

        async def run() -> None:
            try:
                await self._app(self._scope(ask), receive, send)
            finally:
                if not left.is_set():
                    await parts.put(None)

        task = asyncio.create_task(run())
        try:
            while (part := await parts.get()) is not None:
                yield part
            await task
        finally:
            left.set()
            while not parts.empty():
                parts.get_nowait()
            if not task.done():
                await _ended(task)

    def _scope(self, ask: Ask) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": ask.method,
            "scheme": ask.scheme,
            "path": ask.path,
            "raw_path": ask.path.encode(),
            "query_string": ask.query,
            "root_path": "",
            "headers": [*ask.headers],
            "client": ask.client,
            "server": ask.server,
            "state": {**self._state, "request_id": ask.id},
        }

    async def whole(self, ask: Ask) -> tuple[Head, bytes]:
        """The whole answer."""
        head, body = Head(500, ()), []
        async for part in self.ask(ask):
            if isinstance(part, Head):
                head = part
            else:
                body.append(part)
        return head, b"".join(body)


async def _ended(task: asyncio.Task[None]) -> None:
    """Wait for a task that was told to end, and cancel it if it does not."""
    with contextlib.suppress(BaseException):
        await asyncio.wait_for(asyncio.shield(task), PATIENCE)
    if not task.done():
        task.cancel()
        with contextlib.suppress(BaseException):
            await task


async def followed(app: Application, ask: Ask) -> AsyncGenerator[Head | bytes | Content, None]:
    """Begin a video, and follow it to its end: yields the answer, each new document of the video, and its content.

    Closing the generator cancels the video.
    """
    head, body = await app.whole(ask)
    yield head
    yield body
    if head.status != 200:
        return
    plain = tuple((key, value) for key, value in ask.headers if key.lower() not in (b"content-length", b"content-type"))
    address = f"/v1/videos/{json.loads(body)['id']}"
    asking = replace(ask, method="GET", path=address, headers=plain, body=b"", query=b"")
    former, document = body, json.loads(body)
    try:
        while document["status"] not in ("completed", "failed"):
            await asyncio.sleep(PAUSE)
            head, body = await app.whole(asking)
            if head.status != 200:
                break
            if body != former:
                yield body
            former, document = body, json.loads(body)
        if document["status"] == "completed":
            variants = {}
            for name in ("video", "thumbnail"):
                one = replace(asking, path=f"{address}/content", query=f"variant={name}".encode())
                head, body = await app.whole(one)
                if head.status == 200:
                    variants[name] = head.header(b"content-type").decode(), body
            yield Content(variants)
    finally:
        with contextlib.suppress(Exception):
            await app.whole(replace(asking, method="DELETE"))
