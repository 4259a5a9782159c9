"""Records what a patch changed on which object, and undoes it.

A `Patch` of a pipeline writes only into instance dictionaries (an object's `__dict__`, a module's `_modules`), never
into a class. It remembers the former content of each slot. Undoing is all or nothing: if other code has replaced
something that the patch installed, nothing is changed and the error describes the conflict. When a library is patched,
methods of its classes are replaced (`Patch.set_function`), by the same rules.

A module's forward needs special care, because hooks of accelerate and diffusers replace it and keep the function that
they found. So the innermost forward is replaced, wherever hooks have moved it.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

#: The attribute of a patched pipeline or library that holds its handle.
HANDLE = "_omni_kernels_handle"
_ABSENT: Any = object()


class PatchConflictError(RuntimeError):
    """Other code occupies a slot that a patch needs or has filled."""


def describe(value: object) -> str:
    """Where a value comes from, for messages: `module.qualname` of a function or class, else of the value's type."""
    while isinstance(value, functools.partial):  # a partial may carry the name of the function that it wraps
        value = value.func
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '?')}.{getattr(named, '__qualname__', '?')}"


class InstanceMethod(functools.partial[Any]):
    """A function that replaces a method of one instance. A copy of the instance gets the former method.

    Where `copied` is given, a deep copy gets what it returns for the copy instead, unless the former method was put
    there by other code.

    A plain function in an instance's `__dict__` would be copied with the instance, and would still act on the
    original. A local function would also prevent pickling.
    """

    _former: tuple[Any, ...]
    _owner: Any
    _copied: Callable[[Any], Any] | None

    def __new__(
        cls, owner: object, name: str, function: Callable[..., Any], copied: Callable[[Any], Any] | None = None
    ) -> InstanceMethod:
        """`function` as a replacement for `owner`'s method `name`."""
        self = super().__new__(cls, function)
        functools.update_wrapper(self, function)
        self._owner = owner
        self._copied = copied if isinstance(vars(owner).get(name), InstanceMethod | None) else None
        self._former = (getattr, (owner, name)) if name not in vars(owner) else (_same, (vars(owner)[name],))
        return self

    def __reduce__(self) -> Any:
        return self._former

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._copied is not None:
            return self._copied(copy.deepcopy(self._owner, memo))
        former, arguments = self._former
        return former(*copy.deepcopy(arguments, memo))


def _same(value: Any) -> Any:
    return value


class Forward(functools.partial[Any]):
    """A function that replaces the forward of one module, with the module as first argument.

    If the function returns NotImplemented, the module's own forward runs with the same arguments. A copy of the module
    gets its own forward back. There is no closure, so that compiled blocks of one class share one graph.
    """

    def __new__(cls, module: torch.nn.Module, function: Callable[..., Any]) -> Forward:
        """`function` as a replacement for `module`'s forward, with that forward's signature."""
        self = super().__new__(cls, _or_own, function, type(module).forward, module)
        functools.update_wrapper(self, own_forward(module))
        return self

    def __reduce__(self) -> Any:
        return own_forward, self.args[-1:]


def _or_own(
    function: Callable[..., Any], own: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any
) -> Any:
    result = function(module, *args, **kwargs)
    if result is not NotImplemented:
        return result
    # diffusers marks some classes as allowed in graphs. Dynamo does not trace methods of these, but traces functions
    # that are passed to it.
    own = own if torch.compiler.is_compiling() else type(module).forward
    return own(module, *args, **kwargs)


def own_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward of `module`'s class, bound to `module`."""
    return types.MethodType(type(module).forward, module)


def _forwards(module: torch.nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str]]:
    """Every place that may hold a forward of this module: its own slot, and where hooks keep what they replaced."""
    yield vars(module), "forward"
    yield vars(module), "_old_forward"  # accelerate
    for reference in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()):
        yield vars(reference), "forward"
        yield vars(reference), "original_forward"


class Change(Protocol):
    """One change that a `Patch` has made."""

    @property
    def owner(self) -> object:
        """What was changed."""

    @property
    def held(self) -> bool:
        """Whether the installed value is still in place."""

    def conflict(self) -> str:
        """What occupies the slot instead."""

    def restore(self) -> None:
        """Put the former value back."""


class _ClassNamespace(MutableMapping[str, Any]):
    """The attributes of a class, writable as a mapping like an instance's `__dict__`."""

    def __init__(self, owner: type) -> None:
        self._owner = owner

    def __getitem__(self, key: str) -> Any:
        return vars(self._owner)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self._owner, key, value)

    def __delitem__(self, key: str) -> None:
        delattr(self._owner, key)

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self._owner))

    def __len__(self) -> int:
        return len(vars(self._owner))


@dataclass(eq=False)
class _ForwardChange:
    owner: torch.nn.Module
    installed: Forward
    bare: bool  # the instance had no `forward` attribute before

    def _places(self) -> list[tuple[MutableMapping[str, Any], str]]:
        return [(mapping, key) for mapping, key in _forwards(self.owner) if mapping.get(key) is self.installed]

    @property
    def held(self) -> bool:
        return bool(self._places())

    def conflict(self) -> str:
        holder = describe(vars(self.owner)["forward"]) if "forward" in vars(self.owner) else "gone"
        return f"{type(self.owner).__name__}.forward is now {holder}"

    def restore(self) -> None:
        own = own_forward(self.owner)
        for mapping, key in self._places():
            if self.bare and mapping is vars(self.owner) and key == "forward":
                del mapping[key]
            else:
                mapping[key] = own
        # A hook's wrapper also refers to what it wraps, as `__wrapped__`.
        outer = vars(self.owner).get("forward")
        while outer is not None:
            inner = getattr(outer, "__wrapped__", None)
            if inner is self.installed:
                outer.__wrapped__ = own
                inner = None
            outer = inner


@dataclass(eq=False)
class _Entry:
    owner: object
    mapping: MutableMapping[Any, Any]
    key: Any
    installed: Any
    former: Any

    @property
    def held(self) -> bool:
        return self.mapping.get(self.key, _ABSENT) is self.installed

    def conflict(self) -> str:
        current = self.mapping.get(self.key, _ABSENT)
        holder = "gone" if current is _ABSENT else describe(current)
        owner = self.owner if isinstance(self.owner, type) else type(self.owner)
        return f"{owner.__name__}.{self.key} is now {holder}"

    def restore(self) -> None:
        if self.former is _ABSENT:
            del self.mapping[self.key]
        else:
            self.mapping[self.key] = self.former


class Patch:
    """Makes changes, records them, and undoes them."""

    def __init__(self) -> None:
        self._changes: list[Change] = []

    def add(self, change: Change) -> None:
        """Add a change of another kind, which is undone with the rest."""
        self._changes.append(change)

    def take_over(self, other: Patch) -> None:
        """Add all changes that were made through another `Patch`."""
        self._changes += other._changes

    def set_function(self, owner: type, name: str, function: Callable[..., Any]) -> None:
        """Replace the method `name` of a library's class, for all its instances."""
        self._fill(owner, _ClassNamespace(owner), name, function)

    def set_method(
        self,
        owner: object,
        name: str,
        function: Callable[..., Any],
        copied: Callable[[Any], Any] | None = None,
    ) -> None:
        """Replace the method `name` of this one instance by `function`, which is called without the instance.

        Args:
            owner: the instance.
            name: the method's name.
            function: the replacement.
            copied: called with each deep copy of `owner` while the copy is made; returns the copy's method. By default
                a copy gets the former method.
        """
        self._fill(owner, vars(owner), name, InstanceMethod(owner, name, function, copied))

    def set_attribute(self, owner: object, name: str, value: Any) -> None:
        """Set an attribute of this one instance."""
        self._fill(owner, vars(owner), name, value)

    def set_module(self, owner: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
        """Replace the registered child `name`; `module` must keep the child's state-dict keys."""
        self._fill(owner, owner._modules, name, module)

    def set_forward(self, module: torch.nn.Module, function: Callable[..., Any]) -> None:
        """Replace the forward of this one module by `function`, which is called with the module as first argument.

        It replaces the forward of the module's class, beneath all hooks. If it returns NotImplemented, the replaced
        forward runs.

        Raises:
            PatchConflictError: other code has already replaced the forward.
        """
        places = []
        for mapping, key in _forwards(module):
            found = mapping.get(key)
            if isinstance(found, types.MethodType) and found == own_forward(module):
                places.append((mapping, key))
        bare = "forward" not in vars(module)
        if bare:
            places = [(vars(module), "forward")]
        if not places:
            # Wrappers of hooks have `__wrapped__`. The forward without it is the innermost.
            found = [mapping[key] for mapping, key in _forwards(module) if mapping.get(key) is not None]
            holder = next((forward for forward in found if not hasattr(forward, "__wrapped__")), found[-1])
            patched = any(isinstance(forward, Forward) for forward in found)
            raise PatchConflictError("patched already" if patched else f"its forward is {describe(holder)}")
        installed = Forward(module, function)
        for mapping, key in places:
            mapping[key] = installed
        self._changes.append(_ForwardChange(module, installed, bare))

    def record(self, owner: object, mapping: MutableMapping[Any, Any], former: Mapping[Any, Any]) -> None:
        """Record what other code has just written into `mapping`. `former` is a copy of it from before."""
        for key in {**former, **mapping}:
            then, now = former.get(key, _ABSENT), mapping.get(key, _ABSENT)
            if now is not then:
                self._changes.append(_Entry(owner, mapping, key, now, then))

    def _fill(self, owner: object, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        self._changes.append(_Entry(owner, mapping, key, value, mapping.get(key, _ABSENT)))
        mapping[key] = value

    def conflicts(self, owner: object = None) -> list[str]:
        """What occupies the slots whose installed value was replaced; with `owner`, only for that instance."""
        changes = [change for change in self._changes if owner is None or change.owner is owner]
        return [change.conflict() for change in changes if not change.held]

    def undo(self, owner: object = None) -> None:
        """Restore every slot; with `owner`, only the slots of that instance.

        Raises:
            PatchConflictError: other code has replaced something that was installed. Nothing is changed then.
        """
        changes = [change for change in self._changes if owner is None or change.owner is owner]
        conflicts = self.conflicts(owner)
        if conflicts:
            raise PatchConflictError(
                f"cannot undo the patch, because it was patched over: {'; '.join(conflicts)}. "
                "Undo what was installed on top of it first"
            )
        for change in reversed(changes):
            change.restore()
        self._changes = [change for change in self._changes if change not in changes]

    def release(self) -> None:
        """Undo all changes that are still in place, and forget the others. For temporary changes.

        If other code has replaced one, its replacement stays, and still calls what it had found there.
        """
        for change in reversed(self._changes):
            if change.held:
                change.restore()
        self._changes = []
