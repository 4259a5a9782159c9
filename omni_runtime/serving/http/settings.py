"""What a server allows, and how it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """The settings of one server. Everything that a client can make large has a limit here.

    Attributes:
        max_batch: the most samples in one forward.
        in_flight: the most pictures that are computed at once.
        memory: the most bytes that the pictures in flight hold, as `Engine` counts them; None for no limit.
        queue: the most pictures that wait. Beyond that, requests are answered with 429.
        api_keys: clients must send one of these; empty: no key is needed.
        deadline: seconds that a request may take, waiting included.
        max_n: pictures in one request.
        max_steps: denoising steps.
        max_side, max_pixels: of a picture, or of a frame of a video.
        max_frames: of a video.
        max_prompt: characters of a prompt, and of a negative prompt.
        max_body: bytes of a request. A body of JSON has a MiB at most.
        max_references: reference pictures in one request.
        max_reference_pixels: of a reference picture, when it is decoded.
        max_held: bytes of the bodies and the decoded reference pictures of all requests under way, those that wait
            included. Beyond that, requests are answered with 429. One request alone may hold more.
        max_connections: connections, at most three quarters of the process's file descriptors. Beyond that, the one
            that has waited longest for its request is closed.
        header_seconds: the head of a request must have arrived by then.
        body_seconds: a body must have arrived by then.
        write_seconds: a client that reads nothing of its answer for so long is cut off.
        keep_files, keep_bytes, keep_seconds: how many pictures and videos the server keeps for their addresses, with
            how many bytes in all, and for how long.
        drain_seconds: how long a server that is told to stop lets its requests finish.
        name: what the model is called; by default the last part of its own name.
        page: whether `/` shows the page.
        debug: whether tracebacks are written to stderr.

    Raises:
        ValueError: a limit is not a positive number.
    """

    max_batch: int = 8
    in_flight: int = 16
    memory: int | None = None
    queue: int = 256
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    deadline: float = 600.0
    max_n: int = 10
    max_steps: int = 100
    max_side: int = 2048
    max_pixels: int = 2048 * 2048
    max_frames: int = 257
    max_prompt: int = 4000
    max_body: int = 32 * MIB
    max_references: int = 4
    max_reference_pixels: int = 4096 * 4096
    max_held: int = 1024 * MIB
    max_connections: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    write_seconds: float = 60.0
    keep_files: int = 64
    keep_bytes: int = 256 * MIB
    keep_seconds: float = 3600.0
    drain_seconds: float = 30.0
    name: str | None = None
    page: bool = True
    debug: bool = False

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not 0 < value < math.inf and not (one.name == "drain_seconds" and value == 0):
                raise ValueError(f"{one.name} must be above 0, not {value!r}")
        if not all(self.api_keys):
            raise ValueError("an API key is empty")

    @property
    def max_requests(self) -> int:
        """The most requests that are read and answered at once; others get 429 before their body is read."""
        return self.queue + self.in_flight + 64
