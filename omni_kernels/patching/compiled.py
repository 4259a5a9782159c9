"""Calls of compiled blocks: graphs are shared where possible, and no request fails at Dynamo's limit of graphs.

Dynamo stores the graphs of a forward with its code object, so all blocks of a class share them, in all models. After 8
graphs (`torch._dynamo.config.recompile_limit`) it compiles no more, and with fullgraph=True raises an error. One
process may need more than 8, for different batches, sizes and masks. So each pipeline may add a limited number of its
own. After that, calls with an existing graph run compiled, and other calls run uncompiled. Without fullgraph=True,
Dynamo itself runs such calls uncompiled once its limit is reached.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

#: How many graphs a pipeline's blocks of one class may add beyond Dynamo's own limit. Each takes seconds to compile.
MOST_GRAPHS = 64


class Compiled(list[str]):
    """The names of the compiled blocks. Prints their number, and which classes get no more graphs and why.

    Attributes:
        refused: class name → why blocks of this class get no more graphs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}
        self._kinds: dict[type, _Kind] = {}

    def __str__(self) -> str:
        lines = [f"{kind}: uncompiled where there is no graph yet: {reason}" for kind, reason in self.refused.items()]
        return "\n".join([f"{len(self)} blocks compiled", *lines])

    def call_of(self, name: str, block: torch.nn.Module, options: Mapping[str, Any]) -> Callable[..., Any]:
        """A replacement for the block's call, compiled with these arguments of torch.compile."""
        kind = self._kinds.setdefault(type(block), _Kind(0 if "recompile_limit" in options else MOST_GRAPHS))
        compiled = torch.compile(block._call_impl, **options)
        known = torch._dynamo.run(block._call_impl)  # uses existing graphs, but compiles nothing

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
    """State shared by a pipeline's blocks of one class."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.added = 0
        self.full = False


def _no_view(value: Any) -> Any:
    """The same memory, in tensors that are not views.

    For a view with a dynamic shape, Dynamo also guards its base. The states that come from a projection are views,
    those that a block returns are not. So the first block would need graphs of its own.
    """
    if type(value) is torch.Tensor:
        return value.data if value._is_view() else value
    return type(value)(map(_no_view, value)) if type(value) in (tuple, list) else value


#: Dynamo's settings belong to the process in some versions of torch, and to the thread in others.
_settings = threading.RLock()


@contextlib.contextmanager
def _no_limit() -> Iterator[None]:
    """Context manager without Dynamo's limits. It takes 0.5 ms, so it is used only for a call that compiles."""
    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    with _settings, torch._dynamo.config.patch(limits):
        yield
