"""Forecasters: what stands in for a value that was not computed.

Every forecaster is linear in the stored snapshots: given the positions x_0 (newest), x_1, ... of the snapshots and the
position x of the value wanted, it is one weight per snapshot. The weights are found by running the method's recursion
on unit vectors; the tensors are then summed once, by `omni_kernels.ops.linear_forecast`.

- reuse: the newest snapshot.
- taylorseer: d_0 = Y, d_{i+1} = (d_i − d_i of the computed step before) / gap, forecast Σ d_i k^i / i! with k = x −
  x_0, in step indices (TaylorSeer, arXiv:2503.06923). The gap at each level is that between the two last computed
  steps, so from order 2 on, and for uneven gaps, it does not reproduce a polynomial: that is the published form.
- newton: Newton's divided differences in σ, exact for polynomials up to the order at any gaps.

A request's first steps have fewer snapshots than order + 1: the order is then what the snapshots allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Weights = Callable[[Sequence[float], float], list[float]]


def _differences(positions: Sequence[float], gap: Callable[[int, int], float]) -> list[list[float]]:
    """Difference i of the newest snapshot, as weights of the snapshots, for i = 0 ... n − 1.

    `gap(level, j)` divides the difference of the entries j and j + 1 of a level.
    """
    count = len(positions)
    level = [[float(i == j) for i in range(count)] for j in range(count)]
    newest = [level[0]]
    for depth in range(1, count):
        level = [
            [(a - b) / gap(depth, j) for a, b in zip(level[j], level[j + 1], strict=True)] for j in range(count - depth)
        ]
        newest.append(level[0])
    return newest


def _combine(differences: list[list[float]], factors: Sequence[float]) -> list[float]:
    return [sum(f * d[j] for f, d in zip(factors, differences, strict=True)) for j in range(len(differences))]


def reuse(positions: Sequence[float], x: float) -> list[float]:
    """The newest snapshot as it is."""
    return [1.0] + [0.0] * (len(positions) - 1)


def taylorseer(positions: Sequence[float], x: float) -> list[float]:
    """TaylorSeer in its published form, of order len(positions) − 1."""
    k = x - positions[0]
    if len(positions) == 2:  # by far the most used, and on the path of every skipped step
        slope = k / (positions[0] - positions[1])
        return [1.0 + slope, -slope]
    differences = _differences(positions, lambda depth, j: positions[j] - positions[j + 1])
    return _combine(differences, [k**i / math.factorial(i) for i in range(len(positions))])


def newton(positions: Sequence[float], x: float) -> list[float]:
    """Newton's divided differences, of degree len(positions) − 1."""
    differences = _differences(positions, lambda depth, j: positions[j] - positions[j + depth])
    factors = [1.0]
    for position in positions[:-1]:
        factors.append(factors[-1] * (x - position))
    return _combine(differences, factors)


@dataclass(frozen=True)
class Forecaster:
    """A row of the table: how to weigh, along which axis, and how many snapshots are kept (order + 1)."""

    weights: Weights
    axis: Literal["step", "sigma"]
    order: int

    @property
    def snapshots(self) -> int:
        """How many snapshots are kept."""
        return self.order + 1


#: name → (weights, axis, whether the order can be chosen)
FORECASTERS: dict[str, tuple[Weights, Literal["step", "sigma"], bool]] = {
    "reuse": (reuse, "step", False),
    "taylorseer": (taylorseer, "step", True),
    "newton": (newton, "sigma", True),
}


def make_forecaster(name: str, order: int = 1) -> Forecaster:
    """The forecaster `name`; `order` counts only where the method has one."""
    weights, axis, has_order = FORECASTERS[name]
    return Forecaster(weights, axis, order if has_order else 0)
