"""Pictures and videos that the server keeps for a while, and serves under names that cannot be guessed."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """A file in memory: its bytes, its media type, and when it expires by `time.monotonic`."""

    data: bytes
    media_type: str
    expires: float


class Store:
    """Keeps files in memory. The oldest are dropped when there are too many, or too many bytes.

    Args:
        most_files, most_bytes: how many files and bytes are kept.
        seconds: for how long.
    """

    def __init__(self, most_files: int, most_bytes: int, seconds: float) -> None:
        self._most_files, self._most_bytes, self._seconds = most_files, most_bytes, seconds
        self._files: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = 0

    def keep(self, data: bytes, media_type: str) -> str:
        """Keep a file, and return its name."""
        name = f"{secrets.token_urlsafe(24)}.{media_type.rpartition('/')[2]}"
        with self._lock:
            self._files[name] = Kept(data, media_type, time.monotonic() + self._seconds)
            self._bytes += len(data)
            self._drop_old()
        return name

    def get(self, name: str) -> Kept | None:
        """The file of that name; None if it was not kept, or is no longer."""
        with self._lock:
            self._drop_old()
            return self._files.get(name)

    def remove(self, name: str) -> None:
        """Forget a file."""
        with self._lock:
            kept = self._files.pop(name, None)
            self._bytes -= 0 if kept is None else len(kept.data)

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        with self._lock:
            self._drop_old()
            return self._bytes

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._files:
            name, oldest = next(iter(self._files.items()))
            full = len(self._files) > self._most_files or self._bytes > self._most_bytes
            # The newest stays, however large it is: it was just made for someone.
            if oldest.expires > now and not (full and len(self._files) > 1):
                return
            del self._files[name]
            self._bytes -= len(oldest.data)
