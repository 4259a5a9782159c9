"""What a cache needs to know when the transformer calls of a pipeline are shared out among ranks (CFG parallelism).

A cache of whole steps sees every call on every rank. What is beneath it computes a call on one rank and sends the
result to the other, or computes half of the samples on each. A cache of blocks sees only what its own rank computes:
either whole calls, or half of the samples of every call (`Rows`). See `omni_runtime.parallel.guidance`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

import torch


class Rows(Protocol):
    """This rank's part of the samples of a call.

    Attributes:
        rank: which of the parts it is.
        count: the number of parts, which have the same size.
    """

    rank: int
    count: int

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all parts, [count·B, ...], from this part's, [B, ...]; the same bits on each rank."""


#: (args, kwargs, this rank's part of the samples; None for all of them) → the result of a transformer call.
Compute = Callable[[tuple[Any, ...], dict[str, Any], "Rows | None"], Any]


class Sharing(Protocol):
    """Shares out the transformer calls of a pipeline among ranks."""

    def share(
        self,
        transformer: torch.nn.Module,
        compute: Compute,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        passed_over: Callable[[], None],
    ) -> Any:
        """The result of a transformer call.

        Args:
            transformer: the transformer.
            compute: computes the call, or this rank's part of it.
            args, kwargs: the arguments of the call.
            passed_over: called instead of `compute` if another rank computes the call.
        """

    def inner(self, transformer: torch.nn.Module) -> Callable[..., Any]:
        """The transformer's call as it is without the sharing."""

    def agreed(self, sums: torch.Tensor) -> torch.Tensor:
        """The same numbers, with the same bits on each rank."""


#: What shares out the transformer calls of the pipeline that runs in this thread; None if nothing does.
SHARING: ContextVar[Sharing | None] = ContextVar("omni_runtime_sharing", default=None)
