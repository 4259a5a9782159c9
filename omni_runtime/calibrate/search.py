"""The search for a schedule: which steps to compute, so that the images stay nearest to those of full runs.

How well a schedule does is only seen by sampling with it: errors of the forecast change every later step. But what one
error does to the final latents can be measured, and to first order the errors of many add up. So the search has two
parts:

1. Full runs are recorded, and run again with one step forecast, for each step in turn: `Responses`. They predict what a
   schedule does without sampling with it, and `shape` finds the one of a smooth density that they favour.
2. Closed-loop, it samples with each candidate the same prompts and seeds as the full runs, and measures the pictures'
   PSNR against theirs, of 8 bits: on what nobody sees, a search would spend steps that other images need. It starts
   from that schedule, evenly spread steps and the published schedules, and goes on by local moves (`neighbour`): one
   computed step to an adjacent place, one to any free place, a stretch of them by one place; of several that are drawn,
   the one with the smallest predicted error.

A schedule replaces the best so far if its `score`, the mean of mean and 5th percentile over the images, is higher, and
if its gain, image by image, is larger than chance would make it (`better`). Where the images are few, their percentile
is the worst image alone, and the best of many tries is mostly the luckiest: a search that goes by the score alone ends
behind evenly spread steps on other images. For the same reason the predicted schedule comes first, and holds until
something is better. What does clearly worse on the first images is not sampled on the others (`hopeless`).

Given the same inputs and seed, the search takes the same way; sampled schedules are written down as they are measured,
so that a search that was interrupted, or is given more time, goes on where it was.
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

#: What an image that is identical to its reference counts with, in dB.
IDENTICAL = 100.0
#: How many standard errors a gain must have: with 1, chance makes a schedule that is no better pass in 1 of 6 tries.
MARGIN = 1.0
#: On how many images a schedule is sampled at least before it is given up.
FEWEST = 4
#: How often a single image is made in full and with each schedule that was found, to see how much faster it is.
ROUNDS = 3
#: How many local moves are drawn for each that is sampled.
DRAWS = 8
#: A density of computed steps has so many numbers, and they are moved by so much, in turn, in its logarithm.
KNOTS, STRIDES = 7, (0.8, 0.4, 0.2, 0.1)
#: Degree of the polynomial in the step that an error's growth in dB is smoothed by.
DEGREE = 3


class Responses:
    """What forecast errors do to the final latents, and from it the error of a schedule, to first order.

    Let e_j = v_j − forecast_j be the error of the model output at step j where step j alone is skipped. Every output is
    a sum of these and of v_0, whose share cancels in an error. Between computed steps b and c an Euler sampler picks up
    Σ_i (σ_{i+1} − σ_i)·(v_i − forecast_i) over the skipped steps i: a sum of the e_j, too; with a corrector, what it
    interpolates between b and c is what counts in the forecast's place. If r_j is what a unit of e_j
    changes in the final latents, which a run with only step j skipped shows, the schedule changes them by Σ_j κ_j·r_j,
    with the κ_j of all its gaps added up. Errors of one gap may cancel another's, so that the sum of their squares does
    not tell what a schedule does. What is made of e_j later than at step j grows less than r_j says: κ_j is multiplied
    by the ratio of both steps' growth |r_j| / |e_j|, its mean in dB over the images, smoothed by a polynomial.

    Args:
        changes: [images, steps − 2, steps − 2], inner products of what skipping step 1, 2, … changes in the final
            latents.
        errors: [images, steps − 2], squared norms of e_1, e_2, ….
        sigmas: noise levels of the steps, 3 at least, and of the end.
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
        # Row j: v_j as a sum of the errors, and in column 0 of v_0.
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
        """The forecast of a step's output: computed steps and the weights of theirs."""
        kept = list(computed[::-1][: self._forecaster.snapshots])
        by_step = self._forecaster.axis == "step"
        positions = [float(one) if by_step else self._sigmas[one] for one in kept]
        place = reached(positions, float(step) if by_step else self._sigmas[step], self._reach)
        return list(zip(kept, self._forecaster.weights(positions, place), strict=True))

    def _stands_in(self, computed: Sequence[int], c: int, step: int) -> list[tuple[int, float]]:
        """What a skipped step has moved the latents by, once the next computed step, c, has corrected it."""
        if not self._corrector_order:
            return self._weights(computed, step)
        kept = [c, *computed[::-1][: self._corrector_order]]
        return list(zip(kept, newton([self._sigmas[one] for one in kept], self._sigmas[step]), strict=True))

    def _gap(self, computed: tuple[int, ...], c: int) -> np.ndarray:
        """κ of the steps that are skipped between the last of `computed`, the newest that are remembered, and c."""
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
        """Squared error of the final latents, of each image."""
        total = np.zeros(self._steps - 2)
        for place, (b, c) in enumerate(itertools.pairwise(computed)):
            if c > b + 1:
                total += self._gap(tuple(computed[max(0, place + 1 - self._remembered) : place + 1]), c)
        return self._products @ total @ total

    def cost(self, budget: int) -> Callable[[Sequence[int]], float]:
        """How far a schedule's error is above that of evenly spread steps, in dB, on average over the images."""
        tiny = np.finfo(float).tiny
        spread = np.maximum(self.predict(even(self._steps, budget).computed), tiny)
        return lambda computed: float(10 * np.log10(np.maximum(self.predict(computed), tiny) / spread).mean())


def spaced(density: Sequence[float], steps: int, budget: int) -> tuple[int, ...]:
    """Computed steps with equal shares of a density between them; the first and the last are computed.

    Args:
        density: its logarithm at places that are evenly spread over the steps, and linear in between.
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
    """The schedule with the lowest cost among those of a smooth density, from evenly spread steps downhill.

    A density of `KNOTS` numbers cannot learn a few images by heart, as the places of all computed steps do: on other
    images those that a descent by single steps ends at are behind evenly spread ones.
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
    """What is maximised: the mean of the images' mean PSNR and its 5th percentile, in dB."""
    values = np.minimum(np.asarray(psnr, np.float64), IDENTICAL)
    return float(values.mean() + np.percentile(values, 5)) / 2


def neighbour(computed: Sequence[int], steps: int, rng: random.Random) -> tuple[int, ...]:
    """A schedule that differs by one random move; the first and the last step stay computed."""
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
    """A schedule that was sampled, and the PSNR of each of its images in dB: of the first ones, if it was given up."""

    computed: tuple[int, ...]
    psnr: tuple[float, ...]

    @property
    def score(self) -> float:
        """See `score`."""
        return score(self.psnr)


def gain(psnr: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of what images gain over their own PSNR in `best`, of which there may be more; in dB."""
    gains = np.asarray(psnr, np.float64) - np.asarray(best[: len(psnr)], np.float64)
    error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return float(gains.mean()), float(error)


def better(tried: Tried, best: Tried) -> bool:
    """Whether the score is higher, and the mean gain more than `MARGIN` standard errors."""
    mean, error = gain(tried.psnr, best.psnr)
    return len(tried.psnr) == len(best.psnr) and tried.score > best.score and mean > MARGIN * error


def hopeless(psnr: Sequence[float], best: Tried) -> bool:
    """Whether the first images lose so much that the others need not be sampled."""
    mean, error = gain(psnr, best.psnr)
    return len(psnr) >= FEWEST and mean < -MARGIN * error


@dataclass
class Search:
    """One budget's search.

    Attributes:
        start: what was best before any move.
        trail: the best schedule after each sampled one.
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
    """Climb from the best of `starts` by random local moves, each kept if it is `better`.

    Args:
        starts: schedules of one budget; the first and the last step computed. The first one holds until one is better.
        sample: samples with a schedule and measures it, given the best so far; may give up what is `hopeless`.
        tries: how many schedules are sampled at most.
        patience: after so many moves in a row that were no better, it ends.
        cost: what is predicted of a schedule; of the moves that are drawn, the one with the lowest is sampled.
        on_try: told of each sampled schedule: its number from 1, itself, and the best so far.
    """
    seen: dict[tuple[int, ...], Tried] = {}
    found: Search | None = None

    def meet(computed: tuple[int, ...]) -> bool:
        """Sample it, unless that was done; True if it is the best so far."""
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
    """Computed steps of all images of a whole search, at most. Each is one transformer call, or two with guidance."""
    # Searched images: in full twice, and again from each skipped step's snapshots on.
    responses = steps + sum(steps - step + 2 for step in range(1, steps - 1))
    # Held-out images: in full, then with the schedule found, evenly spread steps, and plain sampling.
    timed = steps + ROUNDS * (steps + sum(budgets))  # one image, once before
    return images * (steps + responses) + held_out * steps + sum(budgets) * (tries * images + 3 * held_out) + timed
