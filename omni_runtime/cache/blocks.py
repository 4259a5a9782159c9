"""The block-list seam: the model's own forward runs over a list that hands out what is to be called.

A transformer's forward iterates over its block lists. `BlockList` takes a list's place among the transformer's
children, sharing its blocks and so its state-dict keys, hooks and casts; iterated from within a forward that is under
way, it hands out the blocks through the `Passage` of that forward, which calls them, watches them or passes them
over. Between the blocks the model does as it always does: a ControlNet's residuals, for one, are added by the model
itself.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch

from omni_runtime.cache.models import Arguments, ModelRow

#: The (hidden, encoder) states, [B, S, D] and [B, T, D]; no encoder states where there is a single stream.
States = tuple[torch.Tensor, torch.Tensor | None]


class Forwards(Protocol):
    """Whoever knows the passage of the forward under way; None outside one."""

    passage: Passage | None


class BlockList(torch.nn.ModuleList):
    """A block list that lets the forward under way decide what is called in each block's place."""

    _start: int
    _forwards: Forwards

    def __init__(self, blocks: torch.nn.ModuleList, start: int, forwards: Forwards) -> None:
        super().__init__()
        self.__dict__.update({**vars(blocks), "_modules": blocks._modules})
        self.__dict__["_start"] = start
        self.__dict__["_forwards"] = forwards

    def __iter__(self) -> Iterator[Any]:
        """The blocks; within a forward under way, what stands for them."""
        blocks: Any = self._modules.values()
        passage = self._forwards.passage
        return iter(blocks) if passage is None else passage.slots(blocks, self._start)

    def __getitem__(self, index: Any) -> Any:
        """A block, or a plain list of some."""
        if isinstance(index, slice):
            return torch.nn.ModuleList(list(self._modules.values())[index])
        return super().__getitem__(index)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copied or pickled list is a plain one: the copy is not patched."""
        return torch.nn.ModuleList, (), {k: v for k, v in vars(self).items() if k not in ("_start", "_forwards")}


class BlockCalls:
    """How the blocks of a model are called, and what they return, in the terms of its row."""

    def __init__(self, row: ModelRow, blocks: list[torch.nn.Module], forward: Callable[..., Any]) -> None:
        self._hidden, self._encoder = row.hidden, row.encoder
        alone = row.returns == "hidden"
        #: (hidden, encoder) → what a block would return.
        self.output: Callable[[Any], Any] = operator.itemgetter(0) if alone else operator.itemgetter(1, 0)
        #: what a block returned → (hidden, encoder).
        self.streams: Callable[[Any], States] = _hidden_alone if alone else operator.itemgetter(1, 0)
        self.names = [tuple(inspect.signature(block.forward).parameters) for block in blocks]
        self._places = [
            (names.index(row.hidden), names.index(row.encoder) if row.encoder else -1) for names in self.names
        ]
        parameters = list(inspect.signature(forward).parameters)
        self.forward_names = tuple(parameters)
        self._between = [(name, parameters.index(name)) for name in row.between if name in parameters]

    def inputs(self, index: int, args: tuple[Any, ...], kwargs: Arguments) -> States:
        """The (hidden, encoder) states among the arguments of block `index`."""
        place, encoder_place = self._places[index]
        given, encoder = len(args), self._encoder
        hidden = args[place] if place < given else kwargs[self._hidden]
        if encoder is None:
            return hidden, None
        return hidden, args[encoder_place] if encoder_place < given else kwargs[encoder]

    def arguments(self, index: int, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """All arguments of block `index` by name."""
        return {**dict(zip(self.names[index], args, strict=False)), **kwargs} if args else kwargs

    def works_between(self, args: tuple[Any, ...], kwargs: Arguments) -> bool:
        """Whether this forward of the transformer does anything between its blocks."""
        for name, place in self._between:  # noqa: SIM110 -- on the path of every forward, where a generator costs more
            if kwargs.get(name) is not None or len(args) > place:
                return True
        return False


def _hidden_alone(output: torch.Tensor) -> tuple[torch.Tensor, None]:
    return output, None


class Slot(functools.partial[Any]):
    """What a forward is handed in a block's place: it has the block's attributes, and is called like it.

    `Slot(call, block)` calls `call` with the block and the arguments of its call.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(self.args[-1], name)


class Passage:
    """Forwards over the blocks, of which [first, last) may be skipped, one after the other.

    Subclasses' hooks: `enter` sees what enters block `first` and says whether to compute; `leave` sees what the last
    skippable block returned; `forecast` gives what it would have returned. No state of a forward outlives it.

    Attributes:
        ran: how many blocks ran, to be set to 0 before each forward.
        stepwise: whether the forward works between its blocks. With nothing to do there, what the block before `first`
            returns is what enters `first`: it is decided there, and a skipped stretch is left at once.
        entered: the hidden states that entered block 0, where that is not block `first`.
    """

    __slots__ = ("_base", "calls", "computing", "entered", "first", "last", "ran", "stepwise")

    def __init__(self, calls: BlockCalls, first: int, last: int) -> None:
        self.calls = calls
        self.first, self.last = first, last
        self.computing = True
        self.ran = 0
        self.stepwise = True
        self.entered: torch.Tensor | None = None
        self._base: States | None = None

    def enter(self, block: torch.nn.Module, base: Any, arguments: Arguments) -> bool:
        """Whether the blocks [first, last) run in this forward.

        Args:
            block: whose call is under way: `first`, or the one before it.
            base: what enters block `first`, a pair (hidden, encoder).
            arguments: those of the call under way, by name.
        """
        raise NotImplementedError

    def leave(self, hidden: torch.Tensor, encoder: torch.Tensor | None, base: Any) -> None:
        """The skippable blocks have run, from `base`, a pair like (hidden, encoder)."""
        raise NotImplementedError

    def forecast(self, base: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden, encoder) as the skippable blocks would have left them."""
        raise NotImplementedError

    def slots(self, blocks: Collection[torch.nn.Module], start: int) -> Iterator[Callable[..., Any]]:
        """What is called in place of each of `blocks`, the first of which is block `start` of the model."""
        first, last, end = self.first, self.last, start + len(blocks)
        decided = first if self.stepwise or not start < first < end else first - 1
        numbered = enumerate(blocks, start)
        for index, block in numbered:
            if index == decided:
                yield Slot(self._first if index == first else self._before, block)
                if not self.computing and not self.stepwise:
                    if last >= end:
                        return
                    skipped = last - index - 1
                    next(itertools.islice(numbered, skipped, skipped), None)
            elif index == 0:
                yield Slot(self._zeroth, block)
            elif not first <= index < last or (self.computing and index != last - 1):
                self.ran += 1
                yield block
            elif index == last - 1:
                if self.computing:
                    yield Slot(self._last, block)
                elif self.stepwise:
                    yield Slot(self._arrive, block)
            elif self.stepwise:
                yield Slot(functools.partial(self._pass_over, index), block)

    def _zeroth(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.entered, _ = self.calls.inputs(0, args, kwargs)
        self.ran += 1
        return block(*args, **kwargs)

    def _before(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Block first − 1 runs, and what it returns is all that is to be known of what enters block `first`."""
        calls, index = self.calls, self.first - 1
        if index == 0:
            self.entered, _ = calls.inputs(0, args, kwargs)
        output = self._run(block, args, kwargs)
        base = calls.streams(output)
        self.computing = self.enter(block, base, calls.arguments(index, args, kwargs) if args else kwargs)
        self.entered = None
        if not self.computing:
            return calls.output(self.forecast(base))
        self._base = base
        return output

    def _first(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls, index = self.calls, self.first
        base = calls.inputs(index, args, kwargs)
        self.computing = self.enter(block, base, calls.arguments(index, args, kwargs) if args else kwargs)
        self.entered = None
        if not self.computing and not (self.stepwise and self.last - index > 1):
            return calls.output(self.forecast(base))
        self._base = base
        if not self.computing:
            return calls.output(base)
        return self._last(block, *args, **kwargs) if self.last - index == 1 else self._run(block, args, kwargs)

    def _run(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.ran += 1
        return block(*args, **kwargs)

    def _last(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self._run(block, args, kwargs)
        base, self._base = self._base, None
        self.leave(*self.calls.streams(output), base)
        return output

    def _pass_over(self, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The states as they are."""
        return self.calls.output(self.calls.inputs(index, args, kwargs))

    def _arrive(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the last skippable block would have returned, from the states in which the first was to be called."""
        base, self._base = self._base, None
        return self.calls.output(self.forecast(base))
