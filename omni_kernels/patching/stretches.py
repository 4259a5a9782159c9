"""Which calls of blocks follow each other with nothing in between, so that one recording can hold them all.

A forward of a transformer calls its blocks one after the other. Where a block is given nothing but what the ones before
it returned, or what the first of them was given, or plain values, nobody has worked between them: they are a `Stretch`.
A `Trace` finds it in one forward, by the identity of tensors and by the count of writes to each. The same is watched
when the stretch has been replayed at the call of its first block, and the calls of the others arrive (`Passing`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
#: What a block returned: the states, one by one.
Output = torch.Tensor | Sequence[torch.Tensor | None]


class Block(Protocol):
    """A block of which calls are recorded; `call` runs it, the module itself or, where not `uncompiled`, compiled."""

    name: str
    module: torch.nn.Module
    call: Callable[..., Any]
    uncompiled: bool

    def unfit(self) -> str | None:
        """Why the block cannot be recorded."""


def writes(tensor: torch.Tensor) -> int | None:
    """How often a tensor has been written to in place; None where nobody counts it."""
    return None if tensor.is_inference() else tensor._version


class Watch:
    """Knows a tensor again, or a tuple of them, as long as nobody has written to it; does not keep it alive."""

    __slots__ = ("_parts", "_tensor", "_writes")

    def __init__(self, value: torch.Tensor | tuple[Any, ...]) -> None:
        self._parts: tuple[Watch, ...] | None = None
        if isinstance(value, tuple):
            self._parts = tuple(map(Watch, value))
        else:
            self._tensor = weakref.ref(value)
            self._writes = writes(value)

    def knows(self, value: Any) -> bool:
        """Whether it is the same, unwritten."""
        if self._parts is None:
            # Where it is gone, there is nothing to be known again.
            return self._tensor() is value is not None and self._writes is not None and self._writes == value._version
        if type(value) is not tuple or len(value) != len(self._parts):
            return False
        return all(part.knows(one) for part, one in zip(self._parts, value, strict=True))


def watchable(value: Any) -> bool:
    """Whether there can be a `Watch` of it."""
    if type(value) is tuple:
        return all(map(watchable, value))
    return isinstance(value, torch.Tensor)


def states_of(output: Any) -> Sequence[torch.Tensor | None]:
    """What a block returned, one by one."""
    return (output,) if isinstance(output, torch.Tensor) else output


@dataclass(frozen=True)
class Given:
    """The very argument of this name, or at this place, that the stretch's first block was given."""

    name: int | str

    def of(self, given: Mapping[int | str, Any], outputs: Sequence[Any]) -> Any:
        """The value, of the first block's arguments and what the blocks so far have returned."""
        return given[self.name]

    def is_it(self, value: Any, given: Mapping[int | str, Watch], made: Sequence[Sequence[Watch | None]]) -> bool:
        """Whether a value is what it was."""
        return given[self.name].knows(value)


@dataclass(frozen=True)
class Made:
    """State `place` of what block `block` of the stretch returned."""

    block: int
    place: int

    def of(self, given: Mapping[int | str, Any], outputs: Sequence[Any]) -> Any:
        """See `Given.of`."""
        return states_of(outputs[self.block])[self.place]

    def is_it(self, value: Any, given: Mapping[int | str, Watch], made: Sequence[Sequence[Watch | None]]) -> bool:
        """See `Given.is_it`."""
        watch = made[self.block][self.place]
        return watch is not None and watch.knows(value)


@dataclass(frozen=True)
class Plain:
    """A value without tensors."""

    value: Any

    def of(self, given: Mapping[int | str, Any], outputs: Sequence[Any]) -> Any:
        """See `Given.of`."""
        return copy.deepcopy(self.value)

    def is_it(self, value: Any, given: Mapping[int | str, Watch], made: Sequence[Sequence[Watch | None]]) -> bool:
        """See `Given.is_it`."""
        return type(value) is type(self.value) and value == self.value


Origin = Given | Made | Plain


def by_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    """All arguments of a call: those without a name by their places."""
    found: dict[int | str, Any] = dict(enumerate(args))
    found.update(kwargs)
    return found


def watches_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Watch]:
    """One of each argument that there can be one of."""
    return {name: Watch(value) for name, value in by_name(args, kwargs).items() if watchable(value)}


def watches(states: Sequence[torch.Tensor | None]) -> Sequence[Watch | None]:
    """One of each state."""
    return [None if state is None else Watch(state) for state in states]


@dataclass
class Call:
    """A block's call in a stretch. Of the first one's arguments the origins are not asked for."""

    block: Block
    positional: int = 0
    origins: dict[int | str, Origin] = field(default_factory=dict)

    def run(self, given: Mapping[int | str, Any], outputs: Sequence[Any]) -> Any:
        """Call the block."""
        values = {name: origin.of(given, outputs) for name, origin in self.origins.items()}
        named = {name: value for name, value in values.items() if isinstance(name, str)}
        return self.block.call(*(values[place] for place in range(self.positional)), **named)


@dataclass
class Stretch:
    """Calls of blocks with nothing in between."""

    calls: list[Call]

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What each block returns, where the first one is given these arguments."""
        given = by_name(args, kwargs)
        outputs = [self.calls[0].block.call(*args, **kwargs)]
        for call in self.calls[1:]:
            outputs.append(call.run(given, outputs))
        return outputs


class Trace:
    """A stretch as it is found, call by call; it keeps no tensor alive.

    Attributes:
        stretch: so far.
    """

    def __init__(self, block: Block, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.stretch = Stretch([Call(block)])
        self._given = watches_of(args, kwargs)
        self._made: list[Sequence[Watch | None]] = []
        #: Where to look for a tensor first: what was at its address may be gone, which its watch would know.
        self._places: dict[int, Made] = {}

    def returned(self, output: Any) -> bool:
        """Take up what the last block has returned; False where it is nothing that a stretch goes on from."""
        if not isinstance(output, torch.Tensor | tuple | list):
            return False
        states = states_of(output)
        if not all(state is None or isinstance(state, torch.Tensor) for state in states):
            return False
        self._made.append(watches(states))
        for place, state in enumerate(states):
            if state is not None:
                self._places[id(state)] = Made(len(self._made) - 1, place)
        return True

    def follow(self, block: Block, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call goes on with the stretch; if so, it is taken up. A block that is called again does not."""
        if any(call.block is block for call in self.stretch.calls):
            return False
        origins: dict[int | str, Origin] = {}
        for name, value in by_name(args, kwargs).items():
            origin = self._origin(value)
            if origin is None:
                return False
            origins[name] = origin
        self.stretch.calls.append(Call(block, len(args), origins))
        return True

    def _origin(self, value: Any) -> Origin | None:
        found: Origin | None = self._places.get(id(value))
        if found is not None and found.is_it(value, self._given, self._made):
            return found
        for name, watch in self._given.items():
            if watch.knows(value):
                return Given(name)
        leaves = pytree.tree_leaves(value)
        return Plain(copy.deepcopy(value)) if all(isinstance(leaf, PLAIN) for leaf in leaves) else None


class Passing:
    """A stretch that has run as a whole, while the calls of its blocks arrive one by one.

    Args:
        outputs: what each block has returned.
        made: watches of that.
        args, kwargs: of the first call.

    Attributes:
        at: how many calls have arrived.
    """

    __slots__ = ("_given", "_made", "_outputs", "_stretch", "at")

    def __init__(
        self,
        stretch: Stretch,
        outputs: Sequence[Any],
        made: Sequence[Sequence[Watch | None]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._stretch, self._outputs, self._made = stretch, outputs, made
        self._given = watches_of(args, kwargs)
        self.at = 1

    @property
    def over(self) -> bool:
        """Whether all calls have arrived."""
        return self.at == len(self._outputs)

    def next(self, block: Block, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether this is the next call of the stretch, as it was traced; `output` is then what the block returns."""
        call = self._stretch.calls[self.at]
        origins = call.origins
        if call.block is not block or len(args) != call.positional or len(args) + len(kwargs) != len(origins):
            return False
        for name, value in by_name(args, kwargs).items():
            origin = origins.get(name)
            if origin is None or not origin.is_it(value, self._given, self._made):
                return False
        self.at += 1
        return True

    @property
    def output(self) -> Any:
        """What the last block returned that was called."""
        return self._outputs[self.at - 1]
