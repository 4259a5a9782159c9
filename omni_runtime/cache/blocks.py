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
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch

from omni_runtime.cache.lifecycle import CURRENT, Sampling
from omni_runtime.cache.models import Arguments, ListRow, ModelRow

#: The (hidden, encoder) states, [B, S, D] and [B, T, D]; no encoder states where there is a single stream.
States = tuple[torch.Tensor, torch.Tensor | None]


class BlockList(torch.nn.ModuleList):
    """A block list that lets the forward under way decide what is called in each block's place."""

    _start: int
    _sampling: Sampling

    def __init__(self, blocks: torch.nn.ModuleList, start: int, sampling: Sampling) -> None:
        super().__init__()
        self.__dict__.update({**vars(blocks), "_modules": blocks._modules, "_start": start, "_sampling": sampling})

    def __iter__(self) -> Iterator[Any]:
        """The blocks; within a forward under way, what stands for them."""
        blocks: Any = self._modules.values()
        sampling = self._sampling
        passage = sampling.passage if CURRENT.get() is sampling else None
        return iter(blocks) if passage is None else passage.slots(blocks, self._start)

    def __getitem__(self, index: Any) -> Any:
        """A block, or a plain list of some."""
        if isinstance(index, slice):
            return torch.nn.ModuleList(list(self._modules.values())[index])
        return super().__getitem__(index)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copied or pickled list is a plain one: the copy is not patched."""
        return torch.nn.ModuleList, (), {k: v for k, v in vars(self).items() if k not in ("_start", "_sampling")}


class BlockCall:
    """How one block is called, and what it returns, in the terms of the row of its list."""

    def __init__(self, row: ListRow, block: torch.nn.Module) -> None:
        self._hidden, self._encoder = row.hidden, row.encoder
        alone = row.returns == "hidden"
        #: (hidden, encoder) → what the block would return.
        self.output: Callable[[Any], Any] = operator.itemgetter(0) if alone else operator.itemgetter(1, 0)
        #: what the block returned → (hidden, encoder).
        self.streams: Callable[[Any], States] = _hidden_alone if alone else operator.itemgetter(1, 0)
        self._names = tuple(inspect.signature(block.forward).parameters)
        self._place = self._names.index(row.hidden)
        self._encoder_place = self._names.index(row.encoder) if row.encoder else -1

    def inputs(self, args: tuple[Any, ...], kwargs: Arguments) -> States:
        """The (hidden, encoder) states among the arguments of a call."""
        given, encoder = len(args), self._encoder
        hidden = args[self._place] if self._place < given else kwargs[self._hidden]
        if encoder is None:
            return hidden, None
        return hidden, args[self._encoder_place] if self._encoder_place < given else kwargs[encoder]

    def arguments(self, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """All arguments of a call by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs


class ForwardCall:
    """How a transformer's forward is called."""

    def __init__(self, row: ModelRow, forward: Callable[..., Any]) -> None:
        parameters = list(inspect.signature(forward).parameters)
        self._names = tuple(parameters)
        self._between = [(name, parameters.index(name)) for name in row.between if name in parameters]

    def arguments(self, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """All arguments of a call by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs

    def works_between(self, args: tuple[Any, ...], kwargs: Arguments) -> bool:
        """Whether a call has the forward do anything between its blocks."""
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
