"""The search for a schedule, on problems whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from omni_runtime.cache.output import reached
from omni_runtime.cache.schedules import EARLY, KNOTS, early, even, spaced, usual_reach
from omni_runtime.calibrate.schedule import choose
from omni_runtime.calibrate.search import (
    Forecast,
    Search,
    Tried,
    better,
    forecasts,
    gain,
    hopeless,
    score,
    search,
)

STEPS = 50
FORECAST = Forecast(1.0, 2)


@pytest.mark.parametrize("density", [(0.0,) * 6, (0, 0, 3, 3, 0, 0), (9, 0, 0, 0, 0, -9), (-20, 0, 20, 0, 5, 30)])
@pytest.mark.parametrize("budget", [2, 3, 9, 19, 20])
def test_spaced_steps_have_equal_shares_of_the_density(density: tuple[float, ...], budget: int) -> None:
    assert len(density) == len(KNOTS)
    found = spaced(density, 20, budget)
    assert len(set(found)) == len(found) == budget
    assert list(found) == sorted(found)
    assert (found[0], found[-1]) == (0, 19)
    if density == (0.0,) * 6:
        assert max(abs(a - b) for a, b in zip(found, even(20, budget).computed, strict=True)) <= 1
    if density[0] == 9:
        assert np.mean(found) <= np.mean(even(20, budget).computed)


def test_reach_ends_an_extrapolation() -> None:
    assert reached([0.5, 0.6], 0.45, 1.0) == pytest.approx(0.45)
    assert reached([0.5, 0.6], 0.2, 1.0) == pytest.approx(0.4)
    assert reached([0.5, 0.6], 0.2, 2.0) == pytest.approx(0.3)
    assert reached([3.0, 1.0], 9.0, 1.0) == pytest.approx(5.0)  # steps count upwards
    assert reached([0.5], 0.1, 1.0) == 0.1


def test_fewer_computed_steps_reach_less_far() -> None:
    assert [usual_reach(count) for count in (2, 7, 10, 16, 50)] == [0.25, 0.25, 0.5, 1.0, 1.0]
    assert forecasts(10) == [(0.5, 2), (0.25, 2), (1.0, 2), (0.5, 3), (0.25, 3), (1.0, 3)]
    assert forecasts(25) == [(1.0, 2), (0.5, 2), (1.0, 3), (0.5, 3)], "none twice"


class Problem:
    """Images that are the better the more steps are computed in the first third, up to 8 of them.

    Forecasts of order 3 are 1 dB better.
    """

    def __init__(self) -> None:
        self.sampled: list[tuple[tuple[int, ...], Forecast]] = []

    def sample(self, computed: tuple[int, ...], forecast: Forecast, best: Tried | None) -> Tried:
        self.sampled.append((computed, forecast))
        early = sum(step < STEPS / 3 for step in computed)
        level = 40.0 - abs(early - 8) + (forecast.corrector_order == 3) + 0.1 * (forecast.reach == usual_reach(13))
        return Tried(computed, tuple(level + 0.01 * n for n in range(8)), forecast)


def test_search_finds_where_the_steps_count() -> None:
    problem, events = Problem(), []
    found = search(STEPS, 13, problem.sample, tries=40, on_try=lambda number, *_: events.append(number))
    assert found.forecast == Forecast(usual_reach(13), 3)
    assert sum(step < STEPS / 3 for step in even(STEPS, 13).computed) == 5
    best = found.finalists[0]
    assert sum(step < STEPS / 3 for step in best.computed) == 8
    assert best.forecast == found.forecast
    assert best.score > found.even.score + 3
    assert found.even.computed == even(STEPS, 13).computed
    assert found.early.computed == early(STEPS, 13).computed
    assert found.even.forecast == found.early.forecast == forecasts(13)[0]
    assert len(found.early.psnr) == len(found.even.psnr)
    assert len(problem.sampled) == len(set(problem.sampled)) == len(found.trail), "none is sampled twice"
    assert events == list(range(1, len(found.trail) + 1))
    scores = [one.score for one in found.trail]
    assert scores == sorted(scores)
    assert len(problem.sampled) <= len(forecasts(13)) + 1 + 40 + 1


def test_search_takes_the_same_way_again_and_goes_on_from_a_density() -> None:
    ways = [Problem(), Problem(), Problem()]
    state = np.random.get_state()[1].copy()
    first, again = (search(STEPS, 13, way.sample, tries=24, seed=3) for way in ways[:2])
    assert ways[0].sampled == ways[1].sampled
    assert first == again
    assert (np.random.get_state()[1] == state).all(), "the global generator is left alone"
    onwards = search(STEPS, 13, ways[2].sample, tries=8, density=first.density)
    assert spaced(first.density, STEPS, 13) in [one for one, _ in ways[2].sampled] + [onwards.even.computed] or (
        max(one.score for one in onwards.finalists) >= first.finalists[0].score - 1
    )


@pytest.mark.parametrize("budget", [2, STEPS])
def test_search_without_freedom_samples_once(budget: int) -> None:
    problem = Problem()
    found = search(STEPS, budget, problem.sample, tries=10)
    assert [one for one, _ in problem.sampled] == [even(STEPS, budget).computed]
    assert found.finalists == [found.even]


def test_a_schedule_that_was_given_up_is_no_finalist() -> None:
    def sample(computed: tuple[int, ...], forecast: Forecast, best: Tried | None) -> Tried:
        return Tried(computed, (40.0,) * (8 if best is None else 4), forecast)

    found = search(STEPS, 13, sample, tries=16)
    assert found.finalists == [found.even]
    assert {len(one.psnr) for one in found.trail} == {8}


def _tried(*psnr: float, computed: tuple[int, ...] = (0, 1)) -> Tried:
    return Tried(computed, psnr, FORECAST)


def test_evenly_spread_steps_stay_unless_another_schedule_is_clearly_better_on_other_images() -> None:
    even_there = (30.0, 40.0, 41.0, 42.0, 43.0, 44.0)
    lucky = (42.0, 39.0, 40.0, 41.0, 42.0, 43.0)
    good = (31.0, 41.0, 42.1, 43.0, 44.2, 45.0)
    lower = (27.0, 43.0, 44.1, 45.0, 46.2, 47.0)  # a higher mean and score, but not in the worst image
    there = {(0, 1): even_there, (0, 2): lucky, (0, 3): good, (0, 4): even_there, (0, 5): lower}

    def chosen(*finalists: tuple[int, ...], gained: float = 5.0) -> tuple[int, ...]:
        spread = _tried(*even_there)
        there_too = [_tried(*(one + gained for one in even_there), computed=computed) for computed in finalists]
        found = Search(spread, spread, FORECAST, EARLY, [spread], there_too)
        best, held_out, measured = choose(found, lambda one: _tried(*there[one.computed], computed=one.computed))
        assert held_out.computed == best.computed
        assert measured.computed == (0, 1)
        return best.computed

    assert chosen((0, 2), (0, 4)) == (0, 1), "one lucky image, and a schedule that is no better"
    assert better(_tried(*lower), _tried(*even_there))
    assert chosen((0, 5)) == (0, 1), "better in the mean, but worse in the worst image"
    assert chosen((0, 2), (0, 3), (0, 4)) == (0, 3)
    assert chosen((0, 3), gained=0.0) == (0, 1), "better on other images alone may be luck, too"


@pytest.mark.parametrize(
    ("usual", "kept"),
    [
        ((31.0, 40.0, 41.0, 42.0, 43.0, 44.5), (0, 7)),  # a little better: it is known beforehand, so that is enough
        ((29.0, 30.0, 60.0, 60.0, 60.0, 60.0), (0, 1)),  # worse in the worst image
        ((31.0, 39.0, 40.0, 41.0, 42.0, 43.0), (0, 1)),  # worse in the mean
    ],
)
def test_the_default_schedule_stays_if_it_is_no_worse_than_evenly_spread_steps(
    usual: tuple[float, ...], kept: tuple[int, ...]
) -> None:
    even_there = (30.0, 40.0, 41.0, 42.0, 43.0, 44.0)
    spread, default = _tried(*even_there), _tried(*even_there, computed=(0, 7))
    there = {(0, 1): even_there, (0, 7): usual}
    found = Search(spread, default, FORECAST, EARLY, [spread], [default, spread])
    best, held_out, measured = choose(found, lambda one: _tried(*there[one.computed], computed=one.computed))
    assert best.computed == held_out.computed == kept
    assert measured.computed == (0, 1)


def test_score_weighs_the_worst_images() -> None:
    assert score([40.0] * 10) == pytest.approx(40.0)
    assert score([45.0] * 9 + [25.0]) < score([42.0] * 10)
    assert np.isfinite(score([float("inf"), 40.0]))


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
    losing = [38.0, 38.5] * 5
    assert hopeless(losing, best)
    assert not hopeless(losing[:3], best), "too few images to tell"
    assert not hopeless([41.0, 38.5] * 5, best), "chance could have made it"
    assert not better(_tried(*[41.0] * 10), best), "it was not sampled on all"
