"""Schedules: which steps of a request are computed, decided before the request starts.

A schedule is made for a number of steps and their noise levels σ. `fitted` adapts it to another request: to other
noise levels, to more or fewer steps, or to another number of computed steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_runtime.cache.masks import POLICIES, steps_mask

#: Places in a request, from 0 to 1, of the numbers that describe a density of computed steps. There are more at the
#: beginning, because errors grow from there.
KNOTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
#: The density of the default schedule, as logarithms at `KNOTS`: more of the early steps are computed.
EARLY = (0.3, 0.3, 0.15, -0.3, -0.45, 0.15)
#: The default schedule has this density with up to so many computed steps, and is evenly spread from so many on.
FADES = (17, 25)
#: Shorter requests are evenly spread, too: there, more early steps are better on one model and worse on another.
LONG = 40


@dataclass(frozen=True)
class Schedule:
    """The computed steps of a request.

    Attributes:
        steps: the number of steps of the request.
        computed: indices of the computed steps, rising; the first is 0 and the last is steps − 1.
        origin: where the schedule comes from, in words.
        sigmas: the noise level of each step in the runs it was made for; None if they are not known.
        psnr: mean PSNR in dB against full runs; None if not measured.
        low: its 5th percentile; None if not measured.
        images: how many images both were measured on; 0 if it is not known.
        speedup: how many times as fast as a full run; None if not measured.
        reach, corrector_order: how its skipped steps are forecast (`omni_runtime.cache.output.Chosen`); None for the
            default.
    """

    steps: int
    computed: tuple[int, ...]
    origin: str
    sigmas: tuple[float, ...] | None = None
    psnr: float | None = None
    speedup: float | None = None
    reach: float | None = None
    corrector_order: int | None = None
    low: float | None = None
    images: int = 0

    @property
    def mask(self) -> tuple[int, ...]:
        """1 for each computed step, 0 for each skipped one."""
        computed = set(self.computed)
        return tuple(int(step in computed) for step in range(self.steps))


def _steps(text: str) -> tuple[int, ...]:
    """ "0-3, 7" → 0, 1, 2, 3, 7."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


_MEANCACHE = "MeanCache (Gao et al. 2026, arXiv:2601.19961)"
_LEMICA = "LeMiCa (Gao et al. 2025, arXiv:2511.00090)"
#: The origin of published lists whose authors are not known.
_UNNAMED = "published for velocity caching (authors and model unknown)"


def _meancache(model: str, computed: str) -> Schedule:
    return Schedule(50, _steps(computed), f"{_MEANCACHE}, {model}")


#: name → schedule as its authors published it; the last number in a name is the number of computed steps
PUBLISHED: dict[str, Schedule] = {
    "qwen-image-25": _meancache("Qwen-Image", "0-16, 24, 32, 40, 43, 45, 47-49"),
    "qwen-image-17": _meancache("Qwen-Image", "0-8, 10, 17, 24, 31, 38, 45, 48, 49"),
    "qwen-image-10": _meancache("Qwen-Image", "0, 1, 3, 7, 14, 21, 28, 35, 42, 49"),
    "qwen-image-2512-25": _meancache("Qwen-Image-2512", "0-15, 23, 31, 37, 44-49"),
    "qwen-image-2512-17": _meancache("Qwen-Image-2512", "0-9, 11, 19, 27, 35, 43, 47, 49"),
    "qwen-image-2512-10": _meancache("Qwen-Image-2512", "0, 2, 4, 7, 14, 21, 28, 35, 42, 49"),
    "z-image-25": _meancache("Z-Image", "0-6, 8, 10-13, 15-18, 20, 22, 29, 37, 42, 45, 47-49"),
    "z-image-20": _meancache("Z-Image", "0-4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 30, 38, 43, 46, 48, 49"),
    "z-image-17": _meancache("Z-Image", "0-4, 6, 8, 10, 12, 14, 19, 27, 35, 43, 46, 48, 49"),
    "z-image-15": _meancache("Z-Image", "0-3, 5, 7, 10, 12, 17, 25, 33, 41, 45, 48, 49"),
    "z-image-13": _meancache("Z-Image", "0-3, 5, 9, 15, 22, 29, 36, 43, 47, 49"),
    "lemica-qwen-image-17": Schedule(50, _steps("0-10, 15, 22, 29, 36, 42, 49"), f"{_LEMICA}, Qwen-Image"),
    "lemica-z-image-turbo-8": Schedule(10, _steps("0-3, 5, 7-9"), f"{_LEMICA}, Z-Image-Turbo"),
    "autohq-25": Schedule(
        50, _steps("0-9, 11, 13, 15, 17, 19, 21, 24, 28, 32, 36, 40, 44, 47-49"), "FlexCache's 'autohq', Qwen-Image"
    ),
    "velocity-21": Schedule(50, _steps("0-10, 12, 14, 16, 19, 22, 26, 33, 40, 46, 49"), _UNNAMED),
    "velocity-13": Schedule(50, _steps("0-6, 8, 10, 14, 23, 37, 49"), _UNNAMED),
    "velocity-9": Schedule(50, _steps("0-3, 5, 9, 17, 31, 49"), _UNNAMED),
}

#: The names that `schedule` may have: a published schedule, or a steps computation mask of the cache-dit project.
NAMES = (*PUBLISHED, *(f"scm-{policy}" for policy in POLICIES))


def named(name: str, steps: int, sigmas: Sequence[float] | None = None) -> Schedule:
    """The schedule `name`, adapted to a request of `steps` steps at the noise levels `sigmas`."""
    prefix, _, policy = name.partition("-")
    if prefix == "scm":
        mask = steps_mask(policy, steps)
        computed = tuple(step for step in range(steps) if mask is None or mask[step])
        return Schedule(steps, computed, f"steps computation mask {policy!r} of cache-dit")
    return fitted(PUBLISHED[name], steps, sigmas)


def even(steps: int, budget: int) -> Schedule:
    """`budget` computed steps, spread as evenly as possible.

    Args:
        steps: the number of steps of the request, at least 1.
        budget: as in `fitted`.
    """
    budget = _possible(budget, steps)
    computed = tuple(round(i * (steps - 1) / (budget - 1)) for i in range(budget)) if budget > 1 else (0,)
    return Schedule(steps, computed, "evenly spread")


def early(steps: int, budget: int) -> Schedule:
    """`budget` computed steps, denser at the beginning: the default for a model without a calibration.

    Errors of early steps grow. With many computed steps these are small, and evenly spread steps are as good.
    `python -m benchmarks.quality` compares both on requests of 50 steps of the embedded models. Requests of fewer than
    `LONG` steps are evenly spread.

    Args:
        steps, budget: as in `even`.
    """
    budget = _possible(budget, steps)
    full, none = FADES
    strength = min(max((none - budget) / (none - full), 0.0), 1.0)
    if not strength or steps < LONG:
        return even(steps, budget)
    return Schedule(steps, spaced([strength * one for one in EARLY], steps, budget), "denser at the beginning")


def spaced(density: Sequence[float], steps: int, budget: int) -> tuple[int, ...]:
    """Return computed steps with equal shares of a density between them. The first and the last step are computed.

    Args:
        density: logarithms of the density at `KNOTS`, interpolated linearly.
        steps: steps of the request.
        budget: number of computed steps, at most `steps`.
    """
    if steps == 1:
        return (0,)
    places = np.linspace(0.0, 1.0, 40 * steps)
    heights = np.exp(np.interp(places, KNOTS, density))
    shares = np.concatenate(([0.0], np.cumsum(heights[1:] + heights[:-1])))
    wanted = np.interp(np.linspace(0.0, 1.0, budget), shares / shares[-1], places) * (steps - 1)
    found = [0]
    for place, step in enumerate(wanted[1:-1], 1):
        found.append(min(max(round(float(step)), found[-1] + 1), steps - (budget - place)))
    return (*found, steps - 1)


def usual_reach(count: int) -> float:
    """How far forecasts extrapolate by default if `count` steps of a request are computed (`Chosen.reach`).

    With few computed steps, the gaps are so long that a line through the last two outputs overshoots. A calibration
    may find another reach for its schedule.
    """
    return min(max((count - 4) / 12, 0.25), 1.0)


def fitted(
    schedule: Schedule, steps: int, sigmas: Sequence[float] | None = None, budget: int | None = None
) -> Schedule:
    """Adapt a schedule to a request of `steps` steps, `budget` of them computed.

    The computed steps keep their positions in σ if the noise levels of both requests are known, otherwise their
    relative positions in the step index. With another budget, they are spread more or less densely in the same
    pattern; evenly spread ones stay so at the same noise levels.

    Args:
        schedule: the schedule to adapt.
        steps: the number of steps of the request, at least 1.
        sigmas: the noise levels of the request, one for each step; None if they are not known.
        budget: the number of computed steps; None for the same share as in `schedule`. It is limited to at least 2,
            for the first and the last step, and at most `steps`.
    """
    if budget is None:
        budget = round(len(schedule.computed) * steps / schedule.steps)
    budget = _possible(budget, steps)
    same_levels = schedule.sigmas is None or sigmas is None or _alike(schedule.sigmas, sigmas)
    same_steps = steps == schedule.steps and same_levels
    if same_steps and budget == len(schedule.computed):
        return schedule
    if schedule.sigmas is None or sigmas is None:
        levels = [-index / max(schedule.steps - 1, 1) for index in range(schedule.steps)]
        here: Sequence[float] = [-index / max(steps - 1, 1) for index in range(steps)]
    else:
        levels, here = list(schedule.sigmas), sigmas
    if same_steps and schedule.computed == even(steps, len(schedule.computed)).computed:
        computed = list(even(steps, budget).computed)
    else:
        computed = _at_levels([levels[step] for step in schedule.computed], here, budget)
    return Schedule(
        steps,
        tuple(computed),
        f"{schedule.origin}, made for {len(schedule.computed)} of {schedule.steps} steps, carried over to {budget} of "
        f"{steps}",
        None if sigmas is None else tuple(sigmas),
        reach=_carried(schedule.reach, len(schedule.computed), budget),
        corrector_order=schedule.corrector_order,
    )


def _at_levels(knots: Sequence[float], here: Sequence[float], budget: int) -> list[int]:
    """The steps nearest to `budget` noise levels that lie between `knots` as evenly as the knots themselves."""
    steps, computed = len(here), list[int]()
    for i in range(budget):
        level = _between(knots, i * (len(knots) - 1) / max(budget - 1, 1))
        nearest = min(range(steps), key=lambda step: abs(here[step] - level))
        lowest = computed[-1] + 1 if computed else 0
        computed.append(min(max(nearest, lowest), steps - (budget - i)))
    computed[0], computed[-1] = 0, steps - 1
    return computed


def _carried(reach: float | None, count: int, budget: int) -> float | None:
    """A reach that was found for `count` computed steps, for another number of them."""
    return None if reach is None else min(reach * usual_reach(budget) / usual_reach(count), 1.0)


def _possible(budget: int, steps: int) -> int:
    if steps < 1:
        raise ValueError(f"a schedule is of at least 1 step, not of {steps}")
    return min(max(budget, 2), steps)


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-4) for x, y in zip(a, b, strict=True))


def _between(knots: Sequence[float], place: float) -> float:
    """The value at position `place` between knots 0, 1, 2, ..., interpolated linearly; of one knot, its value."""
    low = max(min(int(place), len(knots) - 2), 0)
    if low + 1 == len(knots):
        return knots[low]
    return knots[low] + (knots[low + 1] - knots[low]) * (place - low)


# Schedules that were found for a model


def calibrated(found: Mapping[str, Any] | None) -> list[Schedule]:
    """The schedules of a calibration, as returned by `calibration.read`; an empty list for None."""
    if found is None:
        return []
    origin = f"calibrated on {found.get('model', 'an unnamed model')}"
    return [
        Schedule(
            row["steps"],
            tuple(row["computed"]),
            origin,
            sigmas=tuple(row["sigmas"]),
            psnr=float(row["psnr"]["mean"]),
            speedup=row.get("speedup"),
            reach=row.get("reach"),
            corrector_order=row.get("corrector_order"),
            low=row["psnr"].get("p5"),
            images=int(row["psnr"].get("images", 0)),
        )
        for row in found["schedules"]
    ]


def good_enough(candidates: Sequence[Schedule], quality: float) -> Schedule:
    """The schedule with the smallest share of computed steps whose mean PSNR is at least `quality` dB.

    Raises:
        ValueError: there is none, or none was measured.
    """
    measured = [one for one in candidates if one.psnr is not None]
    if not measured:
        raise ValueError("quality needs schedules whose quality was measured: run `omni calibrate schedule` first")
    best = max(measured, key=lambda one: one.psnr or 0.0)
    good = [one for one in measured if (one.psnr or 0.0) >= quality]
    if not good:
        raise ValueError(
            f"quality {quality:g} dB is more than any calibrated schedule reaches: the best has {best.psnr:.1f} dB, at "
            f"{len(best.computed)} of {best.steps} steps"
        )
    return min(good, key=lambda one: len(one.computed) / one.steps)


def fast_enough(candidates: Sequence[Schedule], steps: int, speedup: float) -> int:
    """The largest number of computed steps, of `steps`, at which a request is `speedup` times as fast as a full run.

    A request takes 1 − c·(1 − share of computed steps) of a full run's time. c is `saved_by_skipping`; if nothing was
    measured, c is 1.

    Raises:
        ValueError: by what was measured, even a request with only two computed steps would take longer.
    """
    if steps <= 2:  # none of them can be skipped
        return steps
    measured = saved_by_skipping(candidates)
    saved = 1.0 if measured is None else measured
    budget = int(steps * (1 - (1 - 1 / speedup) / saved) + 1e-6) if saved > 0 else 0
    if budget < 2 and measured is not None:
        fastest = 1 / (1 - saved * (1 - 2 / steps))
        raise ValueError(
            f"speedup {speedup:g} is more than skipping steps gives: with 2 of {steps} computed, {fastest:.1f} by what "
            "the calibration has measured"
        )
    return min(max(2, budget), steps)


def saved_by_skipping(candidates: Sequence[Schedule]) -> float | None:
    """The share of a full run's time that skipping all steps would save, fitted to the measured schedules.

    It is below 1 because the text encoder, the decoder and the skipped steps take time, too. None if nothing was
    measured.
    """
    measured = [(1 - len(one.computed) / one.steps, 1 - 1 / one.speedup) for one in candidates if one.speedup]
    squares = sum(skipped**2 for skipped, _ in measured)
    return min(sum(skipped * gained for skipped, gained in measured) / squares, 1.0) if squares else None


def nearest(candidates: Sequence[Schedule], steps: int, budget: int) -> Schedule | None:
    """The schedule whose number of computed steps is nearest to `budget`.

    Their number, and not their share, says how long the gaps are. Among equal ones, the one with the nearest number of
    steps; None if there are no candidates.
    """

    def distance(one: Schedule) -> tuple[float, float]:
        return abs(math.log(len(one.computed) / budget)), abs(math.log(one.steps / steps))

    return min(candidates, key=distance, default=None)
