"""Schedules for one model: record full runs, search a schedule for each budget, and measure it on other images.

The search itself is in `omni_runtime.calibrate.search`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from omni_runtime.cache.schedulers import draws_noise
from omni_runtime.calibrate.images import Images
from omni_runtime.calibrate.journal import Journal
from omni_runtime.calibrate.plot import LEFT, RIGHT, WIDTH, axes
from omni_runtime.calibrate.search import CLEAR, Search, Tried, better, forecasts, score, search
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import jsonable

TRIES, BATCH = 32, 8


class Event(NamedTuple):
    """Progress of a search: a schedule has been sampled.

    Attributes:
        budget: number of computed steps.
        number, tries: the number of the sampled schedule, and the largest number that there can be.
        tried, best: the sampled schedule, and the best so far.
        seconds_left: for all budgets' searches, if none ends early.
    """

    budget: int
    number: int
    tries: int
    tried: Tried
    best: Tried
    seconds_left: float


#: Fewer held-out images than this say little about a schedule.
FEW = 4


@dataclasses.dataclass
class Found:
    """One budget's result.

    Attributes:
        searched: the search.
        best: the schedule that the calibration gives, on the searched images.
        held_out: the same, on the held-out images.
        plain: plain sampling with as many steps, on the held-out images.
        even, early: evenly spread steps and the default schedule, with the default forecast, on the held-out images.
        seconds: the time that sampling took.
        speedup: the full run's time divided by the schedule's time, for a single image; None if the times disagree.
    """

    searched: Search
    best: Tried
    held_out: Tried
    plain: Tried
    even: Tried
    early: Tried
    seconds: float
    speedup: float | None = None


def choose(searched: Search, measure: Callable[[Tried], Tried]) -> tuple[Tried, Tried, Tried]:
    """Choose between the best of a search, the default schedule and evenly spread steps.

    The last two were known before, so nothing was fitted to these images. The default is chosen of them if it is not
    worse on the held-out images, in the mean and in the 5th percentile. Another schedule must be clearly better than it
    on the searched and on the held-out images, and its 5th percentile must not be lower on the latter. One of both is
    not enough: the search has fitted the first, and the second also choose among the finalists.

    Args:
        searched: the search.
        measure: samples with a schedule on all held-out images.

    Returns:
        The chosen schedule on the searched and on the held-out images, and evenly spread steps on the held-out images.
    """
    spread, usual = measure(searched.even), measure(searched.early)
    base, known = searched.even, spread
    whole = len(searched.early.psnr) == len(searched.even.psnr)  # it was not given up
    if whole and np.mean(usual.psnr) >= np.mean(spread.psnr) and _low(usual) >= _low(spread):
        base, known = searched.early, usual
    best, there = base, known
    for one in searched.finalists:
        measured = measure(one)
        clearly = better(one, base, CLEAR) and better(measured, known, CLEAR)
        if clearly and _low(measured) >= _low(known) and measured.score > there.score:
            best, there = one, measured
    return best, there, spread


def _low(tried: Tried) -> float:
    return float(np.percentile(tried.psnr, 5))


def find(
    omni: Omni,
    requests: Sequence[GenerationRequest],
    held_out: Sequence[GenerationRequest],
    budgets: Sequence[int],
    tries: int = TRIES,
    batch: int = BATCH,
    journal: Path | None = None,
    listener: Callable[[Event], Any] = lambda event: None,
) -> tuple[dict[int, Found], dict[str, Any]]:
    """Search a schedule for each budget on `requests`, and measure it on `held_out`.

    The budget nearest to a quarter of the steps comes first. The others start from the density that was found last, and
    get half of the tries.

    Args:
        omni: an `Omni` without a cache.
        requests, held_out: all with the same steps and size.
        budgets: numbers of computed steps.
        tries: see `omni_runtime.calibrate.search.search`.
        batch: the largest number of images in one call.
        journal: the file of sampled schedules. None keeps none.
        listener: called with an `Event` after each sampled schedule.

    Returns:
        budget → its `Found`, and the document to write, without its provenance.

    Raises:
        ValueError: the `Omni` has a cache, there are no requests, there are fewer than 3 steps, a budget is out of
            range, the journal is another search's, the pipeline's steps cannot be skipped, or a picture holds NaN.
        files.WriteError: the journal cannot be written.

    Warns:
        files.DamagedFileWarning: a kept file cannot be read; it is set aside, and its content is measured again.
    """
    steps = _checked(omni, requests, held_out, budgets)
    images, others = (Images(omni.pipe, some, batch) for some in (requests, held_out))
    kept = Journal(journal, about(omni, requests))
    recorded = images.record()
    others.record()
    found: dict[int, Found] = {}
    density: tuple[float, ...] | None = None
    order = sorted(budgets, key=lambda budget: abs(math.log(4 * budget / steps)))
    for place, budget in enumerate(order):
        on_try = _told(listener, images, order, place, tries)
        sample = functools.partial(kept.sample, images)
        result = search(steps, budget, sample, tries_of(place, tries), density, on_try=on_try)
        density = result.density
        found[budget] = _measured(result, others, budget, kept.seconds(budget))
    found = {budget: found[budget] for budget in budgets}
    schedules = [(one.best.computed, one.best.forecast or forecasts(budget)[0]) for budget, one in found.items()]
    for one, speedup in zip(found.values(), others.speedups(schedules), strict=True):
        one.speedup = speedup
    height, width = images.size
    document = {
        "schedules": [_row(steps, recorded.sigmas[:steps], budget, one) for budget, one in found.items()],
        "forwards": images.forwards + others.forwards,
        "calibrated_for": {key: value for key, value in recorded.describe_last().items() if key != "steps"}
        | {"width": width, "height": height},
    }
    return found, document


def _checked(
    omni: Omni,
    requests: Sequence[GenerationRequest],
    held_out: Sequence[GenerationRequest],
    budgets: Sequence[int],
) -> int:
    """The steps of the requests. Raises ValueError if no schedule can be searched for them with these budgets."""
    if omni.cache_backend is not None or not requests or not held_out:
        raise ValueError("calibration needs an Omni without a cache, and at least one request of each kind")
    if draws_noise(omni.pipe.scheduler):
        raise ValueError(
            f"{type(omni.pipe.scheduler).__name__} draws new noise at each step: a schedule cannot be searched, as "
            "the same steps suit one noise and not another"
        )
    steps: int = requests[0].arguments["num_inference_steps"]
    if steps < 3:
        raise ValueError(f"there is nothing to search in {steps} steps")
    for budget in budgets:
        if not 2 <= budget <= steps:
            raise ValueError(f"a budget must be from 2 to the {steps} steps of a request, not {budget}")
    return steps


def _told(
    listener: Callable[[Event], Any], images: Images, order: Sequence[int], place: int, tries: int
) -> Callable[[int, Tried, Tried], None]:
    """What a search calls after each sampled schedule, for the budget at this place of `order`: it tells `listener`."""
    budget, most = order[place], whole(place, order[place], tries)
    later = sum(other * whole(i, other, tries) for i, other in enumerate(order) if i > place)

    def on_try(number: int, one: Tried, best: Tried) -> None:
        each = float(np.mean(images.spent)) if images.spent else 0.0
        left = each * (max(0, most - number) * budget + later)
        listener(Event(budget, number, most, one, best, left))

    return on_try


def _measured(searched: Search, others: Images, budget: int, seconds: float) -> Found:
    """What a search has found, measured on the held-out images `others`."""
    known: dict[Any, Tried] = {}

    def measure(one: Tried) -> Tried:
        key = one.computed, one.forecast
        if key not in known:
            assert one.forecast is not None  # every schedule was sampled with one
            known[key] = others.sample(one.computed, one.forecast)
        return known[key]

    best, held_out, even = choose(searched, measure)
    return Found(searched, best, held_out, others.plain(budget), even, measure(searched.early), seconds)


def tries_of(place: int, tries: int) -> int:
    """The tries of the budget at this place in the list."""
    return tries if place == 0 else tries // 2


def whole(place: int, budget: int, tries: int) -> int:
    """The largest number of schedules that are sampled for the budget at this place in the list."""
    return len(forecasts(budget)) + 1 + tries_of(place, tries) + 1


def about(omni: Omni, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """Describe a search: a journal's first line, by which searches are distinguished."""
    return {
        "model": str(omni.name),
        "requests": [[one.prompt, one.seed, jsonable(one.arguments)] for one in requests],
        "torch": torch.__version__,
        "measure": "PSNR of 8-bit pictures",
    }


def statistics(tried: Tried) -> dict[str, float | int]:
    """Return the PSNR's mean, standard deviation and 5th percentile in dB, and the number of images."""
    values = np.asarray(tried.psnr)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    figures = {"mean": float(values.mean()), "std": spread, "p5": float(np.percentile(values, 5))}
    return {name: round(value, 2) for name, value in figures.items()} | {"images": len(values)}


def _row(steps: int, sigmas: Sequence[float], budget: int, found: Found) -> dict[str, Any]:
    forecast = found.best.forecast or forecasts(budget)[0]
    return {
        "steps": steps,
        "budget": budget,
        "computed": list(found.best.computed),
        "reach": round(forecast.reach, 4),
        "corrector_order": forecast.corrector_order,
        "sigmas": [round(sigma, 6) for sigma in sigmas],
        "psnr": statistics(found.held_out),
        "plain_sampling": statistics(found.plain),
        "evenly_spread": statistics(found.even),
        "uncalibrated": statistics(found.early),
        "searched": statistics(found.best),
        "start": {"computed": list(found.searched.even.computed), **statistics(found.searched.even)},
        "tries": len(found.searched.trail),
        "seconds": round(found.seconds, 1),
        "speedup": None if found.speedup is None else round(found.speedup, 3),
    }


def words(found: Mapping[int, Found]) -> Iterator[str]:
    """Yield a description of each budget's result, one line each, and a warning line where it is no gain."""
    for budget, one in found.items():
        now, plain, even = statistics(one.held_out), statistics(one.plain), statistics(one.even)
        images = f"{now['images']} image{'s' * (now['images'] > 1)}"
        times = "the measured times do not agree (another program was busy?)"
        if one.speedup is not None:
            times = f"{one.speedup:.2f} times as fast"
        which = f"evenly spread steps have {even['mean']:.1f} dB, 5th percentile {even['p5']:.1f}"
        if one.best == one.searched.even:
            which = "evenly spread steps are kept"
        elif one.best == one.searched.early:
            which = f"the default schedule is kept; {which}"
        yield (
            f"{budget} computed steps: {times}, {now['mean']:.1f} ± {now['std']:.1f} dB, 5th percentile "
            f"{now['p5']:.1f}, on {images} not searched on; {which}; plain sampling with {budget} steps has "
            f"{plain['mean']:.1f} and {plain['p5']:.1f}. On the searched images, {len(one.searched.trail)} schedules "
            f"raised the mean of mean and 5th percentile from {score(one.searched.even.psnr):.1f} to "
            f"{one.searched.trail[-1].score:.1f} dB."
        )
        if now["mean"] < plain["mean"]:
            yield "warning: plain sampling did better on these images: use fewer steps instead"
        elif now["images"] < FEW:
            yield f"warning: {images} {'say' if now['images'] > 1 else 'says'} little: hold out at least {FEW}"


def plot(found: Mapping[int, Found]) -> str:
    """Return an SVG plot of the search: the best score after each sampled schedule, one line per budget."""
    height = 320
    trails = {budget: [tried.score for tried in one.searched.trail] for budget, one in found.items()}
    scores = [value for trail in trails.values() for value in trail]
    parts, y = axes(height, 16, 36, math.floor(min(scores)), math.ceil(max(scores)) + 1, decimals=1)
    longest = max(2, *map(len, trails.values()))

    def x(number: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (number - 1) / (longest - 1)

    parts.append(
        f'<text x="{LEFT}" y="{height - 8}">sampled schedules: 1 to {longest}; best score in dB, the mean of mean and '
        "5th percentile</text>"
    )
    for budget, trail in trails.items():
        points = " ".join(f"{x(i + 1):.1f},{y(value):.1f}" for i, value in enumerate(trail))
        end = trail[-1]
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>'
            f'<text x="{x(len(trail)) + 6:.1f}" y="{y(end) + 4:.1f}">{budget} steps</text>'
        )
    return "".join([*parts, "</svg>\n"])
