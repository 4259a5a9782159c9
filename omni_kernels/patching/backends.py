"""Cache backends by name: the methods of this distribution's runtime, and plug-ins of other distributions.

A distribution can register an object with the attributes of `CacheBackend` under the entry-point group
`omni_kernels.cache_backends`. It can then be named in `patch(pipe, cache_backend=...)`. Plug-ins are independent of
each other: one that cannot be loaded, or whose name is taken, is listed in `refused`, and the others still work. The
methods of `omni_runtime` need no entry point, and no plug-in can take their names.
"""

from __future__ import annotations

import difflib
import importlib
import os
import reprlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, Protocol

from omni_kernels.patching.changes import Patch, PatchConflictError

GROUP = "omni_kernels.cache_backends"
#: The table of our own methods. `omni_kernels` does not depend on `omni_runtime`, so it is named only here, as a
#: string. It is part of the same distribution, and is imported only when a backend is requested.
_OWN = "omni_runtime.cache.methods"


class InstalledBackend(Protocol):
    """What `CacheBackend.install` returns: the backend installed on one pipeline."""

    on_step: Any  # None, or a function called at the end of each step

    @property
    def report(self) -> Any:
        """What the last request computed and skipped; None before the first."""

    def close(self) -> None:
        """Free what an unfinished request still holds."""


class CacheBackend(Protocol):
    """A cache method that can be installed on a pipeline."""

    name: str
    summary: str
    keys: tuple[Any, ...]

    def check(self, config: Mapping[str, Any] | None, transformer: Any = None) -> dict[str, Any]:
        """The complete configuration, with defaults filled in. Raises ValueError or TypeError if it is invalid."""

    def install(self, pipe: Any, config: dict[str, Any], patch: Patch) -> InstalledBackend:
        """Install on `pipe`. Every change must be made through `patch`."""


#: The attributes that a plug-in, and each of its keys, must have to be listed.
_BACKEND = ("name", "summary", "keys", "check", "install")
_KEY = ("name", "default", "type_name", "allowed", "doc")


def location(pipe: Any) -> str | None:
    """The directory or hub id that a pipeline was loaded from; None if it is not known."""
    found = getattr(pipe, "name_or_path", None)
    return os.fspath(found) if isinstance(found, str | os.PathLike) else None


def with_own(backend: CacheBackend, config: dict[str, Any], directory: Any) -> Mapping[str, Any]:
    """A checked configuration, where missing keys may take values from the model's directory.

    A backend that reads nothing from the directory has no `with_own`.
    """
    own = getattr(backend, "with_own", None)
    return own(config, directory) if own is not None and isinstance(directory, str) else config


def complete(backend: CacheBackend, config: dict[str, Any], directory: Any, *facts: Any) -> dict[str, Any]:
    """A checked configuration, including values from the model's directory. Each value is read once.

    Args:
        backend: the backend.
        config: the configuration, from `checked`.
        directory: the model's directory, or its name on the hub; None if it is not known.
        facts: what is known about the transformer, if anything.

    Raises:
        ValueError, TypeError: what the backend's `check` raises.
    """
    own = with_own(backend, config, directory)
    return checked(backend, own, *facts) if facts or own is not config else config


def checked(backend: CacheBackend, config: Mapping[str, Any] | None, *facts: Any) -> dict[str, Any]:
    """A configuration with defaults filled in.

    Raises:
        ValueError, TypeError: what the backend's `check` raises.
    """
    found: Any = backend.check(config, *facts)
    if not isinstance(found, dict):
        raise TypeError(f"cache backend {backend.name!r}: its check returned {shown(found)}, not a configuration")
    return found


def install(backend: CacheBackend, pipe: Any, config: dict[str, Any], patch: Patch) -> InstalledBackend:
    """Install a backend on a pipeline, through `patch`.

    Raises:
        ValueError, TypeError, PatchConflictError: what the backend's `install` raises.
        RuntimeError: a plug-in raised anything else; the message names it.
    """
    try:
        return backend.install(pipe, config, patch)
    except (ValueError, TypeError, PatchConflictError):
        raise
    except Exception as error:
        if built_in().get(backend.name) is backend:
            raise
        told = f"{type(error).__name__}: {error}"[:300]
        raise RuntimeError(f"cache backend {backend.name!r} could not be installed: it raised {told}") from error


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known name, if any is close, and all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Known: {', '.join(known)}"


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxarray = 12
        self.maxstring = self.maxother = 160

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() <= 128:
            return repr(value)
        return f"<int of {value.bit_length()} bits>"  # Python refuses to write out thousands of digits


def shown(value: Any) -> str:
    """The repr of a value for an error message, limited to a few lines however large or nested the value is."""
    return _Shown().repr(value)


def built_in() -> Mapping[str, CacheBackend]:
    """The methods of `omni_runtime` by name, those to try first in front. Empty if `omni_runtime` is not installed."""
    try:
        return importlib.import_module(_OWN).METHODS
    except ModuleNotFoundError as error:
        if not f"{_OWN}.".startswith(f"{error.name}."):  # a dependency of the methods is missing
            raise
        return {}


def _plugins() -> dict[str, list[metadata.EntryPoint]]:
    """The plug-ins' entry points by name, not yet imported. A valid plug-in has exactly one entry."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=GROUP):
        # Earlier versions of this distribution registered their methods as entry points, and may have left them.
        if entry.module.partition(".")[0] == "omni_runtime":
            continue
        same_name = found.setdefault(entry.name, [])
        if entry.value not in [other.value for other in same_name]:
            same_name.append(entry)
    return found


def _origin(entry: metadata.EntryPoint) -> str:
    distribution = entry.dist
    named = "an unknown distribution" if distribution is None else f"{distribution.name} {distribution.version}"
    return f"{named} ({entry.value})"


def _loaded(name: str, entries: list[metadata.EntryPoint]) -> CacheBackend:
    """Import a plug-in. Raises a ValueError that names its distribution if it cannot be used."""
    if len(entries) > 1:
        raise ValueError(f"two cache backends are called {name!r}: {' and '.join(map(_origin, entries))}")
    origin = _origin(entries[0])
    try:
        backend = entries[0].load()
        lacking = _lacking(backend)
    except (Exception, SystemExit) as error:  # importing other people's code may raise anything
        told = f"{type(error).__name__}: {error}"[:300]
        raise ValueError(f"cache backend {name!r} of {origin} cannot be loaded: {told}") from error
    if lacking:
        raise ValueError(f"cache backend {name!r} of {origin} is not usable: it lacks {', '.join(lacking)}")
    return backend


def _lacking(backend: Any) -> list[str]:
    """The attributes that an object lacks to be a backend that can be listed and installed."""
    lacking = [one for one in _BACKEND if not hasattr(backend, one)]
    if lacking:
        return lacking
    if not isinstance(backend.keys, tuple):
        return ["a tuple of keys"]
    return [f"{one} of a key" for one in _KEY if not all(hasattr(key, one) for key in backend.keys)]


def available() -> dict[str, CacheBackend]:
    """All usable backends by name: our own, and the plug-ins that load. The other plug-ins are in `refused`."""
    return _sorted_out()[0]


def refused() -> dict[str, str]:
    """The plug-ins that cannot be used: name → the reason, with the distribution they come from."""
    return _sorted_out()[1]


def _sorted_out() -> tuple[dict[str, CacheBackend], dict[str, str]]:
    found, reasons = dict(built_in()), {}
    for name, entries in sorted(_plugins().items()):
        if name in found:
            origins = " and ".join(map(_origin, entries))
            reasons[name] = f"cache backend {name!r} of {origins} is not used: the built-in method has that name"
            continue
        try:
            found[name] = _loaded(name, entries)
        except ValueError as error:
            reasons[name] = str(error)
    return found, reasons


def get(name: str) -> CacheBackend:
    """The backend with this name. Plug-ins are only searched if no built-in method has it.

    Raises:
        ValueError: there is no such backend (the message suggests the closest name), or the plug-in cannot be used
            (the message names its distribution and the reason).
        TypeError: `name` is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"cache_backend must be the name of a backend, not {type(name).__name__}")
    ours = built_in()
    if name in ours:
        return ours[name]
    plugins = _plugins()
    if name not in plugins:
        raise ValueError(f"unknown cache backend {shown(name)}: {nearest(name, {*ours, *plugins})}")
    return _loaded(name, plugins[name])
