"""The server's side of a connection: uvicorn's, with limits on how many there are and how long one may be silent.

Uvicorn waits without end for the rest of a request's head, and for a client that reads no more of its answer. Each such
connection costs a file descriptor, and the process has few of them.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from omni_runtime.serving.http.settings import Settings


class Connection(H11Protocol):
    """A connection; `limited` gives a class with a server's settings."""

    settings = Settings()
    most = settings.max_connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._since = time.monotonic()  # uvloop's own clock counts milliseconds
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._unsent = 0

    @property
    def _waits(self) -> bool:
        """Whether it is between two requests, or before its first one."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection. If there are too many, the one that has waited longest for its request is closed."""
        super().connection_made(transport)
        self._expect_head()
        # Those that are closed already are still among the connections until the loop's next turn.
        alive: list[Any] = [one for one in self.connections if not one.transport.is_closing()]
        if len(alive) > self.most:
            others = [one for one in alive if getattr(one, "_waits", False)]
            min(others, key=lambda one: one._since, default=self).transport.abort()

    def _expect_head(self) -> None:
        if self._head is None:
            self._since = time.monotonic()
            self._head = self.loop.call_later(self.settings.header_seconds, self._late)

    def _late(self) -> None:
        self._head = None
        if self._waits:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent. The head of a request must be complete in time, however it is cut up."""
        super().data_received(data)
        if self._waits and not self.transport.is_closing():
            self._expect_head()
        elif self._head is not None:
            self._head.cancel()
            self._head = None

    def on_response_complete(self) -> None:
        """An answer is complete, but perhaps not read yet."""
        self._since = time.monotonic()
        self._watch()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        self._watch()

    def _watch(self) -> None:
        """Close the connection if the client reads nothing of what is unsent for a while."""
        if self._unread is None and (unsent := self.transport.get_write_buffer_size()):
            self._unsent = unsent
            self._unread = self.loop.call_later(self.settings.write_seconds, self._look)

    def _look(self) -> None:
        self._unread = None
        if 0 < self._unsent <= self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        for timer in (self._head, self._unread):
            if timer is not None:
                timer.cancel()
        self._head = self._unread = None
        super().connection_lost(exc)


def limited(settings: Settings) -> type[Connection]:
    """The class of a server's connections. They leave a quarter of the process's file descriptors free."""
    most = settings.max_connections
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = most if descriptors == resource.RLIM_INFINITY else max(1, min(most, 3 * descriptors // 4))
    return type("LimitedConnection", (Connection,), {"settings": settings, "most": most})
