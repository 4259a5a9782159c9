"""Cache backends by name: those of this distribution's runtime, and those that others register.

Whatever distribution registers an object with the attributes of `CacheBackend` under the entry-point group
`omni_kernels.cache_backends` can be named in `patch(pipe, cache_backend=...)`. Each of these plug-ins stands alone: one
that cannot be loaded, or claims a name that is taken, is told of in `refused` and keeps no other from working. The
methods of `omni_runtime` need no entry point, and none can take their names.
"""

from __future__ import annotations

import difflib
import importlib
import reprlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, Protocol

from omni_kernels.patching.changes import Patch

GROUP = "omni_kernels.cache_backends"
#: The table of our own methods. The kernels know no runtime, so this is the one place that names it, by a string: it is
#: of the same distribution, and is imported only when a backend is asked for.
_OWN = "omni_runtime.cache.methods"


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


#: What a plug-in must have, and what each of its keys must have, to be listed.
_BACKEND = ("name", "summary", "keys", "check", "install")
_KEY = ("name", "default", "type_name", "allowed", "doc")


def with_own(backend: CacheBackend, config: Mapping[str, Any] | None, directory: Any) -> Mapping[str, Any] | None:
    """A checked configuration with what a model's directory brings for the backend, where the caller gives nothing.

    A backend that takes nothing from there has no `with_own`.
    """
    own = getattr(backend, "with_own", None)
    return own(config, directory) if own is not None and isinstance(directory, str) else config


def complete(backend: CacheBackend, config: Mapping[str, Any] | None, directory: Any, *facts: Any) -> dict[str, Any]:
    """A backend's complete configuration, with what a model's directory brings; each value is read once.

    Args:
        facts: what is known of the transformer, where something is.

    Raises:
        ValueError, TypeError: what the backend's `check` raises.
    """
    checked = _checked(backend, config)
    own = with_own(backend, checked, directory)
    return _checked(backend, own, *facts) if facts or own is not checked else checked


def _checked(backend: CacheBackend, config: Mapping[str, Any] | None, *facts: Any) -> dict[str, Any]:
    checked: Any = backend.check(config, *facts)
    if not isinstance(checked, dict):
        raise TypeError(f"cache backend {backend.name!r}: its check gave {shown(checked)}, not a configuration")
    return checked


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known name where there is one, and all of them."""
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
    """A given value for an error message: its repr, no longer than a few lines, however large or deep it is."""
    return _Shown().repr(value)


def built_in() -> Mapping[str, CacheBackend]:
    """The methods of `omni_runtime` by name, what to try first in front; none where the kernels are alone."""
    try:
        return importlib.import_module(_OWN).METHODS
    except ModuleNotFoundError as error:
        if not f"{_OWN}.".startswith(f"{error.name}."):  # something that the methods need, and not they themselves
            raise
        return {}


def _plugins() -> dict[str, list[metadata.EntryPoint]]:
    """Others' backends by name, not yet imported: of a sound one, a single entry."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=GROUP):
        # Former versions of this distribution registered their methods, and may have been installed before this one.
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
    """A plug-in, imported. Raises ValueError, with the distribution, for one that cannot be used."""
    if len(entries) > 1:
        raise ValueError(f"two cache backends are called {name!r}: {' and '.join(map(_origin, entries))}")
    origin = _origin(entries[0])
    try:
        backend = entries[0].load()
        lacking = _lacking(backend)
    except (Exception, SystemExit) as error:  # whatever the code of others raises while it is imported
        told = f"{type(error).__name__}: {error}"[:300]
        raise ValueError(f"cache backend {name!r} of {origin} cannot be loaded: {told}") from error
    if lacking:
        raise ValueError(f"cache backend {name!r} of {origin} is not usable: it lacks {', '.join(lacking)}")
    return backend


def _lacking(backend: Any) -> list[str]:
    """What an object lacks to be a backend that can be listed and installed."""
    lacking = [one for one in _BACKEND if not hasattr(backend, one)]
    if lacking:
        return lacking
    if not isinstance(backend.keys, tuple):
        return ["a tuple of keys"]
    return [f"{one} of a key" for one in _KEY if not all(hasattr(key, one) for key in backend.keys)]


def available() -> dict[str, CacheBackend]:
    """Every backend that can be used, by name: our own, and the plug-ins that load. `refused` tells of the others."""
    return _sorted_out()[0]


def refused() -> dict[str, str]:
    """The plug-ins that cannot be used: name → why, and from which distribution they are."""
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
    """The backend of that name. A built-in one is found without a look at the plug-ins.

    Raises:
        ValueError: no such backend, with the nearest one; a plug-in that cannot be used, with its distribution and why.
        TypeError: `name` is no string.
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
