"""Ranks that run one transformer together, and how they come to one decision (diffusers' parallelism).

Under context parallelism each rank's blocks see some of the tokens: rank 0 the first ones, rank 1 those behind them,
and so on, all as many, or nearly (`ulysses_anything`). What decides is summed over the ranks, which leaves the same
bits on all of them, and shapes, which differ, are those of the whole sequence. So every rank computes and skips the
same steps: were they to part at one, those that compute would wait for the others for ever. Under tensor parallelism
each rank sees all tokens, the same but for what its own kernels may round otherwise, and they decide by the same sums.

Within a forward, states are this rank's. Where diffusers splits them as they enter a block, they are taken as it will.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_runtime.cache.blocks import BlockCall, States
from omni_runtime.cache.models import Arguments, ListRow


class Ranks:
    """The ranks that run one transformer; collectives among them.

    Args:
        group: theirs.
        split: whether each has some of the tokens, and not all.
        even: whether they all have as many.
    """

    def __init__(self, group: Any, split: bool, even: bool) -> None:
        self._group = group
        self.split = split
        self.even = even
        self.rank: int = torch.distributed.get_rank(group)
        self.count: int = torch.distributed.get_world_size(group)

    def add(self, summands: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each; written over the summands. Nothing is read by the host."""
        torch.distributed.all_reduce(summands, group=self._group)
        return summands

    def tokens(self, number: int, device: torch.device) -> list[int]:
        """How many tokens each rank has, of which this one has that number; where they differ, the host waits."""
        if self.even:
            return [number] * self.count
        given = torch.tensor([number], device=device)
        numbers = [torch.empty_like(given) for _ in range(self.count)]
        torch.distributed.all_gather(numbers, given, group=self._group)
        return [int(one) for one in torch.cat(numbers).tolist()]

    def exchange(self, sent: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        """What each rank has sent to this one, flat, of `sizes` elements; `sent` has for each rank what is for it."""
        given = torch.cat([one.flatten() for one in sent])
        taken = given.new_empty(sum(sizes))
        lengths = [one.numel() for one in sent]
        torch.distributed.all_to_all_single(taken, given, sizes, lengths, group=self._group)
        return list(taken.split(sizes))


def ranks_of(transformer: torch.nn.Module) -> Ranks | None:
    """The ranks that run the transformer; None where this one does so alone."""
    config = getattr(transformer, "_parallel_config", None)
    if config is None:
        return None
    context = config.context_parallel_config
    if context is None:
        return Ranks(config.tensor_parallel_config._mesh.get_group(), split=False, even=True)
    even = not (context.ulysses_anything or getattr(context, "ring_anything", False))
    return Ranks(context._flattened_mesh.get_group(), split=True, even=even)


class Shard:
    """What is this rank's of the sequence that one CFG branch of a request works on.

    Attributes:
        watched: how many tokens of it are watched, on whatever rank.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.watched = 0
        self._ranks = ranks
        self._elements = 0
        self._tokens: list[int] = []
        self._shapes: list[torch.Size] | None = None

    def reshaped(self, arguments: Arguments) -> bool:
        """Whether this call of the transformer has other shapes than the last one.

        The arguments are whole on every rank, and all ranks say the same: of uneven shards one may change alone.
        """
        shapes = [value.shape for value in arguments.values() if isinstance(value, torch.Tensor)]
        same = shapes == self._shapes
        self._shapes = shapes
        return not same

    def measure(self, hidden: torch.Tensor, noise_tokens: int | None) -> tuple[int, ...]:
        """States of a new shape have come, [B, S, D] on this rank. Gives the shape of what is watched of all ranks.

        With the number of ranks: what was decided on another number of them, or on one alone, was not decided together.
        """
        B, tokens, *width = hidden.shape
        self._tokens = self._ranks.tokens(tokens, hidden.device)
        whole = sum(self._tokens) if self._ranks.split else tokens
        self.watched = whole if noise_tokens is None else noise_tokens
        self._elements = B * self.watched * hidden.shape[2:].numel()
        if not self._ranks.split:
            self._elements *= self._ranks.count  # each is added up as often
        return B, self.watched, *width, self._ranks.count

    def add(self, sums: torch.Tensor) -> int:
        """Add up what each rank has measured, in place; gives how many elements that was."""
        self._ranks.add(sums)
        return self._elements

    def part(self, leading: int) -> int:
        """How many of the sequence's first `leading` tokens are this rank's."""
        return self.parts(leading)[self._ranks.rank]

    def parts(self, leading: int) -> list[int]:
        """How many of the sequence's first `leading` tokens each rank has."""
        if not self._ranks.split:
            return [leading] * self._ranks.count
        parts = []
        for tokens in self._tokens:
            parts.append(min(tokens, leading))
            leading -= parts[-1]
        return parts

    def by_channels(self, x: torch.Tensor, leading: int) -> torch.Tensor:
        """All of the first `leading` tokens, of which x [B, S, D] has some, but of its channels this rank's alone.

        Returns:
            [B, leading, D'] with D' nearly D over the number of ranks; x's own D where it has all the tokens.
        """
        if not self._ranks.split:
            return x[:, :leading]
        rank, parts = self._ranks.rank, self.parts(leading)
        sent = x[:, : parts[rank]].tensor_split(self._ranks.count, dim=2)
        B, _, width = sent[rank].shape
        taken = self._ranks.exchange(list(sent), [B * part * width for part in parts])
        return torch.cat([one.view(B, part, width) for one, part in zip(taken, parts, strict=True)], 1)


class SplitCall(BlockCall):
    """`BlockCall` of a block whose states diffusers may split among the ranks as they enter it."""

    def __init__(self, row: ListRow, block: torch.nn.Module) -> None:
        from diffusers.hooks.context_parallel import ContextParallelSplitHook

        super().__init__(row, block)
        self._block: Any = block
        self._kind = ContextParallelSplitHook

    def inputs(self, args: tuple[Any, ...], kwargs: Arguments) -> States:
        """See `BlockCall.inputs`; this rank's part of them."""
        registry = getattr(self._block, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            if isinstance(hook, self._kind):
                args, kwargs = hook.pre_forward(self._block, *args, **kwargs)
        return super().inputs(args, kwargs)
