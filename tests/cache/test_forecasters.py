"""Forecasters against the published recursions run on tensors, and against polynomials that they must reproduce."""

import itertools
import math

import numpy as np
import pytest
import torch
from cache_dit.caching.cache_contexts.calibrators.dmd import DMDState
from cache_dit.caching.cache_contexts.calibrators.foca import FoCaState
from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

from omni_runtime.cache import forecasters
from omni_runtime.cache.forecasters import (
    FORECASTERS,
    foca,
    hermite,
    make_forecaster,
    newton,
    reuse,
    rounding_note,
    taylorseer,
)
from omni_runtime.cache.history import History, history_of, inner_products


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
    if name != "hermite" or order < 2:  # from order 2 on, HiCache's does not go through it
        assert forecaster.weights(positions, 7.0) == pytest.approx([1.0] + [0.0] * (len(positions) - 1))


@pytest.mark.parametrize("name", sorted(FORECASTERS))
def test_a_single_snapshot_is_reused(name):
    history, zero = history_of(make_forecaster(name, 3)), torch.zeros(1, 4)
    value = torch.randn(1, 4)
    history.record(value, zero, 3.0)
    assert torch.equal(history.forecast(zero, 5.0), value)


# Hermite


def published_hicache(snapshots: dict[int, torch.Tensor], step: int, order: int) -> torch.Tensor:
    """HiCache: TaylorSeer's ladder, each difference times s^i H_i(s k) / i!, H_i from its series."""
    ladder: list[torch.Tensor] = []
    last = None
    for index, value in sorted(snapshots.items()):
        fresh = [value]
        for i in range(min(order, len(ladder))):
            fresh.append((fresh[i] - ladder[i]) / (index - last))
        ladder, last = fresh, index
    s, k = 0.5, step - last
    terms = [np.polynomial.hermite.hermval(s * k, [0.0] * i + [1.0]) * s**i / math.factorial(i) for i in range(4)]
    return sum(d * term for d, term in zip(ladder, terms, strict=False))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("computed", [(0, 1, 2, 3, 4), (0, 1, 4, 5, 9), (0, 3, 6, 9, 12)])
def test_hermite_is_hicache_at_any_gaps(order, computed):
    torch.manual_seed(0)
    snapshots = {step: torch.randn(5, 7, dtype=torch.float64) for step in computed}
    for ahead in (1, 2, 5):
        step = computed[-1] + ahead
        ours = forecast(hermite, snapshots, step, order)
        torch.testing.assert_close(ours, published_hicache(snapshots, step, order), rtol=1e-9, atol=1e-9)


def test_hermite_of_order_one_is_taylorseer_at_half_the_slope():
    line = {step: torch.tensor([2.0 * step + 1.0]) for step in (2, 5)}
    assert forecast(hermite, line, 8, 1).item() == pytest.approx(11.0 + 3.0)


# FoCa


def written_out_foca(values: dict[int, torch.Tensor], steps: int) -> dict[int, torch.Tensor]:
    """Forecasts of the steps between those in `values`, by the formula, with the values of all steps kept."""
    made: dict[int, torch.Tensor] = {}
    found, computed = {}, []
    for step in range(steps):
        if step in values:
            made[step] = values[step]
            computed.append(step)
        elif len(computed) == 1:
            made[step] = found[step] = made[computed[0]]
        else:
            newest, previous = made[computed[-1]], made[computed[-2]]
            slopes = (newest - previous) + (made[step - 1] - made[step - 2])
            e = step - computed[-1]
            made[step] = newest + e / 2 * slopes
            if e > 3:
                made[step] = 3 / e * (newest + 3 / 2 * slopes) + (1 - 3 / e) * newest
            found[step] = made[step]
    return found


FOCA_RUNS = [(0, 1, 2, 4, 6, 9), (0, 1, 3, 4, 5, 12), (0, 2, 5, 9), (0, 1, 7, 8, 14), (0, 5, 6)]


@pytest.mark.parametrize("computed", FOCA_RUNS)
def test_foca_with_all_snapshots_is_the_recursion_and_the_librarys(computed):
    torch.manual_seed(0)
    values = {step: torch.randn(4, 3, dtype=torch.float64) for step in computed}
    steps = computed[-1] + 6
    expected, library = written_out_foca(values, steps), FoCaState()
    for step in range(steps):
        library.mark_step_begin()
        if step in values:
            library.update(values[step])
            continue
        known = sorted((p for p in values if p < step), reverse=True)
        ours = sum(w * values[p] for w, p in zip(foca(known, step), known, strict=True))
        torch.testing.assert_close(ours, expected[step], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours, library.approximate(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kept", "choices"), [(4, (1, 2, 4, 5)), (6, (2, 5))])
def test_foca_of_few_snapshots_differs_from_the_recursion_by_the_stated_bound(kept, choices):
    """By some factor of how far the last forecast before the second oldest kept step was from the oldest."""
    largest = 0.0
    for gaps in itertools.product(choices, repeat=kept + 1):
        positions = [float(p) for p in itertools.accumulate((0, *gaps))][::-1]
        replaced = np.array([0.0] * (kept - 1) + foca(positions[kept - 1 :], positions[kept - 2] - 1))
        replaced[kept - 1] -= 1.0
        for ahead in (1, 2, 4):
            x = positions[0] + ahead
            difference = np.array(foca(positions, x)) - np.array(foca(positions[:kept], x) + [0.0] * 2)
            factor = difference @ replaced / max(replaced @ replaced, 1e-30)
            np.testing.assert_allclose(difference, factor * replaced, atol=1e-12)
            largest = max(largest, abs(factor))
    assert largest == pytest.approx(0.5625 ** (kept - 1))
    assert 0.5625 ** (make_forecaster("foca").snapshots - 1) < 0.002


# Exponential modes


def written_out_dmd(snapshots: list[torch.Tensor], horizon: float) -> torch.Tensor:
    """Exact DMD of [d] snapshots, oldest first, by a singular value decomposition of the snapshots themselves."""
    columns = torch.stack(snapshots, 1).double().numpy()
    x, z = columns[:, :-1], columns[:, 1:]
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = int((s > s[0] * 1e-4).sum())
    u, s, v = u[:, :rank], s[:rank], vt[:rank].T
    modes, w = np.linalg.eig(u.T @ z @ v / s)
    phi = z @ v / s @ w
    amplitudes = np.linalg.lstsq(phi, columns[:, -1].astype(complex), rcond=None)[0]
    return torch.from_numpy((phi @ (modes.astype(complex) ** horizon * amplitudes)).real)


def exponentials(steps, modes, seed=0, size=400):
    """Σ φ_i λ_i^t at each step; of a complex λ the real part, which takes two real dimensions."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [torch.complex(*torch.randn(2, size, dtype=torch.float64, generator=generator)) for _ in modes]
    values = [sum((shape * complex(mode) ** t).real for shape, mode in zip(shapes, modes, strict=True)) for t in steps]
    return [value.float() for value in values]


def fitted(values, positions):
    """A history of `dmd` that has seen [d] tensors at these positions."""
    history = history_of(make_forecaster("dmd"))
    for value, position in zip(values, positions, strict=True):
        history.record(value[None], torch.zeros_like(value[None]), float(position))
    return history


def of(history, position, size=400, dtype=torch.float32):
    return history.forecast(torch.zeros(1, size, dtype=dtype), float(position))[0]


@pytest.mark.parametrize("spacing", [1, 2, 3])
@pytest.mark.parametrize("modes", [(0.9,), (1.02, 0.7), (0.95 * np.exp(0.3j),), (1.0, 0.8 * np.exp(1j))])
def test_dmd_continues_sums_of_exponentials_exactly(modes, spacing):
    steps = [spacing * i for i in range(6)]
    history = fitted(exponentials(steps, modes), steps)
    for ahead in (1, 2, spacing, 2 * spacing + 1):
        (expected,) = exponentials([steps[-1] + ahead], modes)
        torch.testing.assert_close(of(history, steps[-1] + ahead), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [4, 5, 6, 9])
def test_dmd_from_inner_products_is_dmd_of_the_snapshots_and_the_librarys(count):
    steps = list(range(0, 2 * count, 2))
    clean = exponentials(steps, (1.01, 0.8, 0.5 * np.exp(0.7j)))
    torch.manual_seed(1)
    values = [value + 0.02 * torch.randn_like(value) for value in clean]
    history, library = fitted(values, steps), DMDState(history=6)
    for step in range(steps[-1] + 1):
        library.mark_step_begin()
        if step in steps:
            library.update(values[steps.index(step)][None])
    for ahead in (1, 2, 3):
        library.mark_step_begin()
        ours = of(history, steps[-1] + ahead)
        expected = written_out_dmd(values[-6:], ahead / 2).float()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, library.approximate()[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [(0, 1, 2), (0, 1, 2, 4), (0, 1, 2, 3, 5, 7), (0, 1, 2, 3, 4, 9)])
def test_dmd_of_too_few_even_gaps_is_the_line_through_the_two_newest(positions, monkeypatch):
    monkeypatch.setattr("omni_runtime.cache.history.inner_products", lambda snapshots: pytest.fail("was fitted"))
    values = exponentials(positions, (0.9, 0.4))
    slope = (values[-1] - values[-2]) / (positions[-1] - positions[-2])
    torch.testing.assert_close(of(fitted(values, positions), positions[-1] + 2), values[-1] + 2 * slope)


def test_dmd_takes_the_evenly_spaced_snapshots_only():
    positions = (0, 1, 3, 5, 7, 9)
    values = [*exponentials((0,), (5.0,), seed=9), *exponentials(positions[1:], (0.9, 0.6))]
    (expected,) = exponentials((11,), (0.9, 0.6))
    torch.testing.assert_close(of(fitted(values, positions), 11), expected, rtol=1e-4, atol=1e-4)


def test_dmd_fits_each_sample_by_itself():
    slow, fast = exponentials(range(5), (1.0, 0.9)), exponentials(range(5), (0.5, 0.3), seed=1)
    history, zero = history_of(make_forecaster("dmd")), torch.zeros(2, 400)
    for position, pair in enumerate(zip(slow, fast, strict=True)):
        history.record(torch.stack(pair), zero, float(position))
    together = history.forecast(zero, 6.0)
    for alone, values in zip(together, (slow, fast), strict=True):
        assert torch.equal(alone, of(fitted(values, range(5)), 6))


def test_dmd_reads_the_snapshots_once_until_another_is_recorded(monkeypatch):
    calls = []
    monkeypatch.setattr("omni_runtime.cache.history.inner_products", lambda *of: calls.append(1) or inner_products(*of))
    values = exponentials(range(6), (0.9, 0.6))
    history = fitted(values[:5], range(5))
    for position in (5, 6, 7):
        of(history, position)
    assert len(calls) == 1
    history.record(values[5][None], torch.zeros(1, 400), 5.0)
    of(history, 6)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dmd_takes_no_rounding_for_a_mode(dtype):
    """Rounded to bf16, one mode spans as many dimensions as there are snapshots."""
    values = [value.to(dtype) for value in exponentials(range(6), (0.97,), size=5000)]
    history = fitted(values, range(6))
    (expected,) = exponentials((9,), (0.97,), size=5000)
    error = (of(history, 9, 5000, dtype).double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "values",
    [
        [torch.zeros(8)] * 5,
        [torch.full((8,), math.nan)] * 5,
        [torch.randn(8, generator=torch.Generator().manual_seed(seed)) * 30.0**-seed for seed in range(5)],
        [torch.randn(8, generator=torch.Generator().manual_seed(seed)) * 30.0**seed for seed in range(5)],
    ],
    ids=["zeros", "no numbers", "collapsing", "exploding"],
)
def test_dmd_of_what_has_no_sound_modes_stays_bounded(values):
    history = fitted(values, range(5))
    weights = [fit([4.0, 3.0, 2.0, 1.0, 0.0], 7.0) for fit in history._fitted()]
    assert np.abs(weights).sum() <= forecasters.DMD_LARGEST


def test_inner_products_are_those_of_float64_in_any_number_of_pieces(monkeypatch):
    monkeypatch.setattr("omni_runtime.cache.history.PIECE", 7)
    torch.manual_seed(0)
    snapshots = [torch.randn(2, 5, 6).to(torch.bfloat16) for _ in range(3)]
    flat = torch.stack([s.double().flatten(1) for s in snapshots], 1)
    np.testing.assert_allclose(inner_products(snapshots), (flat @ flat.mT).numpy(), rtol=1e-12)


# Snapshots


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


# Half precision


@pytest.mark.parametrize(("name", "order"), [("reuse", 1), ("taylorseer", 1), ("newton", 2), ("dmd", 1)])
def test_fp16_states_at_the_ends_of_the_range_stay_finite(name, order):
    """A block may move a state from one end of fp16 to the other: the difference is no number of fp16."""
    before = torch.full((1, 4, 8), -60000.0, dtype=torch.float16)
    history = history_of(make_forecaster(name, order))
    for step in range(5):
        history.record(-before, before, float(step))
    torch.testing.assert_close(history.forecast(before, 5.0), -before, rtol=2e-3, atol=0.0)
    assert history.forecast(-before, 5.0).eq(65504).all(), "clipped, as the model does"


def test_fp16_residuals_are_kept_to_the_last_bit():
    draw = torch.Generator().manual_seed(0)
    before, after = (torch.randn(2, 16, 8, generator=draw).half() for _ in range(2))
    history = history_of(make_forecaster("reuse"))
    history.record(after, before, 0.0)
    assert torch.equal(history.forecast(before, 1.0), (before.float() + (after - before).float()).half())


# Rounding


def off_by(dtype, order):
    """How far Newton's forecast one step on is off, in the mean, of a smooth trajectory in 50 steps."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(4096, dtype=torch.float64) for _ in range(3))

    def state(t):
        return a + 0.3 * math.sin(2 * t) * b + 0.2 * math.cos(3 * t) * c

    positions = [-0.02 * i for i in range(order + 1)]
    weights = newton(positions, 0.02)
    found = sum(w * state(t).to(dtype).double() for w, t in zip(weights, positions, strict=True))
    return (found - state(0.02)).abs().mean().item()


@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [(torch.bfloat16, 0.0027, 0.0049), (torch.float16, 0.0007, 0.0006), (torch.float32, 0.0006, 0.00002)],
)
def test_what_rounding_leaves_of_order_two(dtype, first, second):
    assert off_by(dtype, 1) == pytest.approx(first, rel=0.1)
    assert off_by(dtype, 2) == pytest.approx(second, rel=0.25)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["newton", "taylorseer", "hermite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_high_orders_in_half_precision_are_noted(name, order, dtype):
    kind = str(dtype).removeprefix("torch.")
    times = {2: 7, 3: 15}[order]
    positions = [float(-i) for i in range(order + 1)]
    assert sum(map(abs, newton(positions, 1.0))) == times
    assert rounding_note(name, order, dtype).startswith(
        f"{name} of order {order} in {kind}: a forecast has up to {times} "
    )


@pytest.mark.parametrize(
    ("name", "order", "dtype"),
    [
        ("newton", 1, torch.bfloat16),
        ("taylorseer", 0, torch.float16),
        ("newton", 3, torch.float32),
        ("hermite", 2, torch.float64),
        ("reuse", 3, torch.bfloat16),
        ("foca", 3, torch.bfloat16),
        ("dmd", 3, torch.float16),
    ],
)
def test_nothing_is_noted_where_rounding_does_no_harm(name, order, dtype):
    assert rounding_note(name, order, dtype) is None


def test_a_forecaster_says_by_what_it_was_chosen():
    assert {name: make_forecaster(name, 2).order for name in FORECASTERS} == {
        "reuse": 0, "taylorseer": 2, "newton": 2, "hermite": 2, "foca": 0, "dmd": 0,
    }  # fmt: skip
    assert all(make_forecaster(name).name == name for name in FORECASTERS)


def test_what_is_recorded_at_the_newest_position_takes_its_place_alone():
    history = History(make_forecaster("taylorseer", 2))
    for position, value in ((3.0, 1.0), (2.0, 2.0), (1.0, 3.0), (1.0, 4.0)):
        history.record(torch.full((1, 2), value), None, position)
    assert history.positions == [1.0, 2.0, 3.0]
    assert [snapshot[0, 0].item() for snapshot in history.tensors()] == [4.0, 2.0, 1.0]
