"""Forecasters compute a stand-in for a value that was not computed.

Every forecaster is linear in the stored snapshots. From the positions x_0 (newest), x_1, ... of the snapshots and the
position x of the wanted value, it computes one weight per snapshot. The weights are found by running the method's
recursion on unit vectors. The tensors are then summed once, by `omni_kernels.ops.linear_forecast`.

- reuse: the newest snapshot.
- taylorseer: d_0 = Y, d_{i+1} = (d_i − d_i of the computed step before) / gap, forecast Σ d_i k^i / i! with k = x −
  x_0, in step indices (TaylorSeer, arXiv:2503.06923). The gap at each level is that between the last two computed
  steps. So from order 2 on, with uneven gaps, polynomials are not reproduced; this is the published form.
- newton: Newton's divided differences in σ; exact for polynomials up to the order, with any gaps.
- hermite: TaylorSeer with k^i replaced by s^i H_i(s k), s = 1/2, H_i the physicists' Hermite polynomials (HiCache,
  arXiv:2508.16984, and its code for s and the division by i!). At order 1 this is TaylorSeer with half the slope. From
  order 2 on, it does not pass through the newest snapshot.
- foca: F + e/2 [(F − F_prev) + (F_k − F_(k−1))], e steps after the last computed F. F_prev is the computed value
  before F. F_k and F_(k−1) are the last two values of any kind, including forecasts. Beyond e = 3, the value at 3 is
  blended toward F with weight 3/e (FoCa, arXiv:2508.16211, in the form of the cache-dit project, 1.5.3). F − F_prev is
  not divided by the number of steps between them, so it overshoots after several skipped steps in a row.
- dmd: exponential modes, Y(t) = Σ b_i φ_i λ_i^t, of the longest evenly spaced run of the newest snapshots, if it has
  at least 4 (dynamic mode decomposition, Schmid 2010; as a forecaster, the cache-dit project). Otherwise the line
  through the two newest. The modes depend on the snapshots, but only through their inner products: see `dmd`.

taylorseer, newton and hermite have an order that can be chosen, and keep order + 1 snapshots. With fewer snapshots, in
a request's first steps, the order is lower. reuse keeps 1 snapshot, foca 12, dmd 6. In bfloat16 and float16, the
rounding error may be larger than the gain from orders ≥ 2: see `rounding_note`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Weights = Callable[[Sequence[float], float], list[float]]
Fit = Callable[[np.ndarray, float, float], Weights]

HERMITE_SCALE = 0.5
FOCA_HORIZON = 3
#: An oscillating mode has two real parameters, so it needs three steps: with fewer snapshots, it looks like noise.
DMD_LEAST = 4
#: Relative to the largest singular value; as in cache-dit.
DMD_CUTOFF = 1e-4
DMD_LARGEST = 100.0


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
    """The newest snapshot, unchanged."""
    return [1.0] + [0.0] * (len(positions) - 1)


def taylorseer(positions: Sequence[float], x: float) -> list[float]:
    """TaylorSeer in its published form, of order len(positions) − 1."""
    k = x - positions[0]
    if len(positions) == 2:  # a fast path for the most used order, as this runs in every skipped step
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


def hermite(positions: Sequence[float], x: float) -> list[float]:
    """HiCache's scaled Hermite polynomials, of order len(positions) − 1."""
    differences = _differences(positions, lambda depth, j: positions[j] - positions[j + 1])
    k = HERMITE_SCALE * (x - positions[0])
    polynomials = [1.0, 2.0 * k]
    for i in range(1, len(positions) - 1):
        polynomials.append(2.0 * k * polynomials[i] - 2.0 * i * polynomials[i - 1])
    scaled = zip(polynomials, range(len(positions)), strict=False)
    return _combine(differences, [h * HERMITE_SCALE**i / math.factorial(i) for h, i in scaled])


def foca(positions: Sequence[float], x: float) -> list[float]:
    """FoCa's recursion over the steps since the oldest snapshot; all steps between two positions were forecast.

    The forecasts before the second oldest snapshot depend on snapshots that are no longer kept. The oldest snapshot is
    used in their place. With n snapshots, the error of the last of these forecasts enters with a factor of at most
    0.5625^(n − 1): 0.18 for n = 4, and 0.002 for n = 12.
    """
    rows = [[float(i == j) for i in range(len(positions))] for j in range(len(positions))]
    current = rows[-1]
    for newest in range(len(positions) - 2, -1, -1):
        full, previous = rows[newest], rows[newest + 1]
        last, current = current, full
        until = x if newest == 0 else positions[newest - 1] - 1.0
        for e in range(1, round(until - positions[newest]) + 1):
            reach = e / 2 if e <= FOCA_HORIZON else FOCA_HORIZON**2 / (2 * e)
            terms = zip(full, previous, current, last, strict=True)
            last, current = current, [f + reach * (f - p + c - b) for f, p, c, b in terms]
    return current


def dmd(products: np.ndarray, spacing: float, noise: float) -> Weights:
    """Exponential modes of evenly spaced snapshots, computed from their inner products only.

    Take the snapshots as columns, oldest first. X has all but the newest, Z all but the oldest, and X = U S V^T. The
    operator from step to step, in the basis U, is A = S^-1 V^T (X^T Z) V S^-1 = W Λ W^-1. Its modes are Φ = Z M with
    M = V S^-1 W. Their amplitudes b solve Φ b = newest by least squares. The forecast k spacings ahead is
    Re Φ Λ^k b = Z Re(M Λ^k b): a weight for each column of Z. V, S and the normal equations of b need inner products
    only. Singular values below `noise` or DMD_CUTOFF times the largest are dropped. Computed in float64 on the host.

    Args:
        products: the inner products of the snapshots, [n, n], newest first; n is at least 2.
        spacing: the distance between neighbouring positions.
        noise: the relative rounding error of the snapshots' dtype.

    Returns:
        The weights of these snapshots. The weights of `line` are used instead if the modes cannot be computed, or if
        the absolute weights add up to more than DMD_LARGEST.
    """
    gram = np.asarray(products, np.float64)[::-1, ::-1]
    try:
        squares, v = np.linalg.eigh(gram[:-1, :-1])
        kept = squares > max(squares[-1], 0.0) * max(noise, DMD_CUTOFF) ** 2
        v_over_s = v[:, kept] / np.sqrt(squares[kept])
        modes, w = np.linalg.eig(v_over_s.T @ gram[:-1, 1:] @ v_over_s)
        m = v_over_s @ w
        amplitudes = np.linalg.lstsq(m.conj().T @ gram[1:, 1:] @ m, m.conj().T @ gram[1:, -1], rcond=None)[0]
    except np.linalg.LinAlgError:
        return line

    def weights(positions: Sequence[float], x: float) -> list[float]:
        found = (m @ (modes.astype(complex) ** ((x - positions[0]) / spacing) * amplitudes)).real
        if not np.abs(found).sum() <= DMD_LARGEST:  # also true for NaN
            return line(positions, x)
        return [*found[::-1].tolist(), *[0.0] * (len(positions) - len(found))]

    return weights


def line(positions: Sequence[float], x: float) -> list[float]:
    """The line through the two newest snapshots."""
    newest = positions[:2]
    return newton(newest, x) + [0.0] * (len(positions) - len(newest))


def evenly_spaced(positions: Sequence[float]) -> int:
    """How many of the newest positions are evenly spaced."""
    gaps = [a - b for a, b in itertools.pairwise(positions)]
    return len(positions[:1]) + len(list(itertools.takewhile(lambda gap: gap == gaps[0], gaps)))


@dataclass(frozen=True)
class Forecaster:
    """A forecaster: its weights, the axis of its positions, and how many snapshots it keeps.

    Attributes:
        weights: (positions, x) → one weight per snapshot.
        axis: whether positions are step indices or noise levels σ.
        snapshots: the number of snapshots to keep.
        fit: (inner products of the newest evenly spaced snapshots, their spacing, rounding error) → the weights to use
            until the next snapshot is recorded. None if the weights depend on the positions only.
        least: with fewer evenly spaced snapshots than this, `weights` is used instead of `fit`.
        name, order: the name and order that it was made with; order 0 if it has none.
    """

    weights: Weights
    axis: Literal["step", "sigma"]
    snapshots: int
    fit: Fit | None = None
    least: int = DMD_LEAST
    name: str = ""
    order: int = 0


#: name → (weights, axis, number of snapshots or None for order + 1, fit or None)
FORECASTERS: dict[str, tuple[Weights, Literal["step", "sigma"], int | None, Fit | None]] = {
    "reuse": (reuse, "step", 1, None),
    "taylorseer": (taylorseer, "step", None, None),
    "newton": (newton, "sigma", None, None),
    "hermite": (hermite, "step", None, None),
    "foca": (foca, "step", 12, None),
    "dmd": (line, "step", 6, dmd),
}


def make_forecaster(name: str, order: int = 1) -> Forecaster:
    """Make the forecaster `name`. `order` is ignored if it has none."""
    weights, axis, snapshots, fit = FORECASTERS[name]
    ordered = snapshots is None
    return Forecaster(weights, axis, snapshots or order + 1, fit, name=name, order=order if ordered else 0)


def rounding_note(forecaster: str, order: int, dtype: torch.dtype) -> str | None:
    """A note for the report if the snapshots are rounded too coarsely for the forecast; None otherwise.

    A forecast of order n, one step ahead, is a sum of n + 1 snapshots whose absolute weights add up to 2^(n + 1) − 1:
    3, 7 and 15 for n = 1, 2 and 3. Its rounding error is up to that many times the rounding error of a snapshot, while
    each further order improves the forecast less. For a smooth trajectory in 50 steps, the errors of orders 1 and 2
    are 0.0027 and 0.0049 in bfloat16, 0.0007 and 0.0006 in float16, and 0.0006 and 0.00002 in float32
    (`tests/cache/test_forecasters.py`).

    Args:
        forecaster: its name.
        order: its order, if it has one.
        dtype: the dtype of the snapshots, which is that of the model.
    """
    has_order = FORECASTERS[forecaster][2] is None
    if not has_order or order < 2 or torch.finfo(dtype).eps < torch.finfo(torch.float16).eps:
        return None
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{forecaster} of order {order} in {kind}: a forecast has up to {2 ** (order + 1) - 1} times the rounding "
        "error of a snapshot, which may be more than what the order adds; compare with order 1"
    )
