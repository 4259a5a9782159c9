"""Schedules, as published and carried over to other requests."""

from __future__ import annotations

import itertools

import pytest

from omni_runtime.cache import masks, schedules
from omni_runtime.cache.schedules import (
    PUBLISHED,
    Schedule,
    early,
    even,
    fast_enough,
    fitted,
    good_enough,
    named,
    nearest,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules_are_sound(name: str) -> None:
    schedule = PUBLISHED[name]
    assert list(schedule.computed) == sorted(set(schedule.computed))
    assert schedule.computed[0] == 0
    assert schedule.computed[-1] == schedule.steps - 1
    assert len(schedule.computed) == int(name.rpartition("-")[2])
    assert sum(schedule.mask) == len(schedule.computed)
    assert schedule.origin.startswith(("MeanCache", "LeMiCa", "FlexCache", "published for velocity"))
    assert ("arXiv" in schedule.origin) == ("image" in name)


# fmt: off
PUBLISHED_LISTS = {
    "autohq-25": [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15, 17, 19, 21, 24, 28, 32, 36, 40, 44, 47, 48, 49,
    ],
    "qwen-image-25": [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 24, 32, 40, 43, 45, 47, 48, 49,
    ],
    "qwen-image-2512-25": [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 23, 31, 37, 44, 45, 46, 47, 48, 49,
    ],
    "velocity-21": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 19, 22, 26, 33, 40, 46, 49],
    "qwen-image-17": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 17, 24, 31, 38, 45, 48, 49],
    "qwen-image-2512-17": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 19, 27, 35, 43, 47, 49],
    "lemica-qwen-image-17": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 22, 29, 36, 42, 49],
    "velocity-13": [0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 23, 37, 49],
    "qwen-image-10": [0, 1, 3, 7, 14, 21, 28, 35, 42, 49],
    "velocity-9": [0, 1, 2, 3, 5, 9, 17, 31, 49],
    "lemica-z-image-turbo-8": [0, 1, 2, 3, 5, 7, 8, 9],
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED_LISTS)
def test_published_schedules_are_what_their_authors_wrote(name: str) -> None:
    assert list(PUBLISHED[name].computed) == PUBLISHED_LISTS[name]
    assert PUBLISHED[name].steps == (10 if "turbo" in name else 50)
    assert named(name, PUBLISHED[name].steps) is PUBLISHED[name]


@pytest.mark.parametrize(("steps", "budget"), [(50, 25), (50, 17), (50, 2), (50, 50), (7, 3), (2, 2), (1, 1)])
def test_even_spreads(steps: int, budget: int) -> None:
    computed = even(steps, budget).computed
    assert len(set(computed)) == budget
    assert (computed[0], computed[-1]) == (0, steps - 1)
    gaps = [b - a for a, b in itertools.pairwise(computed)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("steps", "budget"), [(50, 17), (50, 13), (50, 8), (40, 12), (100, 12)])
def test_the_default_schedule_is_denser_at_the_beginning(steps: int, budget: int) -> None:
    computed = early(steps, budget).computed
    assert len(set(computed)) == budget
    assert (computed[0], computed[-1]) == (0, steps - 1)
    assert sum(computed) < sum(even(steps, budget).computed)
    gaps = [b - a for a, b in itertools.pairwise(computed)]
    assert max(gaps) <= 2.5 * steps / budget, "no gap is much longer than the others"


@pytest.mark.parametrize(("steps", "budget"), [(50, 25), (50, 32), (100, 50), (39, 12), (2, 2), (1, 1)])
def test_with_many_computed_steps_or_in_a_short_request_the_default_is_evenly_spread(steps: int, budget: int) -> None:
    assert early(steps, budget).computed == even(steps, budget).computed


def test_a_schedule_for_the_same_request_stays_as_it_is() -> None:
    schedule = Schedule(10, (0, 1, 5, 9), "here", sigmas=tuple(1 - i / 10 for i in range(10)))
    assert fitted(schedule, 10, schedule.sigmas) is schedule
    assert fitted(schedule, 10) is schedule


@pytest.mark.parametrize("steps", [2, 5, 20, 28, 50, 100])
@pytest.mark.parametrize("budget", [None, 2, 7, 40])
def test_carried_over_schedules_are_sound(steps: int, budget: int | None) -> None:
    schedule = PUBLISHED["qwen-image-17"]
    made = fitted(schedule, steps, None, budget)
    expected = min(max(budget or round(17 * steps / 50), 2), steps)
    assert len(made.computed) == expected
    assert list(made.computed) == sorted(set(made.computed))
    assert (made.computed[0], made.computed[-1]) == (0, steps - 1)
    assert (f"carried over to {expected} of {steps}" in made.origin) == (made is not schedule)
    assert schedule.origin in made.origin


def test_carrying_over_keeps_the_noise_levels() -> None:
    """The computed steps of a request with other levels are those nearest in σ, not in the step's index."""
    linear = tuple(1 - i / 50 for i in range(50))
    squared = tuple((1 - i / 50) ** 2 for i in range(50))
    schedule = Schedule(50, (*tuple(range(0, 49, 7)), 49), "here", sigmas=linear)
    made = fitted(schedule, 50, squared)
    wanted = [min(range(50), key=lambda i: abs(squared[i] - linear[step])) for step in schedule.computed[1:-1]]
    assert list(made.computed[1:-1]) == wanted


def test_carrying_over_to_fewer_steps_goes_to_the_nearest_noise_levels() -> None:
    """From 50 levels to 28 that a shift of 3 keeps high; who goes by the step's index ends elsewhere."""
    linear = [1 - i / 50 for i in range(50)]
    shifted = [3 * level / (1 + 2 * level) for level in (1 - i / 28 for i in range(28))]
    schedule = Schedule(50, (0, 4, 9, 15, 22, 30, 39, 49), "here", sigmas=tuple(linear))
    made = fitted(schedule, 28, shifted, 8)
    wanted = [min(range(28), key=lambda i: abs(shifted[i] - linear[step])) for step in schedule.computed[1:-1]]
    assert made.computed == (0, *wanted, 27)
    by_index = fitted(Schedule(50, schedule.computed, "here"), 28, shifted, 8).computed
    assert by_index == (0, *(round(step * 27 / 49) for step in schedule.computed[1:-1]), 27)
    assert all(a > b for a, b in zip(made.computed[1:-1], by_index[1:-1], strict=True))


def test_carrying_over_to_twice_the_steps_doubles_the_places() -> None:
    schedule = Schedule(11, (0, 1, 4, 10), "here")
    assert fitted(schedule, 21, None, 4).computed == (0, 2, 8, 20)


def test_an_even_schedule_stays_even_with_another_budget() -> None:
    shifted = tuple(3 * level / (1 + 2 * level) for level in (1 - i / 50 for i in range(50)))
    schedule = Schedule(50, even(50, 32).computed, "here", sigmas=shifted)
    for budget in (45, 40, 36, 20):
        assert fitted(schedule, 50, shifted, budget).computed == even(50, budget).computed


def test_a_speedup_is_answered_from_what_was_measured() -> None:
    """Half of the steps was 1.8 times as fast, a quarter 3: 1 − 1/1.8 = 8/9 · 1/2, and 1 − 1/3 = 8/9 · 3/4."""
    measured = [
        Schedule(steps, even(steps, budget).computed, "measured", psnr=40.0, speedup=speedup)
        for steps, budget, speedup in ((40, 20, 1.8), (20, 5, 3.0), (20, 10, None))
    ]
    assert fast_enough(measured, 40, 1.8) == 20
    assert fast_enough(measured, 20, 3.0) == 5
    assert fast_enough(measured, 40, 1.0 + 1e-9) == 40
    assert fast_enough(measured, 40, 2.0) == 17, "1 − 1/2 = 8/9 · 9/16: 17.5 steps, and 17 are as fast at least"
    assert fast_enough([], 40, 2.0) == 20, "where nothing was measured, only computed steps count"
    assert fast_enough([], 40, 100.0) == 2
    with pytest.raises(ValueError, match=r"speedup 10 is more than skipping steps gives: with 2 of 40 computed, 6\.4"):
        fast_enough(measured, 40, 10.0)


def test_names() -> None:
    assert named("scm-fast", 28).mask == masks.steps_mask("fast", 28)
    assert named("qwen-image-25", 50) is PUBLISHED["qwen-image-25"]
    assert named("qwen-image-25", 28).steps == 28
    assert {"qwen-image-25", "scm-slow", "scm-ultra"} <= set(schedules.NAMES)


def test_nearest_goes_by_the_number_of_computed_steps() -> None:
    a, b, c = (Schedule(steps, tuple(range(count)), "") for steps, count in ((50, 25), (28, 10), (50, 10)))
    assert nearest([a, b, c], 50, 26) is a
    assert nearest([a, b, c], 100, 37) is a
    assert nearest([a, b, c], 20, 10) is b, "of two with as many, the one with the nearest number of steps"
    assert nearest([a, b, c], 60, 10) is c
    assert nearest([], 50, 25) is None


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("sigmas", [None, (0.7,)])
def test_one_step_is_computed_by_every_schedule(name: str, sigmas: tuple[float, ...] | None) -> None:
    assert named(name, 1, sigmas).computed == (0,)


@pytest.mark.parametrize("budget", [None, 0, 1, 2, 3, 99])
def test_one_step_is_computed_at_every_budget(budget: int | None) -> None:
    levels = Schedule(4, (0, 1, 3), "here", sigmas=(1.0, 0.8, 0.5, 0.2))
    single = Schedule(1, (0,), "here", sigmas=(1.0,))
    for schedule in (levels, single, PUBLISHED["z-image-25"]):
        assert fitted(schedule, 1, (0.9,), budget).computed == (0,)
    assert even(1, budget or 0).computed == (0,)


@pytest.mark.parametrize(
    ("steps", "budget", "computed"),
    [
        (2, 0, (0, 1)),
        (2, 1, (0, 1)),
        (2, 5, (0, 1)),
        (5, 0, (0, 4)),
        (5, 1, (0, 4)),
        (5, 3, (0, 2, 4)),
        (5, 5, (0, 1, 2, 3, 4)),
        (5, 9, (0, 1, 2, 3, 4)),
    ],
)
def test_a_budget_is_two_at_least_and_all_steps_at_most(steps: int, budget: int, computed: tuple[int, ...]) -> None:
    assert even(steps, budget).computed == computed
    assert fitted(Schedule(9, (0, 4, 8), "here"), steps, None, budget).computed == computed


def test_a_schedule_of_one_step_is_carried_over_to_more() -> None:
    """Of one level nothing is known of how to spread others: the first steps, and the last."""
    assert fitted(Schedule(1, (0,), "here", sigmas=(1.0,)), 4, (1.0, 0.7, 0.4, 0.1), 3).computed == (0, 1, 3)


def test_a_schedule_of_no_steps_is_refused() -> None:
    for made in (lambda: even(0, 2), lambda: fitted(PUBLISHED["z-image-25"], 0), lambda: named("z-image-25", 0)):
        with pytest.raises(ValueError, match="at least 1 step, not of 0"):
            made()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("speedup", [1.5, 2.0, 50.0])
def test_of_one_or_two_steps_no_speedup_is_asked(steps: int, speedup: float) -> None:
    measured = [Schedule(50, even(50, 25).computed, "measured", psnr=40.0, speedup=1.8)]
    assert fast_enough(measured, steps, speedup) == fast_enough([], steps, speedup) == steps


def test_good_enough_goes_by_the_share_of_computed_steps_and_not_by_their_number() -> None:
    """17 of 50 are 34%, 12 of 28 are 43%, 9 of 20 are 45%: the first is the fastest, though it computes the most."""
    many = Schedule(50, even(50, 17).computed, "many", psnr=36.0)
    some = Schedule(28, even(28, 12).computed, "some", psnr=38.0)
    few = Schedule(20, even(20, 9).computed, "few", psnr=40.0)
    for order in itertools.permutations((many, some, few)):
        assert good_enough(order, 35.0) is many
        assert good_enough(order, 36.0) is many, "as good as asked is good enough"
        assert good_enough(order, 36.1) is some
        assert good_enough(order, 39.0) is few
    with pytest.raises(ValueError, match=r"quality 41 dB is more than .*: the best has 40\.0 dB, at 9 of 20 steps"):
        good_enough([many, some, few], 41.0)
    with pytest.raises(ValueError, match="run `omni calibrate schedule` first"):
        good_enough([Schedule(50, (0, 49), "never measured")], 1.0)
