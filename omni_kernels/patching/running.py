"""Runs each call of one pipeline inside a context manager, which is closed however the call ends.

Python looks up `pipe(...)` in the pipeline's class. So this instance gets its own class, derived from its original
class and with the same name. Other instances are unchanged. Copies and pickles of the pipeline, and pipelines made from
it, have the original class.

A pipeline that is a torch.nn.Module, as vLLM-Omni's are, is also run by its `forward`: there this instance's `forward`
is replaced, which its calls run, too.

`isinstance` works as before. `type(pipe) is <original class>` is False, and the derived class itself cannot be pickled.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch

from omni_kernels.patching.changes import InstanceMethod, Patch, PatchConflictError, describe

#: Attribute of a class made here: the original class that it is derived from.
_PLAIN = "_omni_kernels_plain_class"


#: Arguments of diffusers pipelines that take a function to be called between the steps.
CALLBACKS = ("callback_on_step_end", "callback")

Opened = Callable[[], AbstractContextManager[object]]


def around_calls(pipe: Any, opened: Opened, patch: Patch, outside: Opened = contextlib.nullcontext) -> None:
    """Run each call of `pipe` inside the context manager that `opened` returns, until `patch` is undone.

    Args:
        outside: returns the context manager for the user's step callbacks during a call.

    Raises:
        TypeError: the class of `pipe` cannot be replaced (an extension type, or one with slots).
        PatchConflictError: the calls of `pipe` are already wrapped.
    """
    plain = type(pipe)
    if isinstance(pipe, torch.nn.Module):
        if isinstance(vars(pipe).get("forward"), InstanceMethod):
            raise PatchConflictError(f"this {plain.__name__} is cached already: omni_kernels.unpatch(pipe) first")
        patch.set_method(pipe, "forward", _around(pipe.forward, opened, outside))
        return
    if hasattr(plain, _PLAIN):
        raise PatchConflictError(f"this {plain.__name__} is cached already: omni_kernels.unpatch(pipe) first")
    change = _Class(pipe, plain, _derived(plain, opened, outside))
    pipe.__class__ = change.installed
    patch.add(change)


def _derived(plain: type, opened: Opened, outside: Opened) -> type:
    """A class derived from `plain`, whose calls run inside the context manager that `opened` returns."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        """Creating another pipeline from this class, as `from_pipe` does, gives one of the original class."""
        return plain(*args, **kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        """A copied or unpickled pipeline has the original class."""
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
    """`function`, run inside the context manager that `opened` returns.

    Its `__wrapped__`, which callers use to sample with gradients, is wrapped in the same way.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in CALLBACKS:
            if isinstance(kwargs.get(name), types.FunctionType | types.MethodType | functools.partial):
                kwargs[name] = _within(kwargs[name], outside)
        # Z-Image's pipeline writes the chat's template into the caller's list of prompts.
        args = tuple(list(one) if type(one) is list else one for one in args)
        kwargs = {name: list(one) if type(one) is list else one for name, one in kwargs.items()}
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
