"""The search for a schedule: which steps to compute, so that the images stay nearest to those of full runs.

How well a schedule does is only seen by sampling with it: errors of the forecast change every later step, and what
recorded outputs predict of a schedule is not what it does (see `analytic`). So the search is closed-loop. It samples
with each candidate the same prompts and seeds as the full runs, and measures the images' PSNR against theirs.

1. Full runs are recorded: their images, and how the model outputs of their steps relate (`Gram`).
2. Starting points: evenly spread steps, then the published schedules and `analytic` ones.
3. Local moves (`neighbour`): one computed step to an adjacent place, one to any free place, a stretch of them by one
   place.

A schedule replaces the best so far if its `score`, the mean of mean and 5th percentile over the images, is higher, and
if its gain, image by image, is larger than chance would make it (`better`). Where the images are few, their percentile
is the worst image alone, and the best of many tries is mostly the luckiest: a search that goes by the score alone ends
behind evenly spread steps on other images. For the same reason evenly spread steps come first, and hold until
something is better. What does clearly worse on the first images is not sampled on the others (`hopeless`).

Given the same inputs and seed, the search takes the same way; sampled schedules are written down as they are measured,
so that a search that was interrupted, or is given more time, goes on where it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from omni_runtime.cache.forecasters import Forecaster
from omni_runtime.cache.output import reached

#: What an image that is identical to its reference counts with, in dB.
IDENTICAL = 100.0
#: Weights of early errors that are tried: each squared error counts with σ to this power.
SENSITIVITIES = (0.0, 1.0, 2.0)
#: How many standard errors a gain must have: with 1, chance makes a schedule that is no better pass in 1 of 6 tries.
MARGIN = 1.0
#: On how many images a schedule is sampled at least before it is given up.
FEWEST = 4
#: How far apart computed steps may lie in an analytic schedule.
LONGEST_GAP = 16


class Gram:
    """Inner products of the model outputs of a request's steps, of one sample: all that `analytic` needs of them.

    Add the outputs in order; [N, N] in float64.
    """

    def __init__(self) -> None:
        self._outputs: list[torch.Tensor] = []

    def add(self, output: torch.Tensor) -> None:
        """The model output of the next step, [...]."""
        self._outputs.append(output.detach().flatten().double())

    def matrix(self) -> np.ndarray:
        """The inner products; the outputs are dropped."""
        stacked = torch.stack(self._outputs)
        self._outputs = []
        return (stacked @ stacked.T).cpu().numpy()


def analytic(
    grams: Sequence[np.ndarray],
    sigmas: Sequence[float],
    budget: int,
    forecaster: Forecaster,
    reach: float,
    sensitivity: float = 0.0,
) -> tuple[int, ...]:
    """The schedule with the smallest integrated error of the recorded model outputs, by dynamic programming.

    Where steps a < b < c are computed and none between b and c, an Euler sampler arrives at c with the error
    Σ_i (σ_{i+1} − σ_i)·(v_i − forecast_i) over the skipped steps i, where the forecast is that from the outputs v_b and
    v_a. The cost of a schedule is the sum of these errors' squared norms, each times σ_b^sensitivity, averaged over the
    samples. The path of lowest cost through the states (a, b), with `budget` computed steps, is found exactly. It knows
    nothing of how an early error changes later outputs; `sensitivity` stands in for that.

    Args:
        grams: one per sample, see `Gram`.
        sigmas: noise levels of the steps and of the end, N + 1 of them.
    """
    steps = len(sigmas) - 1
    gram = np.mean(np.stack(grams), axis=0)
    costs: dict[tuple[int | None, int, int], float] = {}

    def cost(a: int | None, b: int, c: int) -> float:
        if (a, b, c) not in costs:
            costs[a, b, c] = gap(a, b, c)
        return costs[a, b, c]

    def gap(a: int | None, b: int, c: int) -> float:
        error = np.zeros(steps)
        kept = [b] if a is None else [b, a][: forecaster.snapshots]
        positions = [_position(forecaster, sigmas, step) for step in kept]
        for i in range(b + 1, c):
            length = sigmas[i + 1] - sigmas[i]
            error[i] += length
            place = reached(positions, _position(forecaster, sigmas, i), reach)
            for step, weight in zip(kept, forecaster.weights(positions, place), strict=True):
                error[step] -= length * weight
        return float(error @ gram @ error) * sigmas[b] ** sensitivity

    best: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {(None, 0): (0.0, (0,))}
    for count in range(2, budget + 1):
        reached_now: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {}
        for (a, b), (so_far, path) in best.items():
            last = min(steps - 1, b + max(LONGEST_GAP, -(-steps // budget) + 1))
            for c in range(b + 1, last + 1):
                if steps - 1 - c < budget - count or (count == budget and c != steps - 1):
                    continue
                total = so_far + cost(a, b, c)
                if (b, c) not in reached_now or total < reached_now[b, c][0]:
                    reached_now[b, c] = total, (*path, c)
        best = reached_now
    return min(best.values())[1]


def _position(forecaster: Forecaster, sigmas: Sequence[float], step: int) -> float:
    return float(step) if forecaster.axis == "step" else sigmas[step]


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
    on_try: Callable[[int, Tried, Tried], None] = lambda number, tried, best: None,
) -> Search:
    """Climb from the best of `starts` by random local moves, each kept if it is `better`.

    Args:
        starts: schedules of one budget; the first and the last step computed. The first one holds until one is better.
        sample: samples with a schedule and measures it, given the best so far; may give up what is `hopeless`.
        tries: how many schedules are sampled at most.
        patience: after so many moves in a row that were no better, it ends.
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
            candidate = neighbour(found.best.computed, steps, rng)
            stuck = stuck + 1 if candidate in seen else 0
            if candidate not in seen:
                failed = 0 if meet(candidate) else failed + 1
    return found


def most_steps(budgets: Sequence[int], tries: int, images: int, held_out: int, steps: int) -> int:
    """Computed steps of all images of a whole search, at most. Each is one transformer call, or two with guidance."""
    # Held-out images: in full, then with the schedule found, evenly spread steps, and plain sampling.
    return (images + held_out) * steps + sum(budgets) * (tries * images + 3 * held_out)
