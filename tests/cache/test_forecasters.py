"""Forecasters against the published recursions run on tensors, and against polynomials that they must reproduce."""

import math

import pytest
import torch
from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

from omni_runtime.cache.forecasters import FORECASTERS, make_forecaster, newton, reuse, taylorseer
from omni_runtime.cache.history import History


def published_taylorseer(snapshots: dict[int, torch.Tensor], step: int, order: int) -> torch.Tensor:
    """TaylorSeer as published, with its ladder of differences kept as tensors from one computed step to the next."""
    ladder: list[torch.Tensor] = []
    last = None
    for index, value in sorted(snapshots.items()):
        fresh = [value]
        for i in range(min(order, len(ladder))):
            fresh.append((fresh[i] - ladder[i]) / (index - last))
        ladder, last = fresh, index
    return sum(d * (step - last) ** i / math.factorial(i) for i, d in enumerate(ladder))


def forecast(method, snapshots: dict[float, torch.Tensor], x: float, order: int) -> torch.Tensor:
    positions = sorted(snapshots, reverse=True)[: order + 1]
    if next(iter(snapshots)) > list(snapshots)[-1]:  # σ falls from step to step: the newest is the smallest
        positions = sorted(snapshots)[: order + 1]
    weights = method(positions, x)
    return sum(w * snapshots[p] for w, p in zip(weights, positions, strict=True))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("computed", [(0, 1, 2, 3, 4), (0, 1, 4, 5, 9), (2, 6, 7, 12, 13), (0, 3, 6, 9, 12)])
def test_taylorseer_is_the_published_recursion_at_any_gaps(order, computed):
    torch.manual_seed(0)
    snapshots = {step: torch.randn(5, 7, dtype=torch.float64) for step in computed}
    for ahead in (1, 2, 5):
        step = computed[-1] + ahead
        ours = forecast(taylorseer, snapshots, step, order)
        torch.testing.assert_close(ours, published_taylorseer(snapshots, step, order), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylorseer_equals_the_library_once_its_ladder_is_full(order):
    torch.manual_seed(0)
    computed, total = (0, 1, 2, 3, 4, 5, 6, 9, 12), 15
    values = {step: torch.randn(4, 3) for step in computed}
    library, ours = TaylorSeerState(n_derivatives=order), History(make_forecaster("taylorseer", order))
    zero = torch.zeros(4, 3)
    for step in range(total):
        library.mark_step_begin()
        if step in values:
            library.update(values[step])
            ours.record(values[step], zero, float(step))
        elif step > 7:
            torch.testing.assert_close(ours.forecast(zero, float(step)), library.approximate(), rtol=1e-6, atol=2e-6)


def test_taylorseer_forecasts_after_order_plus_one_computed_steps():
    line = {step: torch.tensor([2.0 * step + 1.0]) for step in (0, 1)}
    assert forecast(taylorseer, line, 4, 1).item() == pytest.approx(9.0)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_newton_reproduces_polynomials_in_sigma_at_uneven_gaps(degree):
    def polynomial(x: float) -> torch.Tensor:
        return torch.tensor([sum((k + 1.5) * x**k for k in range(degree + 1))], dtype=torch.float64)

    sigmas = (0.97, 0.93, 0.81, 0.78)
    snapshots = {sigma: polynomial(sigma) for sigma in sigmas[3 - degree :]}
    for x in (0.7, 0.41, 0.05):
        torch.testing.assert_close(forecast(newton, snapshots, x, degree), polynomial(x), rtol=1e-9, atol=1e-9)


def test_published_taylorseer_misses_a_quadratic_that_newton_hits():
    parabola = {step: torch.tensor([float(step * step)], dtype=torch.float64) for step in (0, 1, 2)}
    assert forecast(newton, parabola, 4, 2).item() == pytest.approx(16.0)
    assert abs(forecast(taylorseer, parabola, 4, 2).item() - 16.0) > 0.5


def test_reuse_takes_the_newest_snapshot_only():
    assert reuse([5.0, 3.0, 2.0], 7.0) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", sorted(FORECASTERS))
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_weights_reproduce_a_constant_and_a_snapshot_at_its_own_position(name, order):
    forecaster = make_forecaster(name, order)
    positions = [7.0, 5.0, 4.0, 1.0][: forecaster.snapshots]
    assert sum(forecaster.weights(positions, 9.0)) == pytest.approx(1.0)
    assert forecaster.weights(positions, 7.0) == pytest.approx([1.0] + [0.0] * (len(positions) - 1))


def test_history_keeps_no_more_than_its_snapshots_and_writes_over_the_oldest():
    history = History(make_forecaster("newton", 1))
    zero = torch.zeros(2, 3)
    for position in (0.9, 0.7, 0.6, 0.2):
        history.record(torch.full((2, 3), position), zero, position)
    assert len(history) == 2
    torch.testing.assert_close(history.forecast(zero, 0.1), torch.full((2, 3), 0.1))
    kept = {tensor.data_ptr() for tensor in history.tensors()}
    history.record(torch.ones(2, 3), zero, 0.05)
    assert {tensor.data_ptr() for tensor in history.tensors()} == kept


def test_history_starts_over_when_the_shape_changes():
    history = History(make_forecaster("newton", 1))
    history.record(torch.ones(2, 3), torch.zeros(2, 3), 0.9)
    history.record(torch.ones(1, 3), torch.zeros(1, 3), 0.8)
    assert [tuple(t.shape) for t in history.tensors()] == [(1, 3)]
