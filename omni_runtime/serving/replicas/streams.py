"""A stream of events to a client that several replicas may send, one after the other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from omni_runtime.serving.http.connection import sent_event
from omni_runtime.serving.http.errors import ApiError
from omni_runtime.serving.replicas.application import Head

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Stream:
    """A stream of events to a client. Events that it has are not sent again.

    Attributes:
        begun: whether the client has the head of the answer.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.begun = False
        self._sent: Counter[tuple[Any, ...]] = Counter()
        self._seen: Counter[tuple[Any, ...]] = Counter()  # in this attempt
        self._rest = b""

    async def begin(self, head: Head) -> None:
        """Send the head, unless it was sent."""
        self._rest = b""
        self._seen.clear()
        if not self.begun:
            self.begun = True
            await self.send(start(head))

    async def take(self, part: bytes) -> None:
        """Send the events that are complete with this part."""
        *events, self._rest = (self._rest + part).split(b"\n\n")
        for event in events:
            name = _name_of(event)
            if name is not None:
                self._seen[name] += 1
                if self._seen[name] <= self._sent[name]:
                    continue
                self._sent[name] += 1
            await self.send({"type": "http.response.body", "body": event + b"\n\n", "more_body": True})

    async def end(self, error: ApiError | None = None) -> None:
        """End the stream; with an event if there was an error."""
        body = self._rest if error is None else sent_event("error", error.body())
        await self.send({"type": "http.response.body", "body": body})


def _name_of(event: bytes) -> tuple[Any, ...] | None:
    """What an event is about, so that a second one of the same is known; None for comments and errors."""
    lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
    try:
        data = json.loads(b"\n".join(lines))
    except ValueError:
        return None
    if not isinstance(data, dict) or "error" in data:
        return None
    return tuple(data.get(key) for key in ("type", "index", "step", "partial_image_index", "reference"))


def start(head: Head) -> dict[str, Any]:
    """The first message of an answer. Some headers are given again by the front."""
    own = (b"x-request-id", b"x-content-type-options", b"referrer-policy")
    headers = [one for one in head.headers if one[0].lower() not in own]
    return {"type": "http.response.start", "status": head.status, "headers": headers}
