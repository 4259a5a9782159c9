"""What a patch changed on which instance, and how to put it back.

A `Patch` writes into instance dictionaries only (an object's `__dict__`, a module's `_modules`), never into a class,
and remembers each slot's former content. Undoing is all or nothing: when another party has since replaced something
that the patch installed, nothing is touched and the conflict is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

_ABSENT: Any = object()


class PatchConflictError(RuntimeError):
    """A slot that a patch needs, or has filled, is held by somebody else."""


def describe(value: object) -> str:
    """Where a value comes from, for messages: `module.qualname` of a function, else of its type."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '?')}.{getattr(named, '__qualname__', '?')}"


class InstanceMethod(functools.partial[Any]):
    """A function in the place of one instance's method. A copy of the instance gets what stood there before.

    A plain function in an instance's `__dict__` would be carried into every copy, where it would go on working on the
    original; and a local one keeps its owner from being pickled.
    """

    _former: tuple[Any, ...]

    def __new__(cls, owner: object, name: str, function: Callable[..., Any]) -> InstanceMethod:
        """`function` in the place of `owner`'s method `name`."""
        self = super().__new__(cls, function)
        functools.update_wrapper(self, function)
        self._former = (getattr, (owner, name)) if name not in vars(owner) else (_same, (vars(owner)[name],))
        return self

    def __reduce__(self) -> Any:
        return self._former


def _same(value: Any) -> Any:
    return value


@dataclass(eq=False)
class _Slot:
    owner: object
    mapping: MutableMapping[str, Any]
    key: str
    installed: Any
    former: Any

    @property
    def current(self) -> Any:
        return self.mapping.get(self.key, _ABSENT)

    def conflict(self) -> str:
        holder = "gone" if self.current is _ABSENT else describe(self.current)
        return f"{type(self.owner).__name__}.{self.key} is now {holder}"

    def restore(self) -> None:
        if self.former is _ABSENT:
            del self.mapping[self.key]
        else:
            self.mapping[self.key] = self.former


class Patch:
    """A record of changes to instances, made through it and undone by it."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    def set_method(self, owner: object, name: str, function: Callable[..., Any]) -> None:
        """Shadow the method `name` of this one instance by `function`, which is called without the instance."""
        self._fill(owner, vars(owner), name, InstanceMethod(owner, name, function))

    def set_module(self, owner: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
        """Replace the registered child `name`; `module` must keep the child's state-dict keys."""
        self._fill(owner, owner._modules, name, module)

    def _fill(self, owner: object, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        self._slots.append(_Slot(owner, mapping, key, value, mapping.get(key, _ABSENT)))
        mapping[key] = value

    def undo(self, owner: object = None) -> None:
        """Put every slot back as it was; with `owner`, only the slots of that one instance.

        Raises:
            PatchConflictError: somebody else replaced what was installed; nothing is changed then.
        """
        slots = [slot for slot in self._slots if owner is None or slot.owner is owner]
        conflicts = [slot.conflict() for slot in slots if slot.current is not slot.installed]
        if conflicts:
            raise PatchConflictError(
                f"cannot undo the patch, because it was patched over: {'; '.join(conflicts)}. "
                "Undo what was installed on top of it first"
            )
        for slot in reversed(slots):
            slot.restore()
        self._slots = [slot for slot in self._slots if slot not in slots]
