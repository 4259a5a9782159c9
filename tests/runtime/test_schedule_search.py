"""The search for a schedule, on a problem small enough to be solved by trying everything."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from omni_runtime.cache.forecasters import make_forecaster
from omni_runtime.cache.output import reached
from omni_runtime.cache.schedules import even
from omni_runtime.calibrate.search import (
    Responses,
    Tried,
    better,
    gain,
    hopeless,
    neighbour,
    score,
    search,
    shape,
    spaced,
)

STEPS = 12
SIGMAS = [1 - i / STEPS for i in range(STEPS + 1)]


def _outputs(samples: int = 3, size: int = 5) -> np.ndarray:
    """[samples, STEPS, size], smooth in the step but for a little noise."""
    random = np.random.default_rng(0)
    powers = np.array(SIGMAS[:-1])[:, None] ** np.arange(4)
    return powers @ random.normal(size=(samples, 4, size)) + 0.01 * random.normal(size=(samples, STEPS, size))


def _arrived(
    outputs: np.ndarray, computed: tuple[int, ...], order: int, reach: float, corrector: int = 0
) -> np.ndarray:
    """[samples, gaps, size], what each gap of a schedule adds to the latents, with forecasts written out.

    With a corrector, what a skipped step has moved the latents by in the end is the parabola through the gap's computed
    ends and the one before.
    """
    found = []
    for n, (b, c) in enumerate(itertools.pairwise(computed)):
        error = np.zeros_like(outputs[:, 0])
        for i in range(b + 1, c) if corrector else ():
            kept = [c, *computed[n::-1][:corrector]]
            between = np.zeros_like(error)
            for j in kept:
                others = [k for k in kept if k != j]
                factors = [(SIGMAS[i] - SIGMAS[k]) / (SIGMAS[j] - SIGMAS[k]) for k in others]
                between += np.prod(factors) * outputs[:, j]
            error += (SIGMAS[i + 1] - SIGMAS[i]) * (outputs[:, i] - between)
        for i in range(b + 1, c) if not corrector else ():
            forecast = outputs[:, b]
            if order and n:
                a = computed[n - 1]
                x = SIGMAS[b] - min(SIGMAS[b] - SIGMAS[i], reach * (SIGMAS[a] - SIGMAS[b]))
                forecast = forecast + (outputs[:, b] - outputs[:, a]) * (x - SIGMAS[b]) / (SIGMAS[b] - SIGMAS[a])
            error += (SIGMAS[i + 1] - SIGMAS[i]) * (outputs[:, i] - forecast)
        found.append(error)
    return np.stack(found, 1)


def _responses(outputs: np.ndarray, order: int, reach: float, decibels: float = 0.0, corrector: int = 0) -> Responses:
    """Of a model whose outputs do not depend on the latents; an error grows by so many dB less at each later step."""
    changes, errors = [], []
    for step in range(1, STEPS - 1):
        computed = tuple(one for one in range(STEPS) if one != step)
        arrived = _arrived(outputs, computed, order, reach).sum(1)
        changes.append(arrived * 10 ** (-decibels * step / 20))
        errors.append(((arrived * STEPS) ** 2).sum(1))
    stacked = np.stack(changes, 1)
    forecaster = make_forecaster("newton", order)
    return Responses(stacked @ stacked.swapaxes(1, 2), np.stack(errors, 1), SIGMAS, forecaster, reach, corrector)


SCHEDULES = [(0, 2, 5, 6, 9, 11), (0, 1, 2, 3, 11), (0, 7, 11), (0, 11), tuple(range(STEPS)), even(STEPS, 6).computed]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("reach", [1.0, 0.5])
@pytest.mark.parametrize("corrector", [0, 1, 2, 3])
@pytest.mark.parametrize("computed", SCHEDULES)
def test_errors_are_predicted_where_they_add_up(
    order: int, reach: float, corrector: int, computed: tuple[int, ...]
) -> None:
    outputs = _outputs()
    if corrector:  # it looks at the last step, too, whose own error no run shows: there is none here
        outputs[:, -1] = outputs[:, -2] + order * reach * (outputs[:, -2] - outputs[:, -3])
    arrived = (_arrived(outputs, computed, order, reach, corrector).sum(1) ** 2).sum(1)
    predicted = _responses(outputs, order, reach, corrector=corrector).predict(computed)
    np.testing.assert_allclose(predicted, arrived, rtol=1e-6, atol=1e-15)
    if corrector and 2 < len(computed) < STEPS:
        assert not np.allclose(predicted, _responses(outputs, order, reach).predict(computed), rtol=1e-2)


def test_an_error_counts_as_it_grows_at_its_gap() -> None:
    """Two gaps, in a model where an error grows by 2 dB less at each later step."""
    outputs = _outputs()
    parts = _arrived(outputs, (0, 3, 4, 5, 6, 7, 8, 11), 0, 1.0)
    grown = parts[:, 0] * 10 ** (-2 * 1.5 / 20) + parts[:, -1] * 10 ** (-2 * 9.5 / 20)
    predicted = _responses(outputs, 0, 1.0, decibels=2.0).predict((0, 3, 4, 5, 6, 7, 8, 11))
    np.testing.assert_allclose(predicted, (grown**2).sum(1), rtol=1e-6)


def test_cost_is_in_units_of_evenly_spread_steps() -> None:
    responses = _responses(_outputs(), 1, 1.0)
    cost = responses.cost(6)
    assert cost(even(STEPS, 6).computed) == pytest.approx(0.0)
    ratio = responses.predict(SCHEDULES[0]) / responses.predict(even(STEPS, 6).computed)
    assert cost(SCHEDULES[0]) == pytest.approx(10 * np.log10(ratio).mean())


@pytest.mark.parametrize("budget", [2, 3, 4, 7, STEPS])
def test_shape_is_no_worse_than_evenly_spread_steps(budget: int) -> None:
    cost = _responses(_outputs(), 1, 1.0).cost(budget)
    found = shape(cost, STEPS, budget)
    assert len(found) == budget
    assert (found[0], found[-1]) == (0, STEPS - 1)
    assert list(found) == sorted(set(found))
    assert cost(found) <= cost(even(STEPS, budget).computed) + 1e-9


def test_shape_finds_where_the_steps_count() -> None:
    """Of 49 steps, those of the first half are asked for: there they are dense."""
    found = shape(lambda computed: -sum(step < 25 for step in computed), 50, 20)
    assert sum(step < 25 for step in found) > 14, "10 of them are evenly spread"


@pytest.mark.parametrize("density", [(0.0, 0.0), (0.0, 3.0, 0.0), (9.0, -9.0), (-20.0, 0.0, 20.0), (30.0, -30.0, 30.0)])
@pytest.mark.parametrize("budget", [2, 3, 9, 19, 20])
def test_spaced_steps_have_equal_shares_of_the_density(density: tuple[float, ...], budget: int) -> None:
    found = spaced(density, 20, budget)
    assert len(set(found)) == len(found) == budget
    assert list(found) == sorted(found)
    assert (found[0], found[-1]) == (0, 19)
    if density == (0.0, 0.0):
        assert max(abs(a - b) for a, b in zip(found, even(20, budget).computed, strict=True)) <= 1
    if density == (9.0, -9.0):
        assert np.mean(found) <= np.mean(even(20, budget).computed)


def test_reach_ends_an_extrapolation() -> None:
    assert reached([0.5, 0.6], 0.45, 1.0) == pytest.approx(0.45)
    assert reached([0.5, 0.6], 0.2, 1.0) == pytest.approx(0.4)
    assert reached([0.5, 0.6], 0.2, 2.0) == pytest.approx(0.3)
    assert reached([3.0, 1.0], 9.0, 1.0) == pytest.approx(5.0)  # steps count upwards
    assert reached([0.5], 0.1, 1.0) == 0.1


def test_moves_keep_the_ends_and_the_budget() -> None:
    rng = random.Random(0)
    computed: tuple[int, ...] = (0, 3, 4, 9, 19)
    seen = set()
    for _ in range(500):
        computed = neighbour(computed, 20, rng)
        seen.add(computed)
        assert len(computed) == 5
        assert list(computed) == sorted(set(computed))
        assert (computed[0], computed[-1]) == (0, 19)
    assert len(seen) > 100


def _sampler(counted: list[tuple[int, ...]]):
    """Schedules are the better the nearer their steps are to the squares."""

    def sample(computed: tuple[int, ...], best: Tried | None) -> Tried:
        counted.append(computed)
        off = sum(abs(step - square) for step, square in zip(computed, (0, 1, 4, 9, 16, 19), strict=True))
        return Tried(computed, (40.0 - off, 38.0 - off))

    return sample


def test_search_finds_the_best_schedule_and_samples_none_twice() -> None:
    counted: list[tuple[int, ...]] = []
    found = search([(0, 4, 8, 12, 16, 19)], 20, _sampler(counted), tries=2000, patience=2000)
    assert found.best.computed == (0, 1, 4, 9, 16, 19)
    assert len(counted) == len(set(counted)) == len(found.trail)
    scores = [one.score for one in found.trail]
    assert scores == sorted(scores)


def test_search_starts_from_the_best_start_and_keeps_to_its_limits() -> None:
    counted: list[tuple[int, ...]] = []
    starts = [(0, 10, 11, 12, 13, 19), (0, 1, 4, 9, 15, 19)]
    found = search(starts, 20, _sampler(counted), tries=2, patience=100)
    assert counted == starts
    assert found.best.computed == starts[1]
    counted.clear()
    search(starts, 20, _sampler(counted), tries=1000, patience=3)
    assert len(counted) < 60


def test_search_takes_the_same_way_again() -> None:
    ways: list[list[tuple[int, ...]]] = [[], []]
    for way in ways:
        search([(0, 4, 8, 12, 16, 19)], 20, _sampler(way), tries=40, patience=40, seed=3)
    assert ways[0] == ways[1]


def test_search_samples_the_move_that_promises_most() -> None:
    def off(computed: tuple[int, ...]) -> float:
        return sum(abs(step - square) for step, square in zip(computed, (0, 1, 4, 9, 16, 19), strict=True))

    ways: list[list[tuple[int, ...]]] = [[], []]
    blind = search([(0, 4, 8, 12, 16, 19)], 20, _sampler(ways[0]), tries=20, patience=20)
    guided = search([(0, 4, 8, 12, 16, 19)], 20, _sampler(ways[1]), tries=20, patience=20, cost=off)
    assert guided.best.score > blind.best.score
    assert guided.best.computed == (0, 1, 4, 9, 16, 19)


def test_search_without_freedom_samples_once() -> None:
    counted: list[tuple[int, ...]] = []

    def sample(computed: tuple[int, ...], best: Tried | None) -> Tried:
        counted.append(computed)
        return Tried(computed, (30.0,))

    assert search([(0, 1)], 2, sample, tries=10, patience=10).best.computed == (0, 1)
    assert search([(0, 5)], 6, sample, tries=10, patience=10).best.computed == (0, 5)
    assert len(counted) == 2
    with pytest.raises(ValueError, match="start"):
        search([], 6, sample, tries=10, patience=10)


def test_score_weighs_the_worst_images() -> None:
    assert score([40.0] * 10) == pytest.approx(40.0)
    assert score([45.0] * 9 + [25.0]) < score([42.0] * 10)
    assert np.isfinite(score([float("inf"), 40.0]))


def _tried(*psnr: float) -> Tried:
    return Tried((0, 1), psnr)


def test_a_gain_is_taken_image_by_image() -> None:
    mean, error = gain([41.0, 33.0], [40.0, 30.0, 99.0])
    assert (mean, error) == (pytest.approx(2.0), pytest.approx(1.0))
    assert gain([41.0], [40.0]) == (1.0, 0.0)


def test_one_lucky_image_does_not_make_a_schedule_better() -> None:
    best = _tried(30.0, 40.0, 41.0, 42.0, 43.0, 44.0)
    lucky = _tried(42.0, 39.0, 40.0, 41.0, 42.0, 43.0)
    assert lucky.score > best.score
    assert not better(lucky, best)
    assert better(_tried(30.5, 40.5, 41.5, 42.5, 43.4, 44.4), best)


def test_a_gain_in_the_mean_that_costs_the_worst_images_is_not_better() -> None:
    best = _tried(30.0, 40.0, 41.0, 42.0, 43.0, 44.0)
    assert not better(_tried(28.0, 41.0, 42.0, 43.0, 44.0, 45.0), best)


def test_what_loses_on_the_first_images_is_hopeless_and_never_better() -> None:
    best = _tried(*[40.0] * 20)
    losing = [39.0, 39.5] * 5
    assert hopeless(losing, best)
    assert not hopeless(losing[:3], best), "too few images to tell"
    assert not hopeless([41.0, 38.5] * 5, best), "chance could have made it"
    assert not better(_tried(*[41.0] * 10), best), "it was not sampled on all"


def test_the_first_start_holds_until_one_is_better() -> None:
    psnr = {(0, 2, 5): (40.0, 40.0, 40.0), (0, 3, 5): (46.0, 38.0, 40.2), (0, 4, 5): (41.0, 40.5, 41.2)}

    def run(starts: list[tuple[int, ...]]) -> tuple[int, ...]:
        return search(starts, 6, lambda computed, best: Tried(computed, psnr[computed]), 1, 1).start.computed

    assert run([(0, 2, 5), (0, 3, 5)]) == (0, 2, 5)
    assert run([(0, 2, 5), (0, 3, 5), (0, 4, 5)]) == (0, 4, 5)


def test_shape_stays_where_nothing_can_be_compared() -> None:
    assert shape(lambda computed: float("nan"), 5, 3) == (0, 2, 4)
