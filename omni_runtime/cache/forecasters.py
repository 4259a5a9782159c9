"""Forecasters: what stands in for a value that was not computed.

Every forecaster is linear in the stored snapshots: given the positions x_0 (newest), x_1, ... of the snapshots and the
position x of the value wanted, it is one weight per snapshot. The weights are found by running the method's recursion
on unit vectors; the tensors are then summed once, by `omni_kernels.ops.linear_forecast`.

- reuse: the newest snapshot.
- taylorseer: d_0 = Y, d_{i+1} = (d_i − d_i of the computed step before) / gap, forecast Σ d_i k^i / i! with k = x −
  x_0, in step indices (TaylorSeer, arXiv:2503.06923). The gap at each level is that between the two last computed
  steps, so from order 2 on, and for uneven gaps, it does not reproduce a polynomial: that is the published form.
- newton: Newton's divided differences in σ, exact for polynomials up to the order at any gaps.
- hermite: TaylorSeer with k^i replaced by s^i H_i(s k), s = 1/2, H_i the physicists' Hermite polynomials (HiCache,
  arXiv:2508.16984, and its code for s and the division by i!). At order 1 that is TaylorSeer at half the slope; from
  order 2 on it does not go through the newest snapshot.
- foca: F + e/2 [(F − F_prev) + (F_k − F_(k−1))], e steps after the last computed F; F_prev is the computed one before,
  F_k and F_(k−1) are the two last values of any kind, forecasts included. Beyond e = 3 the value at 3 is blended toward
  F with weight 3/e (FoCa, arXiv:2508.16211, in the form of the cache-dit project, 1.5.3). F − F_prev is not divided by
  the steps between them: behind a run of skips it overshoots.
- dmd: exponential modes, Y(t) = Σ b_i φ_i λ_i^t, of the longest evenly spaced run of the newest snapshots, if it has 4
  or more (dynamic mode decomposition, Schmid 2010; as a forecaster, the cache-dit project). Else the line through the
  two newest. The modes depend on the snapshots, but only through their inner products: see `dmd`.

The order that can be chosen is that of taylorseer, newton and hermite, which keep order + 1 snapshots; a request's
first steps have fewer, and the order is then what they allow. reuse keeps 1, foca 12, dmd 6. In bfloat16 and float16,
rounding may outweigh what orders from 2 on add: see `rounding_note`.
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
#: Fewer snapshots cannot tell an oscillating mode from noise: it takes two real numbers, and so three steps.
DMD_LEAST = 4
#: Of the largest singular value; as in cache-dit.
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
    """FoCa's recursion over the steps since the oldest snapshot, of which all between two positions were forecast.

    The forecasts before the second oldest snapshot, which hang on older ones, are taken to be the oldest snapshot
    itself. With n snapshots, what the last of them would have differed from it enters with a factor of 0.5625^(n − 1)
    at most: 0.18 with 4, and 0.002 with 12.
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
    """Exponential modes of evenly spaced snapshots, from their inner products alone.

    With the snapshots as columns, oldest first, X all but the newest, Z all but the oldest, and X = U S V^T: the
    operator from step to step, seen in U, is A = S^-1 V^T (X^T Z) V S^-1 = W Λ W^-1; its modes are Φ = Z M with
    M = V S^-1 W, their amplitudes b solve Φ b = newest in the mean of squares, and the forecast k spacings on is
    Re Φ Λ^k b = Z Re(M Λ^k b), a weight for each column of Z. V, S and the normal equations of b need inner products
    only. Singular values below `noise` or DMD_CUTOFF of the largest are left out. In float64, on the host.

    Args:
        products: [n, n], of the snapshots with each other, newest first; n at least 2.
        spacing: between the positions of neighbours.
        noise: how far rounding to the snapshots' dtype moves them, relative to their size.

    Returns:
        The weights of these snapshots; those of `line` where the modes cannot be had, or where they would add up to
        more than DMD_LARGEST in absolute value.
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
        if not np.abs(found).sum() <= DMD_LARGEST:  # a NaN is none either
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
    """How to weigh, along which axis, and how many snapshots are kept.

    Attributes:
        fit: inner products of the newest evenly spaced snapshots and their spacing → the weights to use until another
            is recorded; None where the positions are all that counts. `weights` serves where they are fewer than
            `least`.
        name, order: what it was chosen by; order 0 for a forecaster that has none.
    """

    weights: Weights
    axis: Literal["step", "sigma"]
    snapshots: int
    fit: Fit | None = None
    least: int = DMD_LEAST
    name: str = ""
    order: int = 0


#: name → (weights, axis, snapshots, where they do not follow from the order, and fit, where there is one)
FORECASTERS: dict[str, tuple[Weights, Literal["step", "sigma"], int | None, Fit | None]] = {
    "reuse": (reuse, "step", 1, None),
    "taylorseer": (taylorseer, "step", None, None),
    "newton": (newton, "sigma", None, None),
    "hermite": (hermite, "step", None, None),
    "foca": (foca, "step", 12, None),
    "dmd": (line, "step", 6, dmd),
}


def make_forecaster(name: str, order: int = 1) -> Forecaster:
    """The forecaster `name`; `order` counts only where the method has one."""
    weights, axis, snapshots, fit = FORECASTERS[name]
    ordered = snapshots is None
    return Forecaster(weights, axis, snapshots or order + 1, fit, name=name, order=order if ordered else 0)


def rounding_note(forecaster: str, order: int, dtype: torch.dtype) -> str | None:
    """What is to be said of snapshots that are rounded too coarsely for the forecast; None where nothing is.

    A forecast of order n, one step on, is a sum of n + 1 snapshots with weights that add up to 2^(n + 1) − 1 in
    absolute value: 3, 7 and 15 for n = 1, 2 and 3. So many times a snapshot's own is the rounding error of the
    forecast, while what an order adds gets smaller and smaller. Of a smooth trajectory in 50 steps, orders 1 and 2 are
    off by 0.0027 and 0.0049 in bfloat16, by 0.0007 and 0.0006 in float16, and by 0.0006 and 0.00002 in float32
    (`tests/cache/test_forecasters.py`).

    Args:
        forecaster: its name.
        order: its order, where it has one.
        dtype: of the snapshots: the model's.
    """
    has_order = FORECASTERS[forecaster][2] is None
    if not has_order or order < 2 or torch.finfo(dtype).eps < torch.finfo(torch.float16).eps:
        return None
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{forecaster} of order {order} in {kind}: a forecast has up to {2 ** (order + 1) - 1} times the rounding "
        "error of a snapshot, which may be more than what the order adds; compare with order 1"
    )
