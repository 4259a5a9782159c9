"""The snapshots that a forecast is made from: at most order + 1 of them, newest first."""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels import ops
from omni_runtime.cache.forecasters import Forecaster


class History:
    """One value of a request, as it was at computed steps, and where those steps lie: a stream's residual, as a rule.

    Attributes:
        positions: of the snapshots, newest first.
        shape: of what the snapshots can be added to; None, which no tensor has, while there are none.
    """

    __slots__ = ("_forecaster", "_snapshots", "positions", "shape")

    def __init__(self, forecaster: Forecaster) -> None:
        self._forecaster = forecaster
        self.shape: torch.Size | None = None
        self.positions: list[float] = []
        self._snapshots: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._snapshots)

    def clear(self) -> None:
        """Drop all snapshots."""
        self.shape = None
        self.positions.clear()
        self._snapshots.clear()

    def record(self, after: torch.Tensor, before: torch.Tensor | None, position: float) -> None:
        """Store after − before at `position`, over the oldest snapshot once all places are taken; None stands for 0.

        A residual at the newest one's position takes its place: samplers of second order visit a σ twice.
        """
        if self.shape != after.shape:
            self.clear()
            self.shape = after.shape
        replaced = None
        if self.positions and self.positions[0] == position:
            self.positions.pop(0)
            replaced = self._snapshots.pop(0)
        elif len(self._snapshots) == self._forecaster.snapshots:
            self.positions.pop()
            replaced = self._snapshots.pop()
        if before is None:
            residual = ops.linear_forecast(None, [after], (1.0,), out=replaced)
        else:
            residual = ops.linear_forecast(after, [before], (-1.0,), out=replaced)
        self.positions.insert(0, position)
        self._snapshots.insert(0, residual)

    def forecast(self, base: torch.Tensor | None, position: float, using: Any = ops) -> torch.Tensor:
        """`base`, which the snapshots fit, plus the value expected at `position`; `using` the ops of that name."""
        return using.linear_forecast(base, self._snapshots, self._forecaster.weights(self.positions, position))

    def tensors(self) -> list[torch.Tensor]:
        """The stored snapshots, newest first."""
        return list(self._snapshots)
