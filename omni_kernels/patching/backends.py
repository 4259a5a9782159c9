"""Cache backends by name, found through the entry-point group `omni_kernels.cache_backends`.

The kernels know no runtime: whatever distribution registers an object with the attributes of `CacheBackend` under that
group can be named in `patch(pipe, cache_backend=...)`. `omni_runtime` registers its methods in the same way.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, Protocol

from omni_kernels.patching.changes import Patch

GROUP = "omni_kernels.cache_backends"


class InstalledBackend(Protocol):
    """What `CacheBackend.install` gives back: the live backend of one pipeline."""

    on_step: Any  # None, or a callable that is told of every closed step

    @property
    def report(self) -> Any:
        """What the last request computed and skipped; None before the first."""

    def close(self) -> None:
        """Free what a request under way still holds."""


class CacheBackend(Protocol):
    """A cache method that can be installed on a pipeline."""

    name: str
    summary: str
    keys: tuple[Any, ...]

    def check(self, config: Mapping[str, Any] | None, transformer: Any = None) -> dict[str, Any]:
        """The complete configuration, defaults filled in; raises ValueError or TypeError for a bad one."""

    def install(self, pipe: Any, config: dict[str, Any], patch: Patch) -> InstalledBackend:
        """Install on `pipe`, with every change made through `patch`."""


def with_own(backend: CacheBackend, config: Mapping[str, Any] | None, directory: Any) -> Mapping[str, Any] | None:
    """A checked configuration with what a model's directory brings for the backend, where the caller gives nothing.

    A backend that takes nothing from there has no `with_own`.
    """
    own = getattr(backend, "with_own", None)
    return own(config, directory) if own is not None and isinstance(directory, str) else config


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known name where there is one, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Known: {', '.join(known)}"


def entry_points() -> dict[str, metadata.EntryPoint]:
    """The registered backends by name, not yet imported. Raises ValueError where two distributions claim one name."""
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ValueError(f"two cache backends are called {entry.name!r}: {other.value} and {entry.value}")
    return found


def available() -> dict[str, CacheBackend]:
    """All registered backends by name, imported."""
    return {name: entry.load() for name, entry in sorted(entry_points().items())}


def get(name: str) -> CacheBackend:
    """The backend registered as `name`.

    Raises:
        ValueError: no such backend; the message names the nearest one.
        TypeError: `name` is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"cache_backend must be the name of a backend, not {type(name).__name__}")
    entries = entry_points()
    if name not in entries:
        raise ValueError(f"unknown cache backend {name!r}: {nearest(name, entries)}")
    return entries[name].load()
