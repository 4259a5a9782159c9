"""Detects reads of tensor values by the host, and forbids them where nothing may wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostReadError(Exception):
    """A forbidden read."""


class Reads:
    """Counts reads of tensor values by the host; while `forbidden`, they raise an error.

    On the CPU, a move to the host cannot be told from a `to` that moves nothing. So every `to` that names the CPU
    counts.
    """

    NAMES = (
        *("tolist", "item", "cpu", "numpy", "nonzero", "equal", "allclose", "__array__"),
        *("__bool__", "__int__", "__float__", "__index__"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forbidden = False
        self.closed = 0
        self.made: list[str] = []
        for name in self.NAMES:
            monkeypatch.setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))
        moves = self._watched("to", torch.Tensor.to)
        to: Any = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: (moves if _to_the_host(a[1:], k) else to)(*a, **k))

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            if self.forbidden:
                raise HostReadError(name)
            self.made.append(name)
            return original(*args, **kwargs)

        return read

    def forbid_within_the_loop(self, pipe: Any, steps: int) -> Callable[..., dict[str, Any]]:
        """Forbid reads from the end of step 0 (diffusers itself reads before that) to the last step's last forward.

        Returns:
            The `callback_on_step_end` that this needs.
        """
        last: list[int] = []

        def returned(*_: Any) -> None:
            last.append(1)
            if self.closed == steps - 1 and len(last) == 2:
                self.forbidden = False
                self.made.clear()

        pipe.transformer.register_forward_hook(returned)

        def at_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.closed = step + 1
            self.forbidden = self.closed < steps
            last.clear()
            return {}

        return at_step_end


def _to_the_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    devices = [one for one in (*args, *kwargs.values()) if isinstance(one, (str, torch.device))]
    return any(torch.device(one).type == "cpu" for one in devices)


class Ops(TorchDispatchMode):
    """Records the dispatched operators; while `forbidden`, those that read from the device raise an error.

    Attributes:
        names: the operators since it was opened, or since the list was replaced.
    """

    READERS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.forbidden = False
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        reads = name in self.READERS or (name.startswith("index") and _by_mask(args[1]))
        if self.forbidden and func.namespace == "aten" and reads:
            raise HostReadError(name)
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def _by_mask(indices: Any) -> bool:
    """Whether elements are selected by a mask: then the host must read their number."""
    return any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in tree_leaves(indices))
