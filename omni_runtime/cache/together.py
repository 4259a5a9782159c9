"""One forward for several requests: each has its own gate and history, and those that compute go on together.

A `Together` stands where a `Passage` stands in a forward of one request. It runs the blocks before the site for all
samples, and lets the passage of each request decide. The blocks of the site then run for the samples of those requests
that compute. The others get their forecasts where the site ends.

For this, the arguments of a block are cut by samples. Which of them have an entry for each sample is seen by comparing
the calls of a block in a batch and in a forward of one request (`Axes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.patching.ahead import Apart
from omni_runtime.cache.blocks import BlockCall, Slot, States
from omni_runtime.cache.passage import Passage
from omni_runtime.cache.stretches import versions_of


class Axes:
    """Which arguments of each block have an entry for each sample.

    Made from the arguments of the same blocks in a batched forward and in one of its calls, made alone.

    Args:
        calls: how each block is called.
        joined, alone: number of a block → its arguments, in either forward.
        total, count: the number of samples in either.

    Raises:
        ValueError: the arguments do not show it.
    """

    def __init__(
        self,
        calls: Sequence[BlockCall],
        joined: Mapping[int, Any],
        alone: Mapping[int, Any],
        total: int,
        count: int,
    ) -> None:
        if joined.keys() != alone.keys():
            raise ValueError("a batched forward calls other blocks than one of a single request")
        self._total = total
        self._trees = {index: _tree(joined[index], alone[index], total, count) for index in joined}
        for index, tree in self._trees.items():
            hidden, encoder = calls[index].inputs(*tree)
            if hidden != 1 or encoder not in (1, None):
                raise ValueError(f"the states that block {index} takes are not stored sample by sample")

    def of(self, index: int, args: Any, kwargs: Any, rows: slice | torch.Tensor, total: int) -> tuple[Any, Any]:
        """The arguments of a call of block `index`, of `total` samples, for some rows alone."""
        tree = self._trees[index]
        return tuple(_cut(args, tree[0], rows, total)), _cut(kwargs, tree[1], rows, total)


def _tree(joined: Any, alone: Any, total: int, count: int) -> Any:
    """For each tensor, how many entries a sample has in its first dimension (0: it has none); nested as the value."""
    if isinstance(joined, torch.Tensor):
        if not joined.dim():
            return 0
        if isinstance(alone, torch.Tensor) and alone.dim() == joined.dim() and len(alone) == len(joined):
            return 0
        before = len(alone) if isinstance(alone, torch.Tensor) else count
        if len(joined) % total or len(joined) * count != before * total:
            raise ValueError(f"an argument has {before} entries for {count} samples, and {len(joined)} for {total}")
        return len(joined) // total
    if isinstance(joined, (tuple, list)):
        if isinstance(joined, list) and len(joined) == total and isinstance(alone, list) and len(alone) == count:
            return "each"
        others = alone if isinstance(alone, (tuple, list)) and len(alone) == len(joined) else [None] * len(joined)
        return [_tree(one, other, total, count) for one, other in zip(joined, others, strict=True)]
    if isinstance(joined, Mapping):
        known = alone if isinstance(alone, Mapping) else {}
        return {key: _tree(one, known.get(key), total, count) for key, one in joined.items()}
    return None


def _cut(value: Any, tree: Any, rows: slice | torch.Tensor, total: int) -> Any:
    if tree is None or tree == 0:
        return value
    if isinstance(value, torch.Tensor):
        if tree == 1:
            return value[rows] if isinstance(rows, slice) else value.index_select(0, rows)
        parts = value.unflatten(0, (tree, total))
        return (parts[:, rows] if isinstance(rows, slice) else parts.index_select(1, rows)).flatten(0, 1)
    if tree == "each":
        return value[rows] if isinstance(rows, slice) else [value[row] for row in rows.tolist()]
    if isinstance(value, Mapping):
        return {key: _cut(one, tree[key], rows, total) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(one, each, rows, total) for one, each in zip(value, tree, strict=True))
    return value


class Arguments:
    """Stands where a passage stands, and keeps the arguments of each block."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}

    def slots(self, blocks: Collection[torch.nn.Module], start: int) -> Iterator[Callable[..., Any]]:
        """Yield what is called in place of each block."""
        for index, block in enumerate(blocks, start):
            yield Slot(functools.partial(self._call, index), block)

    def _call(self, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen[index] = (args, kwargs)
        return block(*args, **kwargs)


@dataclass(frozen=True)
class Member:
    """A request's part of the batch.

    Attributes:
        passage: the cached state of the request's CFG branch; its forward has begun.
        rows: its samples.
        text: the length of its text, if the batch's texts were padded; None if not.
    """

    passage: Passage
    rows: slice
    text: int | None = None


class Together:
    """A forward over the blocks for several requests.

    Args:
        calls: how each block is called.
        members: the requests, in the order of their samples.
        axes: which arguments of the blocks have an entry for each sample.
        stepwise: as in `Passage`.

    Attributes:
        ran: the number of blocks that ran for each member.
    """

    def __init__(self, calls: Sequence[BlockCall], members: Sequence[Member], axes: Axes, stepwise: bool) -> None:
        self._calls = calls
        self._members = members
        self._axes = axes
        self._stepwise = stepwise
        self._total = members[-1].rows.stop
        self._lead = members[0].passage
        self._entered: torch.Tensor | None = None
        self._base: Any = None
        self._versions: Any = None
        self._computing: list[bool] = []
        self._left_out = False  # nobody computes, and the model does nothing between its blocks
        self._rows: torch.Tensor | None = None
        self.ran = [0] * len(members)

    def finish(self) -> None:
        """End the forward.

        Raises:
            RuntimeError: the model did not call the last block of a site.
        """
        if self._base is not None:
            raise RuntimeError("the model did not call the last of the blocks that a cache may skip")
        for member in self._members:
            member.passage.finish()

    def slots(self, blocks: Collection[torch.nn.Module], start: int) -> Iterator[Callable[..., Any]]:
        """Yield what is called in place of each of `blocks`; see `Passage.slots`."""
        lead = self._lead
        if start >= lead.later_from:
            yield from self._later_slots(blocks, start)
            return
        for index, block in enumerate(blocks, start):
            if self._left_out and lead.first < index < lead.last:
                continue
            if lead.joins and index == lead.first - 1:
                yield Slot(self._before_join, block)
            elif index == lead.first and not lead.joins:
                yield Slot(self._enter, block)
            elif index == 0 or index == lead.first - 1:
                yield Slot(functools.partial(self._before, index), block)
            elif not lead.first <= index < lead.last:
                self._count()
                yield block
            elif index == lead.last - 1:
                yield Slot(self._leave, block)
            elif all(self._computing):
                self._count()
                yield block
            else:
                yield Slot(functools.partial(self._some, index), block)

    def _later_slots(self, blocks: Collection[torch.nn.Module], start: int) -> Iterator[Callable[..., Any]]:
        for index, block in enumerate(blocks, start):
            sites = [place for place, one in enumerate(self._lead.later) if one.first <= index < one.last]
            if sites:
                yield Slot(functools.partial(self._later, sites[0], index), block)
            else:
                self._count()
                yield block

    def _count(self, some: bool = False) -> None:
        for place in range(len(self._members)):
            self.ran[place] += not some or self._computing[place]

    def _run(self, block: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a block for all samples."""
        self._count()
        return block(*args, **kwargs)

    # What a member sees of the batch, and the batch made of what the members have

    def _own(self, states: States, member: Member) -> States:
        hidden, encoder = states
        if encoder is None:
            return hidden[member.rows], None
        return hidden[member.rows], encoder[member.rows] if member.text is None else encoder[member.rows, : member.text]

    def _whole(self, parts: Sequence[States], like: States) -> States:
        """The states of the batch. Texts that are shorter than in `like` are padded with zeros."""
        encoder = None
        if like[1] is not None:
            length, texts = like[1].shape[1], [part[1] for part in parts]
            encoder = torch.cat(
                [torch.nn.functional.pad(one, (0, 0, 0, length - one.shape[1])) for one in texts if one is not None]
            )
        return torch.cat([part[0] for part in parts]), encoder

    # Slots

    def _before(self, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A block before the site. The last one computes nothing ahead, because its successor may not run."""
        if index == 0:
            self._entered = self._calls[0].inputs(args, kwargs)[0]
        if index != self._lead.first - 1:
            return self._run(block, args, kwargs)
        with Apart(block):
            return self._run(block, args, kwargs)

    def _decide(self, index: int, block: torch.nn.Module, base: States, args: Any, kwargs: Any) -> None:
        """Let each member decide whether it computes the site."""
        self._computing = []
        call, entered = self._calls[index], self._entered
        for member in self._members:
            passage = member.passage
            named: Mapping[str, Any] = {}
            if passage.reads_arguments:
                own = self._axes.of(index, args, kwargs, member.rows, self._total)
                named = call.arguments(own[0], own[1]) if own[0] else own[1]
            passage.entered = None if entered is None else entered[member.rows]
            self._computing.append(passage.enter(block, self._own(base, member), named))
            passage.entered = None
        self._entered = None
        if any(self._computing) and not all(self._computing):
            chosen = [m.rows for m, computed in zip(self._members, self._computing, strict=True) if computed]
            places = [row for rows in chosen for row in range(rows.start, rows.stop)]
            self._rows = torch.tensor(places, device=base[0].device)

    def _before_join(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run block first − 1, then decide. The model makes the input of block `first` from its output."""
        index = self._lead.first - 1
        output = self._before(index, block, *args, **kwargs)
        states = self._calls[index].streams(output)
        self._decide(index, block, states, args, kwargs)
        for member, computed in zip(self._members, self._computing, strict=True):
            if computed:
                own = self._own(states, member)
                member.passage.leave(*own, own)
        return output

    def _enter(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The input of the site is known: decide, then run its first block."""
        index, alone = self._lead.first, self._lead.last - self._lead.first == 1
        call = self._calls[index]
        base = call.inputs(args, kwargs)
        self._decide(index, block, base, args, kwargs)
        if not any(self._computing) and (alone or not self._stepwise):
            self._left_out = True
            return call.output(self._made(None, base))
        self._base, self._versions = base, versions_of(base)
        if alone:
            return self._leave(block, *args, **kwargs)
        return self._some(index, block, *args, **kwargs)

    def _some(self, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A block of the site: run it for those that compute, and pass on the states of the others."""
        call = self._calls[index]
        if all(self._computing):
            return self._run(block, args, kwargs)
        states = call.inputs(args, kwargs)
        if not any(self._computing):
            return call.output(states)
        return call.output(self._scattered(self._selected(index, block, args, kwargs), states))

    def _selected(self, index: int, block: torch.nn.Module, args: Any, kwargs: Any) -> States:
        """What a block returns for the samples of those that compute."""
        assert self._rows is not None  # some compute, and some do not
        self._count(some=True)
        own = self._axes.of(index, args, kwargs, self._rows, self._total)
        return self._calls[index].streams(block(*own[0], **own[1]))

    def _each(self, computed: States) -> Iterator[tuple[Member, States | None]]:
        """Each member with its part of what was computed; None for those that skip."""
        start = 0
        for member, computes in zip(self._members, self._computing, strict=True):
            if not computes:
                yield member, None
                continue
            rows = slice(start, start + member.rows.stop - member.rows.start)
            start = rows.stop
            yield member, (computed[0][rows], None if computed[1] is None else computed[1][rows])

    def _scattered(self, computed: States, states: States) -> States:
        """The batch with what was computed; of the others, what they had."""
        parts = []
        for member, part in self._each(computed):
            own = states[0][member.rows], None if states[1] is None else states[1][member.rows]
            parts.append(own if part is None else part)
        return self._whole(parts, states)

    def _leave(self, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The last block of the site: record for those that compute, forecast for the others."""
        index = self._lead.last - 1
        base, self._base = self._base, None
        if base is None:
            return self._run(block, args, kwargs)
        self._lead.check(base, self._versions)
        call = self._calls[index]
        if not any(self._computing):
            return call.output(self._made(None, base))
        if all(self._computing):
            output = self._run(block, args, kwargs)
            self._made(call.streams(output), base)
            return output
        return call.output(self._made(self._selected(index, block, args, kwargs), base))

    def _made(self, computed: States | None, base: States) -> States:
        """What the site makes of `base`: recorded where it was computed, forecast where it was not."""
        parts = []
        each = ((m, None) for m in self._members) if computed is None else self._each(computed)
        for member, part in each:
            own = self._own(base, member)
            if part is None:
                parts.append(member.passage.forecast(own))
            else:
                encoder = part[1] if part[1] is None or member.text is None else part[1][:, : member.text]
                member.passage.leave(part[0], encoder, own)
                parts.append(part)
        if computed is not None and all(self._computing):
            return computed
        return self._whole(parts, base if computed is None else (computed[0], computed[1]))

    def _later(self, site: int, index: int, block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A block of a site behind a place where the model joins streams; whether it runs is decided."""
        call, later = self._calls[index], self._lead.later[site]
        states = call.inputs(args, kwargs)
        if index == later.first:
            self._base, self._versions = states, versions_of(states)
        ends = index == later.last - 1
        computed: States | None = None
        if all(self._computing):
            output = self._run(block, args, kwargs)
            computed = call.streams(output) if ends else None
        elif any(self._computing):
            computed = self._selected(index, block, args, kwargs)
            output = None if ends else call.output(self._scattered(computed, states))
        else:
            output = call.output(states)
        if not ends:
            return output
        base, self._base = self._base, None
        if base is None:
            raise RuntimeError(f"the model passed over block {later.first}, but not block {index}")
        self._lead.check(base, self._versions)
        parts = []
        each = ((m, None) for m in self._members) if computed is None else self._each(computed)
        for member, part in each:
            own = member.passage.later[site]
            entered = self._own(base, member)
            if part is None:
                parts.append(own.forecast(entered, member.passage.position))
            else:
                own.record(part, entered, member.passage.position)
                parts.append(part)
        return output if all(self._computing) else call.output(self._whole(parts, base))
