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

from omni_runtime.cache import schedules
from omni_runtime.cache.schedulers import draws_noise
from omni_runtime.calibrate.images import SETTINGS, Images, Settings
from omni_runtime.calibrate.journal import Journal, KeptResponses
from omni_runtime.calibrate.search import Responses, Tried, score, search, shape
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import jsonable

TRIES, PATIENCE, BATCH = 30, 20, 8


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
        best: the found schedule, on the searched images.
        held_out: the found schedule, on the held-out images.
        plain: plain sampling with as many steps, on the held-out images.
        even: evenly spread steps, on the held-out images.
        start: the best schedule before any move, on the searched images.
        trail: the best score after each sampled schedule.
        seconds: the time that sampling took.
        speedup: the full run's time divided by the schedule's time, for a single image.
    """

    best: Tried
    held_out: Tried
    plain: Tried
    even: Tried
    start: Tried
    trail: list[float]
    seconds: float
    speedup: float = math.nan


def starts(
    responses: Responses, sigmas: Sequence[float], budget: int, transformer: str
) -> tuple[list[tuple[int, ...]], Callable[[Sequence[int]], float]]:
    """Return the schedules that a search starts from, and its cost function.

    The schedules are the one that the responses favour, evenly spread steps, and the published one for the
    transformer's class, if there is one.
    """
    steps = len(sigmas) - 1
    spread = schedules.even(steps, budget).computed
    cost = responses.cost(budget)
    found = [shape(cost, steps, budget), spread]
    published = [one for one in schedules.PUBLISHED.values() if one.transformer == transformer]
    near = schedules.nearest(published, steps, budget)
    if near is not None:
        found.append(schedules.fitted(near, steps, sigmas[:steps], budget).computed)
    return list(dict.fromkeys(found)), cost


def find(
    omni: Omni,
    requests: Sequence[GenerationRequest],
    held_out: Sequence[GenerationRequest],
    budgets: Sequence[int],
    settings: Settings = SETTINGS,
    tries: int = TRIES,
    patience: int = PATIENCE,
    batch: int = BATCH,
    journal: Path | None = None,
    listener: Callable[[Event], Any] = lambda event: None,
    on_step: Callable[[int, int], Any] = lambda i, n: None,
) -> tuple[dict[int, Found], dict[str, Any]]:
    """Search a schedule for each budget on `requests`, and measure it on `held_out`.

    Args:
        omni: an `Omni` without a cache.
        requests, held_out: all with the same steps and size.
        budgets: numbers of computed steps.
        settings: how skipped outputs are forecast.
        tries, patience: see `omni_runtime.calibrate.search.search`.
        batch: the largest number of images in one call.
        journal: the file of sampled schedules; the responses are kept in a file in the same directory. None keeps
            neither.
        listener: called with an `Event` after each sampled schedule.
        on_step: as in `Images.responses`.

    Returns:
        budget → its `Found`, and the document to write, without its provenance.

    Raises:
        ValueError: the `Omni` has a cache, there are no requests, there are fewer than 3 steps, a budget is out of
            range, the journal is another search's, the pipeline's steps cannot be skipped, or a picture holds NaN.
        files.WriteError: the journal or the responses cannot be written.

    Warns:
        files.DamagedFileWarning: a kept file cannot be read; it is set aside, and its content is measured again.
    """
    if omni.cache_backend is not None or not requests or not held_out:
        raise ValueError("calibration needs an Omni without a cache, and at least one request of each kind")
    if draws_noise(omni.pipe.scheduler):
        raise ValueError(
            f"{type(omni.pipe.scheduler).__name__} draws new noise at each step: a schedule cannot be searched, as "
            "the same steps suit one noise and not another"
        )
    steps = requests[0].arguments["num_inference_steps"]
    if steps < 3:
        raise ValueError(f"there is nothing to search in {steps} steps")
    for budget in budgets:
        if not 2 <= budget <= steps:
            raise ValueError(f"a budget must be from 2 to the {steps} steps of a request, not {budget}")
    images, others = (Images(omni.pipe, some, settings, batch) for some in (requests, held_out))
    searched = about(omni, requests, settings)
    responded = None if journal is None else journal.with_suffix(".responses.safetensors")
    if journal is not None and responded is not None and not journal.exists() and responded.is_file():
        responded.unlink()  # the search starts again
    kept = Journal(journal, searched)
    recorded = images.record()
    others.record()
    responses = images.responses(recorded.sigmas, KeptResponses(responded, searched), on_step)
    found: dict[int, Found] = {}
    for place, budget in enumerate(budgets):
        begun, cost = starts(responses, recorded.sigmas, budget, type(omni.pipe.transformer).__name__)

        def on_try(number: int, one: Tried, best: Tried, budget: int = budget, place: int = place) -> None:
            each = float(np.mean(images.spent)) if images.spent else 0.0
            left = each * ((tries - number) * budget + tries * sum(budgets[place + 1 :]))
            listener(Event(budget, number, tries, one, best, left))

        sample = functools.partial(kept.sample, images)
        result = search(begun, steps, sample, tries, patience, cost=cost, on_try=on_try)
        found[budget] = Found(
            best=result.best,
            held_out=others.sample(result.best.computed),
            plain=others.plain(budget),
            even=others.sample(schedules.even(steps, budget).computed),
            start=result.start,
            trail=[one.score for one in result.trail],
            seconds=kept.seconds(budget),
        )
    for one, speedup in zip(
        found.values(), others.speedups([one.best.computed for one in found.values()]), strict=True
    ):
        one.speedup = speedup
    rows = [_row(steps, recorded.sigmas[:steps], budget, one) for budget, one in found.items()]
    height, width = images.size
    document = {
        "schedules": rows,
        "settings": dataclasses.asdict(settings),
        "forwards": images.forwards + others.forwards,
        "seconds_of_responses": round(images.responding, 1),
        "calibrated_for": {key: value for key, value in recorded.describe_last().items() if key != "steps"}
        | {"width": width, "height": height},
    }
    return found, document


def about(omni: Omni, requests: Sequence[GenerationRequest], settings: Settings) -> dict[str, Any]:
    """Describe a search: a journal's first line, which tells it from other searches."""
    return {
        "model": str(omni.name),
        "settings": dataclasses.asdict(settings),
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
    return {
        "steps": steps,
        "budget": budget,
        "computed": list(found.best.computed),
        "sigmas": [round(sigma, 6) for sigma in sigmas],
        "psnr": statistics(found.held_out),
        "plain_sampling": statistics(found.plain),
        "evenly_spread": statistics(found.even),
        "searched": statistics(found.best),
        "start": {"computed": list(found.start.computed), **statistics(found.start)},
        "tries": len(found.trail),
        "seconds": round(found.seconds, 1),
        "speedup": round(found.speedup, 3),
    }


def words(found: Mapping[int, Found]) -> Iterator[str]:
    """Yield a description of each budget's result, one line each, and a warning line where it is no gain."""
    for budget, one in found.items():
        now, plain, even = statistics(one.held_out), statistics(one.plain), statistics(one.even)
        images = f"{now['images']} image{'s' * (now['images'] > 1)}"
        yield (
            f"{budget} computed steps: {one.speedup:.2f} times as fast, {now['mean']:.1f} ± {now['std']:.1f} dB, 5th "
            f"percentile {now['p5']:.1f}, on {images} not searched on; evenly spread steps have "
            f"{even['mean']:.1f} dB, 5th percentile {even['p5']:.1f}, plain sampling with {budget} steps "
            f"{plain['mean']:.1f} and {plain['p5']:.1f}. On the searched images, {len(one.trail)} schedules raised the "
            f"mean of mean and 5th percentile from {score(one.start.psnr):.1f} to {one.best.score:.1f} dB."
        )
        better = max((even["mean"], "evenly spread steps"), (plain["mean"], "plain sampling"))
        if now["mean"] < better[0]:
            yield f"warning: {better[1]} did better on these images: search on more prompts, or use no calibration"
        elif now["images"] < FEW:
            yield f"warning: {images} say little: hold out at least {FEW}"


def plot(found: Mapping[int, Found]) -> str:
    """Return an SVG plot of the search: the best score after each sampled schedule, one line per budget."""
    width, height, left, bottom, top = 640, 320, 56, 36, 16
    scores = [value for one in found.values() for value in one.trail]
    low, high = math.floor(min(scores)), math.ceil(max(scores)) + 1
    longest = max(2, *(len(one.trail) for one in found.values()))

    def x(number: float) -> float:
        return left + (width - left - 90) * (number - 1) / (longest - 1)

    def y(value: float) -> float:
        return height - bottom - (height - bottom - top) * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    parts += [
        f'<path d="M{left} {y(value):.1f}H{width - 90}" stroke="#ddd"/>'
        f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>'
        for value in np.linspace(low, high, 5)
    ]
    parts.append(
        f'<text x="{left}" y="{height - 8}">sampled schedules: 1 to {longest}; best score in dB, the mean of mean and '
        "5th percentile</text>"
    )
    for budget, one in found.items():
        points = " ".join(f"{x(i + 1):.1f},{y(value):.1f}" for i, value in enumerate(one.trail))
        end = one.trail[-1]
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>'
            f'<text x="{x(len(one.trail)) + 6:.1f}" y="{y(end) + 4:.1f}">{budget} steps</text>'
        )
    return "".join([*parts, "</svg>\n"])
