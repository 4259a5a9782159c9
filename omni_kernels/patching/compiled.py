"""Calls of compiled blocks: graphs are shared wherever they can be, and no request fails for want of another one.

Dynamo keeps the graphs of a forward with its code: those of all blocks of a class, in whatever model they are. Beyond 8
(`torch._dynamo.config.recompile_limit`) it compiles none, which with fullgraph=True is an error. The batches, sizes and
masks that one process is asked for come to more, so each pipeline may add some beyond that, of its own count. After
these, what has a graph runs compiled, and what has none as it would without compilation. Without fullgraph=True Dynamo
does the latter by itself, where its own limit is reached.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

#: So many graphs a pipeline's blocks of one class may add where Dynamo's own limit is reached; each takes seconds.
MOST_GRAPHS = 64


class Compiled(list[str]):
    """The names of the blocks that were compiled; printed, how many, and what is compiled no more and why.

    Attributes:
        refused: why blocks of a class get no more graphs, by the class's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}
        self._kinds: dict[type, _Kind] = {}

    def __str__(self) -> str:
        lines = [f"{kind}: uncompiled where there is no graph yet: {reason}" for kind, reason in self.refused.items()]
        return "\n".join([f"{len(self)} blocks compiled", *lines])

    def call_of(self, name: str, block: torch.nn.Module, options: Mapping[str, Any]) -> Callable[..., Any]:
        """What stands in for the block's call, compiled with these arguments of torch.compile."""
        kind = self._kinds.setdefault(type(block), _Kind(0 if "recompile_limit" in options else MOST_GRAPHS))
        compiled = torch.compile(block._call_impl, **options)
        known = torch._dynamo.run(block._call_impl)  # compiles nothing

        def call(*args: Any, **kwargs: Any) -> Any:
            if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
                args = _no_view(args)
                kwargs = {key: _no_view(value) for key, value in kwargs.items()}
            if kind.full:
                return known(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                pass
            if kind.added < kind.most:
                kind.added += 1
                with _no_limit():
                    return compiled(*args, **kwargs)
            self._refuse(kind, type(block).__name__)
            return known(*args, **kwargs)

        self.append(name)
        return call

    def _refuse(self, kind: _Kind, name: str) -> None:
        kind.full = True
        reason = "the limit of recompilations is reached"
        if kind.most:
            reason = f"{kind.most} graphs have been compiled beyond torch._dynamo.config.recompile_limit"
        self.refused[name] = reason
        warnings.warn(f"{name} runs uncompiled where it has no graph yet: {reason}", RuntimeWarning, stacklevel=3)


class _Kind:
    """What a pipeline's blocks of one class have in common."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.added = 0
        self.full = False


def _no_view(value: Any) -> Any:
    """The same memory, in tensors that are no views.

    Dynamo guards a view of a dynamic shape by its base. The states that come out of a projection are views, those that
    a block returns are not: the first block would take graphs of its own.
    """
    if type(value) is torch.Tensor:
        return value.data if value._is_view() else value
    return type(value)(map(_no_view, value)) if type(value) in (tuple, list) else value


#: Dynamo's settings are the process's in some versions of torch, a thread's in others.
_settings = threading.RLock()


@contextlib.contextmanager
def _no_limit() -> Iterator[None]:
    """While open, Dynamo compiles what it is asked to. Opened only for a call that compiles: it takes 0.5 ms."""
    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    with _settings, torch._dynamo.config.patch(limits):
        yield
