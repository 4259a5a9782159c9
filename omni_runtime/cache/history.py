"""The snapshots that a forecast is made from: as many as the forecaster keeps, newest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from omni_kernels import ops
from omni_kernels.device import has_fp64
from omni_runtime.cache.forecasters import Forecaster, Weights, evenly_spaced

#: One rank's summand → the sum over all ranks.
Add = Callable[[torch.Tensor], torch.Tensor]
#: Elements of a sample that are copied at once: 8 MB in float64.
PIECE = 1 << 20


#: Of fp16, how much of a residual is kept: states reach ±65504 there, and their difference twice that.
FP16_SHARE = 0.5
#: fp16's largest value: what models themselves clip their states at.
FP16_MAX = 65504.0


class History:
    """One value of a request, as it was at computed steps, and where those steps lie: a stream's residual, as a rule.

    In fp16 a residual is kept as its half, which is exact, and a forecast is clipped to what fp16 holds: where the
    model's own states stay finite, so do skipped steps.

    Args:
        forecaster: what it is for.
        keep: how many snapshots; None for as many as the forecaster takes.

    Attributes:
        positions: of the snapshots, newest first.
        shape: of what the snapshots can be added to; None, which no tensor has, while there are none.
    """

    __slots__ = ("_forecaster", "_keep", "_snapshots", "positions", "shape")

    def __init__(self, forecaster: Forecaster, keep: int | None = None) -> None:
        self._forecaster = forecaster
        self._keep = keep or forecaster.snapshots
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
        elif len(self._snapshots) == self._keep:
            self.positions.pop()
            replaced = self._snapshots.pop()
        if before is None:
            residual = ops.linear_forecast(None, [after], (1.0,), out=replaced)
        elif after.dtype is torch.float16:
            residual = ops.linear_forecast(None, [after, before], (FP16_SHARE, -FP16_SHARE), out=replaced)
        else:
            residual = ops.linear_forecast(after, [before], (-1.0,), out=replaced)
        self.positions.insert(0, position)
        self._snapshots.insert(0, residual)

    def forecast(self, base: torch.Tensor | None, position: float, using: Any = ops) -> torch.Tensor:
        """`base`, which the snapshots fit, plus the value expected at `position`; `using` the ops of that name.

        For a history that keeps no more than the forecaster takes.
        """
        weights = self._forecaster.weights(self.positions, position)
        if base is not None and base.dtype is torch.float16:
            return _in_fp16(using.linear_forecast(base, self._snapshots, _whole(weights)))
        return using.linear_forecast(base, self._snapshots, weights)

    def weights(self, position: float) -> list[float] | None:
        """Those of the value expected at `position`, for the newest snapshots; None where each sample has its own."""
        return self._forecaster.weights(self.positions[: self._forecaster.snapshots], position)

    def combined(self, weights: Sequence[float]) -> torch.Tensor:
        """The sum of the newest snapshots with these weights."""
        return ops.linear_forecast(None, self._snapshots[: len(weights)], weights)

    def newest(self) -> torch.Tensor | None:
        """The newest residual; None while there is none."""
        if not self._snapshots:
            return None
        newest = self._snapshots[0]
        return newest.float() / FP16_SHARE if newest.dtype is torch.float16 else newest

    def tensors(self) -> list[torch.Tensor]:
        """The stored snapshots, newest first."""
        return list(self._snapshots)


class FittedHistory(History):
    """A history whose forecaster's weights depend on the snapshots too, and are fitted to each sample by itself.

    The first forecast after a computed step reads the evenly spaced snapshots once for their inner products, and
    transfers n×n numbers per sample to the host, where they are fitted; further forecasts use the same fit. Where the
    snapshots are too few or unevenly spaced, nothing is read.

    Args:
        add: sums over the ranks that have the snapshots' other parts, where they are split: one fit serves all.
    """

    __slots__ = ("_add", "_fits")

    def __init__(self, forecaster: Forecaster, add: Add | None = None) -> None:
        super().__init__(forecaster)
        self._add = add
        self._fits: list[Weights] | None = None

    def clear(self) -> None:
        """See `History.clear`."""
        super().clear()
        self._fits = None

    def record(self, after: torch.Tensor, before: torch.Tensor | None, position: float) -> None:
        """See `History.record`."""
        super().record(after, before, position)
        self._fits = None

    def forecast(self, base: torch.Tensor | None, position: float, using: Any = ops) -> torch.Tensor:
        """See `History.forecast`."""
        if self._fits is None:
            self._fits = self._fitted()
        if not self._fits:
            return super().forecast(base, position, using)
        like = self._snapshots[0] if base is None else base
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        for sample, fit in enumerate(self._fits):
            one = slice(sample, sample + 1)
            history = [snapshot[one] for snapshot in self._snapshots]
            weights = fit(self.positions, position)
            if base is None:
                using.linear_forecast(None, history, weights, out=out[one])
            else:
                halved = base.dtype is torch.float16
                using.linear_forecast(base[one], history, _whole(weights) if halved else weights, out=out[one])
        return _in_fp16(out) if base is not None and base.dtype is torch.float16 else out

    def weights(self, position: float) -> list[float] | None:
        """See `History.weights`."""
        return None

    def _fitted(self) -> list[Weights]:
        """The weights of each sample; none where the positions do not allow a fit."""
        fit, count = self._forecaster.fit, evenly_spaced(self.positions)
        if fit is None or count < self._forecaster.least:
            return []
        spacing = self.positions[0] - self.positions[1]
        noise = torch.finfo(self._snapshots[0].dtype).eps
        return [fit(products, spacing, noise) for products in inner_products(self._snapshots[:count], self._add)]


def _whole(weights: Sequence[float]) -> list[float]:
    """The weights of residuals, for their halves."""
    return [weight / FP16_SHARE for weight in weights]


def _in_fp16(forecast: torch.Tensor) -> torch.Tensor:
    return forecast.clamp_(-FP16_MAX, FP16_MAX)


def inner_products(snapshots: list[torch.Tensor], add: Add | None = None) -> np.ndarray:
    """[B, n, n] in float64, on the host, of n tensors [B, ...] with each other; one transfer.

    Summed in float64, or in float32 on devices that lack it, over pieces that bound the copy in that type.
    """
    like = snapshots[0]
    dtype = torch.float64 if has_fp64(like.device) else torch.float32
    total = torch.zeros(len(like), len(snapshots), len(snapshots), dtype=dtype, device=like.device)
    for pieces in zip(*(snapshot.flatten(1).split(PIECE, 1) for snapshot in snapshots), strict=True):
        rows = torch.stack([piece.to(dtype) for piece in pieces], 1)
        total += rows @ rows.mT
    if add is not None:
        total = add(total)
    return total.cpu().double().numpy()


def history_of(forecaster: Forecaster, keep: int | None = None, add: Add | None = None) -> History:
    """An empty history for a forecaster; `keep` as in `History`, where nothing is fitted, `add` as in `FittedHistory`,
    where something is."""
    return History(forecaster, keep) if forecaster.fit is None else FittedHistory(forecaster, add)
