"""Counts operators as torch's dispatcher sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from omni_kernels.registration import NAMESPACE


class Counter(TorchDispatchMode):
    """Counts operators, and those on tensors of shape `h`.

    With `expand`, each of our ops is replaced by the operators of its implementation.
    """

    def __init__(self, h: tuple[int, ...], expand: bool) -> None:
        super().__init__()
        self._h, self._expand = h, expand
        self.names: list[str] = []
        self.h_sized: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._expand:
            with self:
                if func.namespace == NAMESPACE:
                    return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
                parts = func.decompose(*args, **kwargs)  # inside our ops, composite operators arrive undecomposed
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        self.names.append(str(func))
        if not _is_view(func) and any(t.shape == self._h for t in _tensors((args, kwargs, output))):
            self.h_sized.append(str(func))
        return output


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
