"""The search for a schedule: which steps to compute, so that the images stay as near as possible to full runs.

Only sampling shows how good a schedule is, because a forecast's error changes every later step. But the effect of one
error on the final latents can be measured, and to first order the effects of several errors add up. So the search has
two parts:

1. Record full runs, then run each again with a single step forecast, for each step in turn: `Responses`. They predict
   a schedule's error without sampling with it. `shape` finds the schedule with a smooth density that they favour.
2. Sample with each candidate schedule on the prompts and seeds of the full runs, and measure the PSNR of the 8-bit
   pictures. (With finer values, the search would spend steps on differences that are invisible.) The search starts from
   the schedule of part 1, evenly spread steps and the published schedules. It continues with local moves (`neighbour`):
   one computed step to an adjacent place or to any free place, or a stretch of computed steps by one place. Of several
   random moves, it samples the one with the smallest predicted error.

A schedule replaces the best so far if its `score` is higher (the mean of the images' mean and 5th percentile), and if
its gain, image by image, is larger than chance explains (`better`). With few images, the percentile is nearly the worst
image alone, and the best of many tries is mostly the luckiest one: a search by the score alone ends behind evenly
spread steps on other images. For the same reason the predicted schedule comes first, and stays until another one is
better. A schedule that is clearly worse on the first images is not sampled on the others (`hopeless`).

The same inputs and seed give the same search. Sampled schedules are written to a file as they are measured, so an
interrupted search, or one with more tries, continues where it stopped.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from omni_runtime.cache.forecasters import Forecaster, newton
from omni_runtime.cache.output import reached
from omni_runtime.cache.schedules import even

#: The PSNR in dB that an image counts with if it is identical to its reference.
IDENTICAL = 100.0
#: How many standard errors a gain must have. With 1, a schedule that is no better passes by chance in 1 of 6 tries.
MARGIN = 1.0
#: The smallest number of images that a schedule is sampled on before it is given up.
FEWEST = 4
#: How often a single image is made in full and with each found schedule, to measure the speedup.
ROUNDS = 3
#: How many random local moves are drawn for each schedule that is sampled.
DRAWS = 8
#: The number of values of a density of computed steps, and the sizes of their moves, in its logarithm.
KNOTS, STRIDES = 7, (0.8, 0.4, 0.2, 0.1)
#: Degree of the polynomial in the step that smooths an error's growth in dB.
DEGREE = 3


class Responses:
    """Predicts a schedule's error in the final latents, to first order, from the measured effects of single errors.

    Let e_j = v_j − forecast_j be the error of the model output at step j if step j alone is skipped. Every output is a
    sum of these errors and of v_0, whose share cancels in an error. Between computed steps b and c, an Euler sampler
    adds up Σ_i (σ_{i+1} − σ_i)·(v_i − forecast_i) over the skipped steps i. This is a sum of the e_j, too. With a
    corrector, its interpolation between b and c replaces the forecast.

    Let r_j be the change of the final latents for a unit of e_j, measured in a run with only step j skipped. The
    schedule then changes the final latents by Σ_j κ_j·r_j, where κ_j is summed over all gaps. The errors of two gaps
    may cancel, so a sum of their squares would be wrong. An e_j that enters later than at step j grows less than r_j.
    So κ_j is multiplied by the ratio of the two steps' growth |r_j| / |e_j|: the mean in dB over the images, smoothed
    by a polynomial.

    Args:
        changes: [images, steps − 2, steps − 2], inner products of the changes of the final latents when step 1, 2, …
            is skipped.
        errors: [images, steps − 2], squared norms of e_1, e_2, ….
        sigmas: noise levels of the steps (at least 3) and of the end.
        forecaster, reach, corrector_order: as in `omni_runtime.cache.output.OutputSite`.
    """

    def __init__(
        self,
        changes: np.ndarray,
        errors: np.ndarray,
        sigmas: Sequence[float],
        forecaster: Forecaster,
        reach: float,
        corrector_order: int = 0,
    ) -> None:
        self._sigmas, self._forecaster, self._reach = sigmas, forecaster, reach
        self._corrector_order = corrector_order
        self._remembered = max(forecaster.snapshots, corrector_order)
        self._steps = len(sigmas) - 1
        self._lengths = np.diff(sigmas)
        lengths = self._lengths[1:-1]
        self._products = changes / np.outer(lengths, lengths)
        # Row j: v_j as a weighted sum of the errors; column 0 is the weight of v_0.
        self._outputs = np.eye(self._steps)
        for step in range(1, self._steps):
            for kept, weight in self._weights(range(step), step):
                self._outputs[step] += weight * self._outputs[kept]
        growth = np.einsum("njj->nj", self._products) / np.maximum(errors, np.finfo(float).tiny)
        decibels = 10 * np.log10(np.maximum(growth, np.finfo(float).tiny)).mean(0)
        at = np.arange(1, self._steps - 1)
        self._growth = np.poly1d(np.polyfit(at, decibels, min(DEGREE, len(at) - 1)))
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def _weights(self, computed: Sequence[int], step: int) -> list[tuple[int, float]]:
        """Return the forecast of a step's output, as pairs of a computed step and its output's weight."""
        kept = list(computed[::-1][: self._forecaster.snapshots])
        by_step = self._forecaster.axis == "step"
        positions = [float(one) if by_step else self._sigmas[one] for one in kept]
        place = reached(positions, float(step) if by_step else self._sigmas[step], self._reach)
        return list(zip(kept, self._forecaster.weights(positions, place), strict=True))

    def _stands_in(self, computed: Sequence[int], c: int, step: int) -> list[tuple[int, float]]:
        """Return the output that stands in for a skipped step after the next computed step, c, has corrected it."""
        if not self._corrector_order:
            return self._weights(computed, step)
        kept = [c, *computed[::-1][: self._corrector_order]]
        return list(zip(kept, newton([self._sigmas[one] for one in kept], self._sigmas[step]), strict=True))

    def _gap(self, computed: tuple[int, ...], c: int) -> np.ndarray:
        """Return κ of the skipped steps between the last of `computed` (the newest remembered steps) and c."""
        key = (*computed, c)
        if key not in self._known:
            error = np.zeros(self._steps)
            for step in range(computed[-1] + 1, c):
                error[step] += self._lengths[step]
                for kept, weight in self._stands_in(computed, c, step):
                    error[kept] -= self._lengths[step] * weight
            middle, at = min((computed[-1] + c) / 2, self._steps - 2), np.arange(1, self._steps - 1)
            later = 10 ** ((self._growth(middle) - self._growth(at)) / 20)
            self._known[key] = (error @ self._outputs)[1:-1] * later
        return self._known[key]

    def predict(self, computed: Sequence[int]) -> np.ndarray:
        """Return the predicted squared error of each image's final latents."""
        total = np.zeros(self._steps - 2)
        for place, (b, c) in enumerate(itertools.pairwise(computed)):
            if c > b + 1:
                total += self._gap(tuple(computed[max(0, place + 1 - self._remembered) : place + 1]), c)
        return self._products @ total @ total

    def cost(self, budget: int) -> Callable[[Sequence[int]], float]:
        """Return a function: schedule → its predicted error over that of evenly spread steps, in dB, mean of images."""
        tiny = np.finfo(float).tiny
        spread = np.maximum(self.predict(even(self._steps, budget).computed), tiny)
        return lambda computed: float(10 * np.log10(np.maximum(self.predict(computed), tiny) / spread).mean())


def spaced(density: Sequence[float], steps: int, budget: int) -> tuple[int, ...]:
    """Return computed steps with equal shares of a density between them. The first and the last step are computed.

    Args:
        density: logarithms of the density at evenly spread places, interpolated linearly.
        steps: steps of the request.
        budget: number of computed steps.
    """
    places = np.linspace(0.0, 1.0, 8 * steps)
    heights = np.exp(np.interp(places, np.linspace(0.0, 1.0, len(density)), density))
    shares = np.concatenate(([0.0], np.cumsum(heights[1:] + heights[:-1])))
    wanted = np.interp(np.linspace(0.0, 1.0, budget), shares / shares[-1], places) * (steps - 1)
    found = [0]
    for place, step in enumerate(wanted[1:-1], 1):
        found.append(min(max(round(float(step)), found[-1] + 1), steps - (budget - place)))
    return (*found, steps - 1)


def shape(cost: Callable[[Sequence[int]], float], steps: int, budget: int) -> tuple[int, ...]:
    """Find a low-cost schedule with a smooth density, by a descent that starts from evenly spread steps.

    A density of only `KNOTS` numbers does not overfit a few images. A descent over single steps does: on other images
    its schedules are behind evenly spread steps.
    """
    density = [0.0] * KNOTS
    best = spaced(density, steps, budget)
    lowest = cost(best)
    for by in STRIDES:
        stuck = False
        while not stuck:
            stuck = True
            for knot, sign in itertools.product(range(KNOTS), (by, -by)):
                moved = [*density[:knot], density[knot] + sign, *density[knot + 1 :]]
                found = spaced(moved, steps, budget)
                value = cost(found)
                if value < lowest:
                    density, best, lowest, stuck = moved, found, value, False
    return best


def score(psnr: Sequence[float]) -> float:
    """Return the value that the search maximises: the mean of the images' mean PSNR and 5th percentile, in dB."""
    values = np.minimum(np.asarray(psnr, np.float64), IDENTICAL)
    return float(values.mean() + np.percentile(values, 5)) / 2


def neighbour(computed: Sequence[int], steps: int, rng: random.Random) -> tuple[int, ...]:
    """Return the schedule after one random move. The first and the last step stay computed."""
    inner = list(computed[1:-1])
    kind = rng.random()
    if kind < 0.5:
        first = last = rng.randrange(len(inner))
    else:
        first = rng.randrange(len(inner))
        last = rng.randrange(first, len(inner))
    if kind < 0.8:
        by = rng.choice((-1, 1))
        inner[first : last + 1] = [step + by for step in inner[first : last + 1]]
    else:
        free = sorted(set(range(1, steps - 1)) - set(inner))
        inner[first] = rng.choice(free) if free else inner[first]
    found = tuple(sorted({0, steps - 1, *inner}))
    legal = len(found) == len(computed) and found[0] == 0 and found[-1] == steps - 1
    return found if legal else tuple(computed)


@dataclass(frozen=True)
class Tried:
    """A sampled schedule and the PSNR of each image in dB; only of the first images if the schedule was given up."""

    computed: tuple[int, ...]
    psnr: tuple[float, ...]

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


def better(tried: Tried, best: Tried) -> bool:
    """Whether `tried` has a higher score than `best`, and a mean gain of more than `MARGIN` standard errors."""
    mean, error = gain(tried.psnr, best.psnr)
    return len(tried.psnr) == len(best.psnr) and tried.score > best.score and mean > MARGIN * error


def hopeless(psnr: Sequence[float], best: Tried) -> bool:
    """Whether the first images are so much worse that the others need not be sampled."""
    mean, error = gain(psnr, best.psnr)
    return len(psnr) >= FEWEST and mean < -MARGIN * error


@dataclass
class Search:
    """The result of one budget's search.

    Attributes:
        start: the best schedule before any move.
        best: the best schedule.
        trail: the best schedule so far, after each sampled one.
    """

    start: Tried
    best: Tried
    trail: list[Tried] = field(default_factory=list)


def search(
    starts: Iterable[Sequence[int]],
    steps: int,
    sample: Callable[[tuple[int, ...], Tried | None], Tried],
    tries: int,
    patience: int,
    seed: int = 0,
    cost: Callable[[Sequence[int]], float] = lambda computed: 0.0,
    on_try: Callable[[int, Tried, Tried], None] = lambda number, tried, best: None,
) -> Search:
    """Climb from the best of `starts` by random local moves. A move is kept if it is `better`.

    Args:
        starts: schedules of one budget, with the first and the last step computed. The first schedule is the best until
            another one is `better`.
        steps: steps of the request.
        sample: samples with a schedule and measures it; its second argument is the best so far. It may give up a
            `hopeless` schedule.
        tries: the largest number of schedules to sample.
        patience: the search ends after this many moves in a row without an improvement.
        seed: seed of the random moves.
        cost: the predicted cost of a schedule. Of the drawn moves, the one with the lowest cost is sampled.
        on_try: called after each sampled schedule with its number from 1, the schedule, and the best so far.

    Raises:
        ValueError: `starts` is empty.
    """
    seen: dict[tuple[int, ...], Tried] = {}
    found: Search | None = None

    def meet(computed: tuple[int, ...]) -> bool:
        """Sample a schedule unless that was done already. Return True if it is now the best so far."""
        nonlocal found
        if computed in seen:
            return False
        tried = seen[computed] = sample(computed, None if found is None else found.best)
        if found is None:
            found = Search(tried, tried)
        elif better(tried, found.best):
            found.best = tried
        found.trail.append(found.best)
        on_try(len(seen), tried, found.best)
        return found.best is tried

    for start in starts:
        meet(tuple(start))
    if found is None:
        raise ValueError("a search needs a schedule to start from")
    found.start = found.best
    budget = len(found.best.computed)
    if 2 < budget < steps:
        rng, failed, stuck = random.Random(seed), 0, 0
        while len(seen) < tries and failed < patience and stuck < 1000:
            drawn = [neighbour(found.best.computed, steps, rng) for _ in range(DRAWS)]
            fresh = [one for one in drawn if one not in seen]
            stuck = 0 if fresh else stuck + 1
            if fresh:
                failed = 0 if meet(min(fresh, key=cost)) else failed + 1
    return found


def most_steps(budgets: Sequence[int], tries: int, images: int, held_out: int, steps: int) -> int:
    """Return the largest number of computed steps of a whole search, summed over all images.

    Each computed step is one transformer call, or two with guidance.
    """
    # Searched images: in full twice, then once per skipped step, from that step's snapshots on.
    responses = steps + sum(steps - step + 2 for step in range(1, steps - 1))
    # Held-out images: in full, then with the found schedule, evenly spread steps, and plain sampling.
    timed = steps + ROUNDS * (steps + sum(budgets))  # timing of one image, with one run as warm-up
    return images * (steps + responses) + held_out * steps + sum(budgets) * (tries * images + 3 * held_out) + timed
