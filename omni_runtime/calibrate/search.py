"""The search for a schedule: which steps to compute, so that the images stay as near as possible to full runs.

Only sampling shows how good a schedule is, because a forecast's error changes every later step. So each candidate is
sampled with on the prompts and seeds of full runs, and the PSNR of the 8-bit pictures is measured. (With finer values,
the search would spend steps on differences that are invisible.)

1. Evenly spread steps and the default schedule (`schedules.early`) are sampled with. How skipped steps are forecast is
   chosen with the better of them: `forecasts` lists what is tried.
2. A schedule is described by a density of computed steps with six numbers (`schedules.spaced`). CMA-ES (Hansen 2016,
   arXiv:1604.00772, the package `cma`) searches the density, from the default schedule's or from the density that was
   found for another number of computed steps. It maximises `score`: the mean of the images' mean and 5th percentile.
   Few numbers matter: a search over single steps fits the few images that it sees, and ends behind evenly spread steps
   on others.
3. The best of the search are sampled with on held-out images, and so are evenly spread steps and the default schedule.
   The better of these two is the result, unless another schedule is clearly `better`, there and on the searched images:
   a higher score, and a gain that chance does not explain, image by image.

The same inputs and seed give the same search. Sampled schedules are written to a file as they are measured, so an
interrupted search, or one with more tries, continues where it stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from omni_runtime.cache.output import CORRECTOR_ORDER
from omni_runtime.cache.schedules import EARLY, early, even, spaced, usual_reach

#: The PSNR in dB that an image counts with if it is identical to its reference.
IDENTICAL = 100.0
#: How many standard errors a gain must have. With 1, a schedule that is no better passes by chance in 1 of 6 tries.
MARGIN = 1.0
#: The same for a schedule that is taken instead of evenly spread steps: 1 of 40 passes by chance.
CLEAR = 2.0
#: The smallest number of images that a schedule is sampled on before it is given up.
FEWEST = 4
#: The first step size of the search, in the density's logarithm; the second from a density that was found already.
STRIDES = (0.4, 0.25)
#: Schedules of one generation of the search.
POPULATION = 8
#: How many of the best schedules are sampled with on the held-out images.
FINALISTS = 3


class Forecast(NamedTuple):
    """How skipped steps are forecast, as the keys of `velocity_cache`."""

    reach: float
    corrector_order: int


def forecasts(budget: int) -> list[Forecast]:
    """The forecasts that are tried for a number of computed steps; the first is the default."""
    usual = usual_reach(budget)
    reaches = dict.fromkeys([usual, usual / 2, min(2 * usual, 1.0)])
    return [Forecast(reach, order) for order in (CORRECTOR_ORDER, 3) for reach in reaches]


def score(psnr: Sequence[float]) -> float:
    """Return the value that the search maximises: the mean of the images' mean PSNR and 5th percentile, in dB."""
    values = np.minimum(np.asarray(psnr, np.float64), IDENTICAL)
    return float(values.mean() + np.percentile(values, 5)) / 2


@dataclass(frozen=True)
class Tried:
    """A sampled schedule and the PSNR of each image in dB; only of the first images if the schedule was given up."""

    computed: tuple[int, ...]
    psnr: tuple[float, ...]
    forecast: Forecast | None = None

    @property
    def score(self) -> float:
        """See `score`."""
        return score(self.psnr)


def gain(psnr: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """Return the mean and standard error of the images' gains over `best`, in dB. `best` may have more images."""
    if not psnr:
        return 0.0, 0.0
    gains = np.asarray(psnr, np.float64) - np.asarray(best[: len(psnr)], np.float64)
    error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return float(gains.mean()), float(error)


def better(tried: Tried, best: Tried, margin: float = MARGIN) -> bool:
    """Whether `tried` has a higher score than `best`, and a mean gain of more than `margin` standard errors."""
    mean, error = gain(tried.psnr, best.psnr)
    return len(tried.psnr) == len(best.psnr) and tried.score > best.score and mean > margin * error


def hopeless(psnr: Sequence[float], best: Tried) -> bool:
    """Whether the first images are so much worse that the others need not be sampled."""
    mean, error = gain(psnr, best.psnr)
    return len(psnr) >= FEWEST and mean < -3 * MARGIN * error


#: Samples with computed steps and a forecast. The last argument is a result that a hopeless schedule may be given up
#: against; None: it is sampled on all images.
Sample = Callable[[tuple[int, ...], Forecast, Tried | None], Tried]


@dataclass
class Search:
    """One budget's search on the searched images.

    Attributes:
        even, early: evenly spread steps and the default schedule, with the default forecast.
        forecast: the chosen forecast.
        density: where the search has ended: the logarithms of the density at `KNOTS`.
        trail: the best schedule so far, after each sampled one.
        finalists: the best schedules, the best first; then what of `even`, `early` and the one with the chosen forecast
            is not among them.
    """

    even: Tried
    early: Tried
    forecast: Forecast
    density: tuple[float, ...]
    trail: list[Tried] = field(default_factory=list)
    finalists: list[Tried] = field(default_factory=list)


def search(
    steps: int,
    budget: int,
    sample: Sample,
    tries: int,
    density: Sequence[float] | None = None,
    seed: int = 0,
    on_try: Callable[[int, Tried, Tried], None] = lambda number, tried, best: None,
) -> Search:
    """Search a forecast and a density of computed steps.

    Args:
        steps: steps of the request.
        budget: number of computed steps.
        sample: samples with a schedule and measures it.
        tries: the largest number of schedules to sample, after the forecast is chosen. With fewer than `POPULATION`,
            only the forecast is chosen.
        density: the density to start from; None: the default schedule's.
        seed: seed of the search.
        on_try: called after each sampled schedule with its number from 1, the schedule, and the best so far.
    """
    trail: list[Tried] = []
    seen: dict[tuple[int, ...], Tried] = {}

    def meet(computed: tuple[int, ...], forecast: Forecast) -> Tried:
        best = max(trail, key=lambda one: one.score) if trail else None
        tried = sample(computed, forecast, best)
        now = tried if best is None or (len(tried.psnr) == len(best.psnr) and tried.score > best.score) else best
        trail.append(now)
        on_try(len(trail), tried, now)
        return tried

    def whole(one: Tried) -> bool:
        return len(one.psnr) == len(spread.psnr)

    first, *others = forecasts(budget)
    spread = meet(even(steps, budget).computed, first)
    if not 2 < budget < steps:
        return Search(spread, spread, first, EARLY, trail, [spread])
    usual = early(steps, budget).computed
    default = spread if usual == spread.computed else meet(usual, first)
    chosen, forecast = max(filter(whole, (spread, default)), key=lambda one: one.score), first
    for one in others:
        tried = meet(chosen.computed, one)
        if better(tried, chosen):
            chosen, forecast = tried, one
    seen[chosen.computed] = chosen

    def value(one: Sequence[float]) -> float:
        computed = spaced(one, steps, budget)
        if computed not in seen:
            seen[computed] = meet(computed, forecast)
        return seen[computed].score

    ended = _climb(value, tuple(density or EARLY), tries, seed, STRIDES[density is not None])
    value(ended)
    complete = [one for one in seen.values() if len(one.psnr) == len(spread.psnr)]
    finalists = sorted(complete, key=lambda one: -one.score)[:FINALISTS]
    finalists += [
        one for one in (chosen, default, spread) if one not in finalists and len(one.psnr) == len(spread.psnr)
    ]
    return Search(spread, default, forecast, ended, trail, finalists)


def _climb(
    value: Callable[[Sequence[float]], float], start: tuple[float, ...], tries: int, seed: int, stride: float
) -> tuple[float, ...]:
    """Maximise `value` by CMA-ES from `start`; returns the mean of the last generation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it cannot plot
        import cma

    generator = np.random.default_rng(seed)
    options = {
        "popsize": POPULATION,
        "maxfevals": tries,
        "randn": lambda *shape: generator.standard_normal(shape),
        "seed": math.nan,  # the global generator stays as it is
        "verbose": -9,
        "verb_log": 0,
    }
    climber = cma.CMAEvolutionStrategy(list(start), stride, options)
    while climber.countevals + POPULATION <= tries and not climber.stop():
        densities = climber.ask()
        climber.tell(densities, [-value(one) for one in densities])
    return tuple(float(one) for one in climber.mean)


def most_steps(budgets: Sequence[int], tries: int, images: int, held_out: int, steps: int, rounds: int) -> int:
    """Return the largest number of computed steps of a whole search, summed over all images.

    Each computed step is one transformer call, or two with guidance.
    """
    sampled = sum(budget * (images * (len(forecasts(budget)) + 1 + tries + 1)) for budget in budgets)
    # Held-out images: the finalists, the chosen start, the default, evenly spread steps, and plain sampling.
    measured = held_out * sum(budgets) * (FINALISTS + 4)
    timed = steps + rounds * (steps * len(budgets) + sum(budgets))  # one image, with one run as warm-up
    return (images + held_out) * steps + sampled + measured + timed
