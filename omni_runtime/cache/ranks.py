"""Ranks that run one transformer together, and how they make the same decisions (diffusers' parallelism).

Under context parallelism each rank's blocks see a part of the tokens, in order: rank 0 has the first ones, rank 1 the
next, and so on. All parts have the same length, or nearly the same (`ulysses_anything`). The measured sums are added
over the ranks, which gives the same bits on all of them. The gate is given the shape of the whole sequence, because
the shapes of the parts differ. So all ranks compute and skip the same steps. If they disagreed at one step, the ranks
that compute it would wait for the others forever. Under tensor parallelism each rank sees all tokens, up to rounding
differences of its kernels. The ranks add their sums there, too.

Within a forward, the states are those of this rank. If diffusers splits the states at a block's entry, they are split
the same way here before they are used.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from omni_runtime.cache.blocks import BlockCall, ListRow, States
from omni_runtime.cache.models import Arguments, Tokens


class Ranks:
    """The ranks that run one transformer, and collectives among them.

    Args:
        group: their process group.
        split: whether each rank has only a part of the tokens.
        even: whether all ranks have the same number of tokens.
    """

    def __init__(self, group: Any, split: bool, even: bool) -> None:
        self._group = group
        self.split = split
        self.even = even
        self.rank: int = torch.distributed.get_rank(group)
        self.count: int = torch.distributed.get_world_size(group)

    def add(self, summands: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; the result has the same bits on each rank. The host reads nothing."""
        torch.distributed.all_reduce(summands, group=self._group)
        return summands

    def tokens(self, number: int, device: torch.device) -> list[int]:
        """The number of tokens of each rank, where `number` is this rank's. Unless `even`, the host waits for it."""
        if self.even:
            return [number] * self.count
        given = torch.tensor([number], device=device)
        numbers = [torch.empty_like(given) for _ in range(self.count)]
        torch.distributed.all_gather(numbers, given, group=self._group)
        return [int(one) for one in torch.cat(numbers).tolist()]

    def exchange(self, sent: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        """All-to-all.

        Args:
            sent: one tensor for each rank, to be sent to it.
            sizes: the number of elements that each rank sends to this one.

        Returns:
            What each rank has sent to this one, flat.
        """
        given = torch.cat([one.flatten() for one in sent])
        taken = given.new_empty(sum(sizes))
        lengths = [one.numel() for one in sent]
        torch.distributed.all_to_all_single(taken, given, sizes, lengths, group=self._group)
        return list(taken.split(sizes))


def ranks_of(transformer: torch.nn.Module) -> Ranks | None:
    """The ranks that run the transformer; None without parallelism."""
    config = getattr(transformer, "_parallel_config", None)
    if config is None:
        return None
    context = config.context_parallel_config
    if context is None:
        return Ranks(config.tensor_parallel_config._mesh.get_group(), split=False, even=True)
    even = not (context.ulysses_anything or getattr(context, "ring_anything", False))
    return Ranks(context._flattened_mesh.get_group(), split=True, even=even)


class Shard:
    """This rank's part of the sequence of one CFG branch of a request.

    Attributes:
        watched: the number of watched tokens of the sequence, over all ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.watched = 0
        self._ranks = ranks
        self._elements = 0
        self._tokens: list[int] = []
        self._first = 0
        self._shapes: list[torch.Size] | None = None

    def reshaped(self, arguments: Arguments) -> bool:
        """Whether this transformer call has different shapes from the last one.

        The arguments are not split yet, so all ranks return the same. The shapes of the parts would not do: if the
        parts are uneven, the shape of only one of them may change.
        """
        shapes = [value.shape for value in arguments.values() if isinstance(value, torch.Tensor)]
        same = shapes == self._shapes
        self._shapes = shapes
        return not same

    def measure(self, hidden: torch.Tensor, noise: Tokens | None) -> tuple[int, ...]:
        """Record a new shape of the states, which are [B, S, D] on this rank.

        Args:
            hidden: this rank's part of the states.
            noise: the tokens of the whole sequence that are watched; None for all.

        Returns:
            The shape of what is watched over all ranks, followed by the number of ranks. The number is included so
            that a schedule is replayed only with as many ranks as it was recorded with.
        """
        B, tokens, *width = hidden.shape
        self._tokens = self._ranks.tokens(tokens, hidden.device)
        whole = sum(self._tokens) if self._ranks.split else tokens
        self._first, end = (0, whole) if noise is None else noise
        self.watched = end - self._first
        self._elements = B * self.watched * hidden.shape[2:].numel()
        if not self._ranks.split:
            self._elements *= self._ranks.count  # every rank adds all of the elements
        return B, self.watched, *width, self._ranks.count

    def add(self, sums: torch.Tensor) -> int:
        """Add the sums of all ranks, in place. Returns the number of elements in them."""
        self._ranks.add(sums)
        return self._elements

    def part(self, first: int, end: int) -> Tokens:
        """Which of its tokens this rank has from the tokens [first, end) of the whole sequence."""
        if not self._ranks.split:
            return first, end
        begin = sum(self._tokens[: self._ranks.rank])
        mine = self._tokens[self._ranks.rank]
        return min(max(first - begin, 0), mine), min(max(end - begin, 0), mine)

    def parts(self, leading: int) -> list[int]:
        """How many of the first `leading` watched tokens each rank has."""
        if not self._ranks.split:
            return [leading] * self._ranks.count
        ends = [0, *itertools.accumulate(self._tokens)]
        first, last = self._first, self._first + leading
        return [max(min(end, last) - max(begin, first), 0) for begin, end in itertools.pairwise(ends)]

    def by_channels(self, x: torch.Tensor, leading: int) -> torch.Tensor:
        """Exchange tokens for channels: the first `leading` watched tokens, but only this rank's share of the channels.

        Args:
            x: this rank's watched tokens, [B, S, D].
            leading: so many of the watched tokens of the whole sequence.

        Returns:
            [B, leading, D'], where D' is about D / (number of ranks). If each rank has all tokens, D' is D.
        """
        if not self._ranks.split:
            return x[:, :leading]
        rank, parts = self._ranks.rank, self.parts(leading)
        sent = x[:, : parts[rank]].tensor_split(self._ranks.count, dim=2)
        B, _, width = sent[rank].shape
        taken = self._ranks.exchange(list(sent), [B * part * width for part in parts])
        return torch.cat([one.view(B, part, width) for one, part in zip(taken, parts, strict=True)], 1)


class SplitCall(BlockCall):
    """A `BlockCall` for a block at whose entry diffusers may split the states among the ranks."""

    def __init__(self, row: ListRow, block: torch.nn.Module) -> None:
        super().__init__(row, block)
        self._block = block

    def inputs(self, args: tuple[Any, ...], kwargs: Arguments) -> States:
        """See `BlockCall.inputs`. Returns this rank's part of the states."""
        return super().inputs(*split_inputs(self._block, args, kwargs))


def split_inputs(block: Any, args: tuple[Any, ...], kwargs: Arguments) -> tuple[tuple[Any, ...], Arguments]:
    """The arguments of a block's call as the block sees them, where diffusers splits states at its entry."""
    from diffusers.hooks.context_parallel import ContextParallelSplitHook

    registry = getattr(block, "_diffusers_hook", None)
    for hook in () if registry is None else registry.hooks.values():
        if isinstance(hook, ContextParallelSplitHook):
            args, kwargs = hook.pre_forward(block, *args, **kwargs)
    return args, kwargs
