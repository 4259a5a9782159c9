"""Runs the application with uvicorn. The first SIGTERM or SIGINT drains, a second one ends everything at once."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from omni_runtime.serving.http import logs
from omni_runtime.serving.http.protocol import limited
from omni_runtime.serving.http.service import PATIENCE, Service

SIGNALS = signal.SIGINT, signal.SIGTERM


class Server(uvicorn.Server):
    """Uvicorn's server, with our signals: it exits by itself instead of raising the signal again.

    Args:
        app: the application.
        sock: a listening socket.
    """

    def __init__(self, app: FastAPI, sock: socket.socket) -> None:
        self.service: Service = app.state.service
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            http=limited(self.service.settings),
            ws="none",
            timeout_graceful_shutdown=math.ceil(self.service.settings.drain_seconds),
            h11_max_incomplete_event_size=64 << 10,
        )
        super().__init__(config)
        self._sock = sock

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._sock.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def stop(self) -> None:
        """Take no more requests, finish those under way, and exit; a second call exits at once."""
        if self.should_exit:
            self.force_exit = True
        self.service.stop_taking()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Context manager: our handlers are installed, in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def serve_until_stopped(self) -> bool:
        """Serve.

        Returns:
            Whether every request was finished.
        """
        logs.event("listening", address=self.address, model=self.service.name)
        self.run(sockets=[self._sock])
        if self.force_exit:
            closing = self.service.cancel()
            closing.join(PATIENCE)
            self.service.stuck = closing.is_alive()
        return not self.force_exit and self.service.finished


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        OSError: the address is not this machine's, or is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except BaseException:
        sock.close()
        raise
    return sock
