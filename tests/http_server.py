"""A server for tests: the application in this process, or behind uvicorn in a thread."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
from PIL import Image
from starlette.testclient import TestClient

from omni_runtime import Omni
from omni_runtime.serving.http.app import build_app
from omni_runtime.serving.http.server import Server, listening
from omni_runtime.serving.http.service import Service
from omni_runtime.serving.http.settings import Settings

PATIENCE = 60.0  # seconds, on a busy machine
SMALL = {"prompt": "a cat", "size": "64x64", "steps": 4, "seed": 1}


def small(pipe: Any, **defaults: Any) -> Omni:
    """An `Omni` of a tiny pipeline, without a cache, whose pictures are 64×64 if nothing else is said."""
    omni = Omni(pipe, cache_backend=None)
    omni._defaults = {"height": 64, "width": 64, **defaults}
    return omni


def wait_until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.01)


@contextlib.contextmanager
def in_process(omni: Omni, **settings: Any) -> Iterator[tuple[TestClient, Service]]:
    """A client of the application, without a server, and its service."""
    app = build_app(omni, Settings(**{"drain_seconds": 0.0, **settings}))
    with TestClient(app, raise_server_exceptions=True) as client:
        service: Service = app.state.service
        assert service.loaded.wait(PATIENCE)
        yield client, service


@contextlib.contextmanager
def on_a_port(omni: Omni, **settings: Any) -> Iterator[tuple[str, Server]]:
    """The address of a real server in a thread, and the server."""
    sock = listening("127.0.0.1", 0)
    server = Server(build_app(omni, Settings(**{"drain_seconds": 0.0, **settings})), sock)
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    try:
        assert server.service.loaded.wait(PATIENCE)
        wait_until(lambda: server.started)
        yield server.address, server
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


def refuses(address: str) -> bool:
    host, port = address.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


class Held:
    """Stops an engine before its next forward, so that its requests stay where they are.

    Attributes:
        reached: set when a forward waits.
    """

    def __init__(self, service: Service) -> None:
        assert service.engine is not None
        self.forwards: Any = service.engine.forwards
        self.reached, self._go = threading.Event(), threading.Event()

    def __enter__(self) -> Held:
        run = type(self.forwards).run

        def held(calls: Any) -> None:
            self.reached.set()
            assert self._go.wait(PATIENCE)
            run(self.forwards, calls)

        self.forwards.run = held
        return self

    def release(self) -> None:
        self._go.set()

    def __exit__(self, *error: object) -> None:
        self.release()
        del self.forwards.run


def picture(entry: Any) -> Image.Image:
    data = entry["b64_json"] if isinstance(entry, dict) else entry.b64_json
    return Image.open(io.BytesIO(base64.b64decode(data)))


def furthest(a: Any, b: Any) -> int:
    """The largest difference of two pictures' values."""
    return int(np.abs(np.asarray(a.convert("RGB"), np.int16) - np.asarray(b.convert("RGB"), np.int16)).max())
