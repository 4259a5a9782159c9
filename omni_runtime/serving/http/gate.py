"""What every request passes first: an id, the key, the size of its body, the log, and the catch for every error.

It is a plain ASGI application around the others, so that streams pass through it as they are.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni_runtime.serving.http import logs
from omni_runtime.serving.http.errors import CLIENT_LEFT, ApiError, outcome_of
from omni_runtime.serving.http.reading import too_large
from omni_runtime.serving.http.service import Service, State

#: Paths that need a key, if the server has any.
GUARDED = ("/v1/", "/metrics", "/openapi.json")
#: So many bytes of a body are not counted: who sends a prompt does not wait for those who send pictures.
SMALL = 64 << 10
#: Headers of every answer.
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Gate:
    """See the module's docstring.

    Args:
        app: the application behind it.
        service: the model, its settings and its metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = [key.encode() for key in service.settings.api_keys]
        self._open = 0
        self._room = Room(service.settings.max_held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = Passage(self._service, scope, receive, send, self._room)
        scope.setdefault("state", {})["passage"] = passage
        posts = scope["method"] == "POST"
        self._open += posts
        try:
            self._check(scope)
            await self._app(scope, passage.receive, passage.send)
        except ApiError as error:
            await passage.refuse(error)
        except ClientDisconnect:
            await passage.refuse(ApiError(CLIENT_LEFT, "the client has left", code="cancelled"))
        except Exception as error:
            passage.failed = True
            logs.failure(error, passage.id, self._service.settings.debug)
            await passage.refuse(ApiError(500, "the server could not finish this request", code="internal_error"))
        except BaseException:  # the server is stopping, and ends what is under way
            passage.note(outcome="cancelled")
            if self._service.state is State.STOPPING:
                self._service.finished = False
            raise
        finally:
            self._open -= posts
            passage.close()

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        guarded = scope["path"].startswith(GUARDED)
        if guarded and self._keys and not self._knows(scope["headers"]):
            raise ApiError(401, "no such API key: send Authorization: Bearer KEY", code="invalid_api_key")
        if scope["method"] != "POST":
            return
        if headers.get("sec-fetch-site") == "cross-site":
            raise ApiError(403, "requests from pages of other sites are refused", code="cross_site")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:19]) > self._service.settings.max_body:
            raise too_large(self._service.settings.max_body)
        if self._open > self._service.settings.max_requests:
            after = self._service.retry_after()
            raise ApiError(429, "too many requests at once: try again later", code="queue_full", retry_after=after)

    def _knows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        known = [hmac.compare_digest(key.strip(), one) for one in self._keys]  # all of them, always
        return scheme.lower() == b"bearer" and any(known)


class Room:
    """The bytes that all requests under way hold.

    Args:
        most: how many they may be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self.held = 0

    def take(self, more: int, own: int) -> bool:
        """Whether there is room for `more` bytes, which are then held; `own` is what the request holds already."""
        with self._lock:
            if self.held + more > self._most and self.held > own:
                return False
            self.held += more
            return True

    def give_back(self, held: int) -> None:
        """These bytes are no longer held."""
        with self._lock:
            self.held -= held


class Passage:
    """One request on its way.

    Attributes:
        id: its id, which is in the answer's header `x-request-id` and in the log.
        failed: whether something unexpected happened.
    """

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send, room: Room) -> None:
        # A replica has the id that the front has given. Nothing that a client sends comes here.
        self.id: str = scope.get("state", {}).get("request_id") or f"req_{secrets.token_hex(12)}"
        self.failed = False
        self._service, self._scope = service, scope
        self._receive, self._send = receive, send
        self._began = time.monotonic()
        self._room, self._held = room, 0
        self._read = 0
        self._status: int | None = None
        self._facts: dict[str, Any] = {}

    def note(self, **facts: Any) -> None:
        """Facts for the log line; `outcome` is also for the metrics."""
        self._facts.update(facts)

    async def receive(self) -> Message:
        """As ASGI's `receive`. A body that grows beyond the limit raises an ApiError."""
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._service.settings.max_body:
            raise too_large(self._service.settings.max_body)
        self.hold(min(len(message.get("body", b"")), max(0, self._read - SMALL)))
        return message

    def hold(self, more: int) -> None:
        """Count further bytes that this request holds until it is answered.

        Raises:
            ApiError: all requests together hold too many.
        """
        if not self._room.take(more, self._held):
            words = "the requests under way hold too much: try again later"
            raise ApiError(429, words, code="queue_full", retry_after=self._service.retry_after())
        self._held += more

    def hand_over(self) -> Callable[[], None]:
        """What this request holds is held longer than it: until the function that is returned is called."""
        held, self._held = self._held, 0
        return lambda: self._room.give_back(held)

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """As ASGI's `send`, with our headers."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            own: Iterable[tuple[bytes, bytes]] = [*HEADERS, (b"x-request-id", self.id.encode())]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, if nothing was answered yet."""
        if self._status is not None or error.status == CLIENT_LEFT:
            self._status = error.status
            return
        body = json.dumps(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})

    def close(self) -> None:
        """Write the log line, and count the answer."""
        self.hand_over()()
        seconds = time.monotonic() - self._began
        route = getattr(self._scope.get("route"), "path", None) or "other"
        status = self._status or CLIENT_LEFT
        outcome = self._facts.pop("outcome", None) or ("failed" if self.failed else outcome_of(status))
        self._service.metrics.answered(route, outcome, seconds)
        if route in QUIET and outcome in ("ok", "not_ready"):
            return
        asked = f"{self._scope['method']} {route}"
        told = {"id": self.id, "route": asked, "status": status, "outcome": outcome, "seconds": round(seconds, 4)}
        logs.event("request", **(told | self._facts))


#: Routes that are asked for all the time, and are in the log only if something was wrong.
QUIET = ("/health", "/ready", "/metrics")
