"""Videos that replicas make, as the front knows them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from omni_runtime.serving.http.errors import ApiError
from omni_runtime.serving.replicas.application import Content, Head, LostError


@dataclass(eq=False)
class Video:
    """A video that is made, or was.

    Attributes:
        keep_seconds: how long it is kept.
        id: its id, which stays when it is made again by another replica.
        head: the head of the answer to its request.
        document: what is known of it; None if it was refused.
        refused: the answer that has refused it.
        begun: set when there is an answer.
        over: whether it is finished or failed.
        expires: when it is forgotten, by `time.monotonic`.
        variants: its content, as in `Content`.
        finished: its last document, until its content is here.
    """

    keep_seconds: float
    id: str = field(default_factory=lambda: f"video_{secrets.token_urlsafe(18)}")
    head: Head | None = None
    document: dict[str, Any] | None = None
    refused: bytes = b""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False
    expires: float = float("inf")
    task: asyncio.Task[None] | None = None
    variants: dict[str, tuple[str, bytes]] = field(default_factory=dict, repr=False)
    finished: dict[str, Any] | None = None

    @property
    def held(self) -> int:
        """The bytes of its content."""
        return sum(len(data) for _, data in self.variants.values())

    def take(self, part: Head | bytes | Content) -> None:
        """Note what a replica has told."""
        if isinstance(part, Head):
            if part.status == 503:
                raise LostError("the replica takes no requests")
            self.head = self.head or part
        elif isinstance(part, Content):
            self.variants = part.variants
            self._finish()
        elif self.head is not None and self.head.status != 200:
            self.refused, self.over = part, True
            self.begun.set()
        else:
            document = json.loads(part) | {"id": self.id}
            if self.document is not None:
                document["created_at"] = self.document["created_at"]
            if document["status"] == "completed":
                self.finished = document  # the client is told when the content is here
                return
            self.document = document
            if document["status"] == "failed":
                self._finish()
            self.begun.set()

    def _finish(self) -> None:
        self.document = self.finished or self.document
        self.over, self.expires = True, time.monotonic() + self.keep_seconds
        self.begun.set()

    def fail(self, error: ApiError) -> None:
        """No replica has finished it."""
        assert self.document is not None
        told = {"code": error.code, "message": str(error)}
        self.document = {**self.document, "status": "failed", "error": told}
        self._finish()

    def content(self, variant: str) -> tuple[str, bytes]:
        """The media type and the bytes of a variant.

        Raises:
            ApiError: there is none, or not yet.
        """
        if self.document is not None and self.document["status"] == "failed":
            raise ApiError(404, "there is no video: it could not be made", param="video_id", code="failed")
        if not self.over:
            raise ApiError(409, "the video is not finished yet", param="video_id", code="not_finished")
        if self.expires < time.monotonic():
            raise ApiError(404, "the video has expired", param="video_id", code="expired")
        if variant not in self.variants:
            known = ", ".join(self.variants)
            raise ApiError(400, f"variant must be one of {known}", param="variant", code="unsupported")
        return self.variants[variant]
