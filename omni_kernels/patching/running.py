"""The calls of one pipeline: something is open from the beginning of each to its end, however it is left.

Python looks `pipe(...)` up in the pipeline's class. So this one instance is given a class of its own, derived from its
class and called the same; no other instance is touched. Copies and pickles of the pipeline, and pipelines that are made
from it, are of the plain class.

`isinstance` holds as before; `type(pipe) is` its class does not, and the class made here cannot be pickled by itself.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

from omni_kernels.patching.changes import Patch, PatchConflictError, describe

#: On a class made here: the class that it is derived from.
_PLAIN = "_omni_kernels_plain_class"


#: Arguments by which diffusers' pipelines take a function that they call between their steps.
CALLBACKS = ("callback_on_step_end", "callback")

Opened = Callable[[], AbstractContextManager[object]]


def around_calls(pipe: Any, opened: Opened, patch: Patch, outside: Opened = contextlib.nullcontext) -> None:
    """Open what `opened` gives around each call of `pipe`, until `patch` is undone.

    Args:
        outside: gives what is open while a callback of the caller's runs within a call.

    Raises:
        TypeError: the class of `pipe` cannot be exchanged (an extension type, or one with slots).
        PatchConflictError: calls of `pipe` are followed already.
    """
    plain = type(pipe)
    if hasattr(plain, _PLAIN):
        raise PatchConflictError(f"this {plain.__name__} is cached already: omni_kernels.unpatch(pipe) first")
    change = _Class(pipe, plain, _derived(plain, opened, outside))
    pipe.__class__ = change.installed
    patch.add(change)


def _derived(plain: type, opened: Opened, outside: Opened) -> type:
    """A class like `plain`, whose one instance opens something around its calls."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        """Whoever makes another pipeline of this class, as `from_pipe` does, gets a plain one."""
        return plain(*args, **kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        """A copied or pickled pipeline is of the plain class."""
        _, _, *state = cast("tuple[Any, ...]", object.__reduce_ex__(self, max(protocol, 2)))
        return object.__new__, (plain,), *state

    members = {
        "__call__": _around(plain.__call__, opened, outside),
        "__new__": new,
        "__reduce_ex__": reduced,
        _PLAIN: plain,
    }
    same = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain)(plain.__name__, (plain,), members | same)


def _around(function: Callable[..., Any], opened: Opened, outside: Opened) -> Callable[..., Any]:
    """`function` with something open while it runs; so is what it wraps, which is how to sample with a gradient."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in CALLBACKS:
            if isinstance(kwargs.get(name), types.FunctionType | types.MethodType | functools.partial):
                kwargs[name] = _within(kwargs[name], outside)
        with opened():
            return function(*args, **kwargs)

    inner = getattr(function, "__wrapped__", None)
    if inner is not None:
        call.__wrapped__ = _around(inner, opened, outside)
    return call


def _within(function: Callable[..., Any], context: Opened) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return call


@dataclass(eq=False)
class _Class:
    """The change of an instance's class."""

    owner: Any
    plain: type
    installed: type

    @property
    def held(self) -> bool:
        return type(self.owner) is self.installed

    def conflict(self) -> str:
        return f"the class of this {self.plain.__name__} is now {describe(type(self.owner))}"

    def restore(self) -> None:
        self.owner.__class__ = self.plain
