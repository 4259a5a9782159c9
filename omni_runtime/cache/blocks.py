"""The block-list seam: the model's own forward iterates over a list that decides what is called for each block.

A transformer's forward iterates over its block lists. `BlockList` replaces a list among the transformer's children. It
shares the list's blocks, so state-dict keys, hooks and casts stay valid. When a forward iterates over it, it returns
what the forward's `Passage` gives: the blocks themselves, or slots that observe or skip them. What the model does
between the blocks is unchanged: for example, the model itself adds a ControlNet's residuals.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from omni_runtime.cache.lifecycle import CURRENT, Sampling
from omni_runtime.cache.models import Arguments

#: The (hidden, encoder) states, [B, S, D] and [B, T, D]; encoder is None if there is only one stream.
States = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class ListRow:
    """How the blocks of one list are called; all of them in the same way.

    Attributes:
        name: the path of the list in the transformer.
        hidden, encoder: the names of the blocks' arguments for the image and the text stream; `encoder` is None if
            there is only one stream.
        returns: what a block returns: the hidden states alone, or a tuple of streams, in which None stands for None.
        ends: whether the last block returns None for the text stream.
    """

    name: str
    hidden: str
    encoder: str | None
    returns: Literal["hidden"] | tuple[str | None, ...]
    ends: bool = False


class BlockList(torch.nn.ModuleList):
    """A block list that lets the current forward decide what is called in place of each block."""

    _start: int | None
    _count: int
    _sampling: Sampling

    def __init__(self, blocks: torch.nn.ModuleList, start: int | None, sampling: Sampling) -> None:
        super().__init__()
        own = {"_modules": blocks._modules, "_start": start, "_count": len(blocks), "_sampling": sampling}
        self.__dict__.update({**vars(blocks), **own})

    def __iter__(self) -> Iterator[Any]:
        """The blocks; within a forward of the sampling, what its passage hands out in their place."""
        blocks: Any = self._modules.values()
        sampling = self._sampling
        passage = sampling.passage if CURRENT.get() is sampling else None
        if passage is None or self._start is None:
            return iter(blocks)
        if len(blocks) != self._count:
            self._refuse()
        return passage.slots(blocks, self._start)

    def _refuse(self) -> None:
        kind = type(next(iter(self._modules.values()), None)).__name__
        raise RuntimeError(
            f"a list of {kind} has {len(self._modules)} blocks, and had {self._count} when the pipeline was called: "
            "what a cache has kept does not fit it"
        )

    def begin_at(self, start: int | None) -> None:
        """Say which block of the model is the first of this list; None if its blocks are not the cache's."""
        self._start = start

    def __getitem__(self, index: Any) -> Any:
        """A block; for a slice, a list of blocks, which is part of this one if it leaves none out in between."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = torch.nn.ModuleList(list(self._modules.values())[index])
        first, _, step = index.indices(len(self))
        if self._start is None or step != 1:
            return part
        if len(self) != self._count:
            self._refuse()
        return BlockList(part, self._start + first, self._sampling)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copied or pickled list becomes a plain one: the copy is not patched."""
        return (
            torch.nn.ModuleList,
            (),
            {k: v for k, v in vars(self).items() if k not in ("_start", "_count", "_sampling")},
        )


class BlockCall:
    """How one block is called and what it returns, as in the first forward. Later calls are checked against that."""

    def __init__(self, row: ListRow, block: torch.nn.Module) -> None:
        self._hidden, self._encoder = row.hidden, row.encoder
        #: (hidden, encoder) → what the block would return.
        self.output: Callable[[Any], Any]
        self.output, self._streams = _conversions(row.returns)
        self._absent = [place for place, role in enumerate(row.returns) if role is None]
        self._returned = None if row.returns == "hidden" else len(row.returns)
        self._names = tuple(inspect.signature(block.forward).parameters)
        self._place = self._names.index(row.hidden)
        self._encoder_place = self._names.index(row.encoder) if row.encoder else -1
        self._kind = type(block).__name__

    def inputs(self, args: tuple[Any, ...], kwargs: Arguments) -> States:
        """The (hidden, encoder) states from the arguments of a call.

        Raises:
            RuntimeError: the call lacks one of them.
        """
        given, encoder = len(args), self._encoder
        try:
            hidden = args[self._place] if self._place < given else kwargs[self._hidden]
            if encoder is None:
                return hidden, None
            return hidden, args[self._encoder_place] if self._encoder_place < given else kwargs[encoder]
        except KeyError as error:
            raise RuntimeError(f"a {self._kind} was called without {error}, unlike in the first forward") from error

    def streams(self, output: Any) -> States:
        """The (hidden, encoder) states in what the block has returned.

        Raises:
            RuntimeError: it has returned something else than in the first forward.
        """
        if self._returned is None:
            fits = isinstance(output, torch.Tensor)
        else:
            fits = isinstance(output, (tuple, list)) and len(output) == self._returned
        if fits and self._absent:
            fits = all(output[place] is None for place in self._absent)
        if fits:
            return self._streams(output)
        raise RuntimeError(f"a {self._kind} returned something else than in the first forward")

    def arguments(self, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """All arguments of a call by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs


def _conversions(returns: Literal["hidden"] | tuple[str | None, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """From (hidden, encoder) to what a block returns, and back."""
    if returns == "hidden":
        return operator.itemgetter(0), _hidden_alone
    if returns == ("encoder", "hidden"):
        return operator.itemgetter(1, 0), operator.itemgetter(1, 0)
    if returns == ("hidden", "encoder"):
        return operator.itemgetter(0, 1), operator.itemgetter(0, 1)
    places = [{"hidden": 0, "encoder": 1}.get(role or "") for role in returns]

    def output(states: States) -> tuple[Any, ...]:
        return tuple(None if place is None else states[place] for place in places)

    def streams(made: Any) -> States:
        found = dict(zip(places, made, strict=True))
        return found[0], found.get(1)

    return output, streams


def _hidden_alone(output: torch.Tensor) -> tuple[torch.Tensor, None]:
    return output, None


class Slot(functools.partial[Any]):
    """What a forward gets in place of a block. It has the block's attributes and is called like the block.

    `Slot(call, block)(*args, **kwargs)` is `call(block, *args, **kwargs)`.
    """

    @property
    def __class__(self) -> type:  # `isinstance(block, ...)` in the model's forward is what it would be without a cache
        return type(self.args[-1])

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("the class of a slot cannot be changed")

    def __eq__(self, other: object) -> bool:
        return self is other or self.args[-1] is other

    def __hash__(self) -> int:
        return hash(self.args[-1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.args[-1], name)
