"""The snapshots that a forecast is made from: as many as the forecaster keeps, newest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from omni_kernels import ops
from omni_kernels.device import has_fp64
from omni_runtime.cache.forecasters import Forecaster, Weights, evenly_spaced

#: This rank's summand → the sum over all ranks.
Add = Callable[[torch.Tensor], torch.Tensor]
#: How many elements of a sample are copied at once: 8 MB in float64.
PIECE = 1 << 20


#: In fp16 a residual is stored times this factor: states reach ±65504, and their difference twice that.
FP16_SHARE = 0.5
#: The largest fp16 value. Models clip their own states at it.
FP16_MAX = 65504.0


class History:
    """Snapshots of one value of a request at computed steps, and the positions of these steps.

    The value is usually the residual of a stream. In fp16 half of the residual is stored, which is exact, and a
    forecast is clipped to the range of fp16. So if the model's own states stay finite, those of skipped steps do, too.

    Args:
        forecaster: the forecaster that uses the snapshots.
        keep: the number of snapshots to keep; None for as many as the forecaster takes.

    Attributes:
        positions: the positions of the snapshots, newest first.
        shape: the shape of the tensors that the snapshots can be added to; None, which matches no tensor, while there
            are no snapshots.
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
        """Store after − before at `position`; if `before` is None, store `after`.

        If the history is full, the oldest snapshot is overwritten. A snapshot at the position of the newest one
        replaces it: second-order samplers visit a σ twice.

        Raises:
            RuntimeError: `after` and `before` have different shapes or dtypes.
        """
        if before is not None and (after.shape != before.shape or after.dtype != before.dtype):
            raise RuntimeError(
                f"the blocks took {before.dtype} {tuple(before.shape)} and returned {after.dtype} "
                f"{tuple(after.shape)}, unlike in the first forward: a cache of blocks cannot follow that"
            )
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
        """Return `base` plus the forecast at `position`.

        Only for a history that keeps no more snapshots than the forecaster takes.

        Args:
            base: a tensor of the shape of the snapshots; None for the forecast alone.
            position: where to forecast.
            using: the namespace of the ops.
        """
        weights = self._forecaster.weights(self.positions, position)
        if base is not None and base.dtype is torch.float16:
            return _in_fp16(using.linear_forecast(base, self._snapshots, _whole(weights)))
        return using.linear_forecast(base, self._snapshots, weights)

    def weights(self, position: float) -> list[float] | None:
        """The weights of the newest snapshots for a forecast at `position`; None if each sample has its own."""
        return self._forecaster.weights(self.positions[: self._forecaster.snapshots], position)

    def combined(self, weights: Sequence[float]) -> torch.Tensor:
        """The weighted sum of the newest snapshots."""
        return ops.linear_forecast(None, self._snapshots[: len(weights)], weights)

    def newest(self) -> torch.Tensor | None:
        """The newest snapshot; None while there is none."""
        if not self._snapshots:
            return None
        newest = self._snapshots[0]
        return newest.float() / FP16_SHARE if newest.dtype is torch.float16 else newest

    def tensors(self) -> list[torch.Tensor]:
        """The stored snapshots, newest first."""
        return list(self._snapshots)


class FittedHistory(History):
    """A history whose forecast weights also depend on the snapshots, and are fitted to each sample separately.

    The first forecast after a computed step reads the evenly spaced snapshots once to compute their inner products,
    and transfers n×n numbers per sample to the host for the fit. Further forecasts use the same fit. If there are too
    few snapshots, or they are unevenly spaced, nothing is read.

    Args:
        add: if the snapshots are split over several ranks, sums over these ranks, so that all get the same fit.
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
        """The fitted weights of each sample; an empty list if the positions do not allow a fit."""
        fit, count = self._forecaster.fit, evenly_spaced(self.positions)
        if fit is None or count < self._forecaster.least:
            return []
        spacing = self.positions[0] - self.positions[1]
        noise = torch.finfo(self._snapshots[0].dtype).eps
        return [fit(products, spacing, noise) for products in inner_products(self._snapshots[:count], self._add)]


def _whole(weights: Sequence[float]) -> list[float]:
    """Convert weights of residuals into weights of the stored halves."""
    return [weight / FP16_SHARE for weight in weights]


def _in_fp16(forecast: torch.Tensor) -> torch.Tensor:
    return forecast.clamp_(-FP16_MAX, FP16_MAX)


def inner_products(snapshots: list[torch.Tensor], add: Add | None = None) -> np.ndarray:
    """The inner products of n tensors [B, ...] with each other: [B, n, n] in float64 on the host, in one transfer.

    They are summed in float64, or in float32 on devices without float64. The tensors are converted piece by piece, to
    limit the memory for the copies.
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
    """An empty history for a forecaster.

    Args:
        forecaster: the forecaster; with a `fit` it gets a `FittedHistory`, otherwise a `History`.
        keep: as in `History`; ignored by a `FittedHistory`.
        add: as in `FittedHistory`; ignored by a `History`.
    """
    return History(forecaster, keep) if forecaster.fit is None else FittedHistory(forecaster, add)
