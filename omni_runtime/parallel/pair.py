"""The two ranks that compute one branch of guidance each, and what they send each other."""

from __future__ import annotations

from typing import Any

import torch


class Pair:
    """The ranks of a pair. It is also this rank's part of the samples of a call that both make (`Rows`).

    Args:
        group: their process group.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = torch.distributed.get_rank(group)
        self.count: int = torch.distributed.get_world_size(group)

    def send(self, tensor: torch.Tensor, owner: int) -> None:
        """Write the owner's tensor into the other's, in place. Both are contiguous."""
        torch.distributed.broadcast(tensor, group=self._group, group_src=owner)

    def given(self, value: Any, owner: int) -> Any:
        """The owner's value, on both ranks."""
        box = [value if self.rank == owner else None]
        torch.distributed.broadcast_object_list(box, group=self._group, group_src=owner)
        return box[0]

    def all(self, value: Any) -> list[Any]:
        """The values of both ranks."""
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        """See `omni_runtime.cache.sharing.Rows`."""
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        torch.distributed.all_gather(parts, rows.contiguous(), group=self._group)
        return torch.cat(parts)
