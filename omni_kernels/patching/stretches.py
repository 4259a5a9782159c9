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


class Block(Protocol):
    """A block of which calls are recorded; `call` runs it, the module itself or, where not `uncompiled`, compiled."""

    name: str
    module: torch.nn.Module
    call: Callable[..., Any]
    uncompiled: bool
    changes: int
    known: dict[Any, Any]

    def unfit(self) -> str | None:
        """Why the block cannot be recorded."""


def writes(tensor: torch.Tensor) -> int | None:
    """How often a tensor has been written to in place; None where nobody counts it."""
    return None if tensor.is_inference() else tensor._version


def plain(value: Any) -> bool:
    """Whether a value is a number, a text or the like, which a recording may hold for good."""
    return isinstance(value, PLAIN)


class Watch:
    """Knows a value again as long as nobody has written to it: tensors themselves, what else there is by value.

    It keeps no tensor alive.
    """

    __slots__ = ("_leaves", "_structure", "_tensor", "_writes")

    def __init__(self, value: Any) -> None:
        self._leaves: list[Any] | None = None
        self._tensor: Any = None
        if isinstance(value, torch.Tensor):
            self._tensor, self._writes = weakref.ref(value), writes(value)
        elif plain(value):
            self._leaves, self._structure = [value], None
        else:
            leaves, self._structure = pytree.tree_flatten(value)
            self._leaves = [Watch(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def knows(self, value: Any) -> bool:
        """Whether it is the same, unwritten."""
        if self._leaves is None:
            # Where it is gone, there is nothing to be known again.
            return self._tensor() is value is not None and self._writes is not None and self._writes == value._version
        if self._structure is None:
            return type(value) is type(self._leaves[0]) and value == self._leaves[0]
        leaves, structure = pytree.tree_flatten(value)
        if structure != self._structure:
            return False
        return all(
            then.knows(now) if isinstance(then, Watch) else plain(now) and type(now) is type(then) and now == then
            for then, now in zip(self._leaves, leaves, strict=True)
        )


def states_of(output: Any) -> Sequence[torch.Tensor | None] | None:
    """What a block returned, one by one; None where that is not tensors, of which some may be None."""
    if isinstance(output, torch.Tensor):
        return (output,)
    states = isinstance(output, tuple) and all(state is None or isinstance(state, torch.Tensor) for state in output)
    return output if states else None


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
        output = outputs[self.block]
        return output if isinstance(output, torch.Tensor) else output[self.place]

    def is_it(self, value: Any, given: Mapping[int | str, Watch], made: Sequence[Sequence[Watch | None]]) -> bool:
        """See `Given.is_it`."""
        watch = made[self.block][self.place]
        return watch is not None and watch.knows(value)


@dataclass(frozen=True)
class Plain:
    """A value without tensors, and its watch."""

    value: Any
    watch: Watch

    def of(self, given: Mapping[int | str, Any], outputs: Sequence[Any]) -> Any:
        """See `Given.of`."""
        return copy.deepcopy(self.value)

    def is_it(self, value: Any, given: Mapping[int | str, Watch], made: Sequence[Sequence[Watch | None]]) -> bool:
        """See `Given.is_it`."""
        return self.watch.knows(value)


Origin = Given | Made | Plain


def by_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    """All arguments of a call: those without a name by their places."""
    found: dict[int | str, Any] = dict(enumerate(args))
    found.update(kwargs)
    return found


def watches_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Watch]:
    """One of each argument."""
    return {name: Watch(value) for name, value in by_name(args, kwargs).items()}


def watches(states: Sequence[torch.Tensor | None]) -> Sequence[Watch | None]:
    """One of each state."""
    return [None if state is None else Watch(state) for state in states]


@dataclass
class Call:
    """A block's call in a stretch. Of the first one's arguments the origins are not asked for."""

    block: Block
    positional: int = 0
    origins: dict[int | str, Origin] = field(default_factory=dict)

    @property
    def made(self) -> list[Made]:
        """What it is given of what others returned."""
        return [origin for origin in self.origins.values() if isinstance(origin, Made)]

    def run(self, given: Mapping[int | str, Any], outputs: Sequence[Any]) -> Any:
        """Call the block."""
        values = {name: origin.of(given, outputs) for name, origin in self.origins.items()}
        named = {name: value for name, value in values.items() if isinstance(name, str)}
        return self.block.call(*(values[place] for place in range(self.positional)), **named)


@dataclass
class Stretch:
    """Calls of blocks with nothing in between."""

    calls: list[Call]

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], keep: Callable[[int, Any], None]) -> None:
        """Call the blocks, where the first one is given these arguments; `keep` is told what each returns.

        What no block is given any more is let go.
        """
        needed = {origin.block: place for place, call in enumerate(self.calls) for origin in call.made}
        given = by_name(args, kwargs)
        outputs: list[Any] = []
        for place, call in enumerate(self.calls):
            outputs.append(call.run(given, outputs) if place else call.block.call(*args, **kwargs))
            keep(place, outputs[-1])
            for block, last in needed.items():
                if last <= place:
                    outputs[block] = None
            if place not in needed:
                outputs[place] = None


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
        states = states_of(output)
        if states is None:
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
        if all(map(plain, pytree.tree_leaves(value))):
            kept = copy.deepcopy(value)
            return Plain(kept, Watch(kept))
        return None


class Passing:
    """A stretch that has run as a whole, while the calls of its blocks arrive one by one.

    Args:
        outputs: what each block has returned.
        args, kwargs: of the first call.

    Attributes:
        at: how many calls have arrived.
    """

    __slots__ = ("_given", "_made", "_outputs", "_stretch", "at")

    def __init__(
        self,
        stretch: Stretch,
        outputs: Sequence[Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._stretch, self._outputs = stretch, outputs
        self._made = [watches(states_of(output) or ()) for output in outputs[:-1]]
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
