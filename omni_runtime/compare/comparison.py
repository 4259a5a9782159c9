"""The same prompts and seeds under several caches: what each costs, and how far its images are from those without one.

Every image is measured against the image of the same prompt and seed without a cache, at the full number of steps.
Plain sampling with fewer steps is among the runs: it is what a user gets for free, and a cache has to beat it.

    runs = make_runs("emoji-qwen-image", ['tea_cache:{"rel_l1_thresh": 0.2}'], steps=50, fewer_steps=[25, 16, 12])
    requests = [one for seed in (0, 1) for one in Omni(pipe).prepare("a cat", seed=seed, height=64, width=64)]
    document = evaluate(compare(runs, pipe, requests, "out"), about("emoji-qwen-image", pipe, requests))
    write(document, "out")  # results.json, report.html, contact_sheet.png

`compare` makes the images, or finds them: each is a cell (`omni_runtime.compare.cells`), kept below the directory as
soon as it is made, so that a comparison which was interrupted, or has got one more run, makes only what is not there.
`evaluate` measures them. What it returns is results.json, and all that is shown comes from that: the table, the contact
sheet, and the report (`omni_runtime.compare.report_html`).

A cache of another library takes part as a `Run` with an `install`, a context manager which has it installed while it is
open; NFE and blocks are counted at the model itself, for every run alike:

    @contextlib.contextmanager
    def dbcache(pipe):
        cache_dit.enable_cache(pipe, ...)
        yield
        cache_dit.disable_cache(pipe)

    Run("DBCache", "cache-dit", {"version": "1.5.3", "threshold": 0.12}, steps=50, install=dbcache)

Measures of a run are the mean, sample standard deviation, smallest value and 5th percentile over prompts × seeds, each
seed with its own reference; a speedup is the time of the reference's image over that of the same prompt and seed, both
in one sitting: images that are added later have their reference timed again. An image identical to its reference has an
infinite PSNR, null in JSON: it counts in the percentile, and not in mean and deviation, which are those of the others.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_kernels.patching import backends
from omni_runtime import files
from omni_runtime.compare import cells, quality
from omni_runtime.compare.cells import Cell, Run
from omni_runtime.generation.loading import embedded_models
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import jsonable
from omni_runtime.progress import Progress, seconds_left

REFERENCE = "no cache"
PLAIN = "fewer steps"

#: TeaCache with the distance itself, not a polynomial that was fitted to another checkpoint.
IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]

#: How many of an embedded model's prompts `benchmarks.quality` compares caches on; schedules are searched on others.
COMPARED = 32

PIXELS = 1 << 20  # measured at once


_VELOCITY = (
    ("velocity cache 2x", "velocity_cache", {"speedup": 2.0}),
    ("velocity cache 2.9x", "velocity_cache", {"speedup": 2.9}),
)


def _runs_at(tea_cache: float, dbcache: float, first_block: float) -> tuple[tuple[str, str, dict[str, Any]], ...]:
    """Every method at these thresholds."""
    tea = {"rel_l1_thresh": tea_cache, "coefficients": IDENTITY}
    return (
        *_VELOCITY,
        ("TeaCache", "tea_cache", tea),
        ("TeaCache + Newton", "tea_cache", tea | {"forecaster": "newton"}),
        ("DBCache", "cache_dit", {"residual_diff_threshold": dbcache}),
        ("DBCache + TaylorSeer", "cache_dit", {"residual_diff_threshold": dbcache, "enable_taylorseer": True}),
        ("first-block cache", "first_block_cache", {"threshold": first_block}),
    )


#: Runs that suit an embedded model: thresholds at which TeaCache computes about a third of the steps, the others about
#: half. Any other model gets each method with its own defaults.
RUNS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "emoji-qwen-image": _runs_at(0.12, 0.1, 0.09),
    "emoji-z-image": _runs_at(0.08, 0.12, 0.11),
    "emoji-qwen-image-edit": _runs_at(0.09, 0.07, 0.06),
    "": (
        *_VELOCITY,
        ("TeaCache", "tea_cache", {}),
        ("DBCache", "cache_dit", {}),
        ("DBCache + TaylorSeer", "cache_dit", {"enable_taylorseer": True}),
        ("first-block cache", "first_block_cache", {}),
    ),
}


#: Prompts for a model that brings none, by the name that `--prompts @NAME` gives them.
PROMPT_SETS: dict[str, tuple[str, ...]] = {
    "general": (
        "a red fox asleep on fresh snow, early morning light",
        "a glass of orange juice on a wooden table, hard shadows",
        "an old lighthouse in a storm, oil painting",
        "portrait of a woman with freckles and a green scarf",
        "a street market at night in the rain, neon reflections",
        "a shop sign that says OPEN UNTIL MIDNIGHT",
        "three blue balloons and one yellow balloon against a brick wall",
        "a steam locomotive crossing a stone bridge, seen from above",
        "macro photograph of a bee on lavender",
        "isometric drawing of a tiny bakery, pastel colours",
        "a bowl of ramen, studio light, steam rising",
        "an empty library with tall windows, pencil sketch",
    ),
    "edit": (
        "make it black and white",
        "make it look like an oil painting",
        "change the background to a plain blue",
        "turn day into night",
        "add a red hat",
        "make it snow",
    ),
}


@dataclass
class RunResult:
    """A run with its cells, in the order of the requests."""

    run: Run
    cells: list[Cell]


# Runs and prompts


_RUN = re.compile(r"(?:(?P<name>[^={]+)=)?(?P<backend>[\w-]+)(?::(?P<config>.+))?", re.DOTALL)


def parse_run(text: str, steps: int) -> Run:
    """A run from `NAME=BACKEND:JSON`, where name and configuration may be left out.

    Raises:
        ValueError: another form, or no JSON.
    """
    match = _RUN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a run is NAME=BACKEND:JSON, not {text!r}")
    try:
        config = json.loads(match["config"] or "{}")
    except ValueError as error:
        raise ValueError(f"the configuration of run {text!r} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"the configuration of run {text!r} must be a JSON object")
    backend = None if match["backend"] == "none" else match["backend"]
    return Run((match["name"] or match["backend"]).strip(), backend, config or None, steps)


def make_runs(model: str, chosen: Sequence[str], steps: int, fewer_steps: Sequence[int] | None) -> list[Run]:
    """The reference, the chosen runs (or those that suit the model), and plain sampling with fewer steps.

    `fewer_steps` None is a half and a third of the steps.

    Raises:
        ValueError: a run that cannot be read, two of one name, fewer steps that are not fewer.
    """
    runs = [Run(REFERENCE, steps=steps)]
    if fewer_steps is None:  # one step alone is beyond what schedulers with a terminal shift can do
        fewer_steps = [count for count in (steps // 2, steps // 3) if count > 1]
    for count in fewer_steps:
        if count >= steps:
            raise ValueError(f"fewer steps than {steps} are wanted, not {count}")
        runs.append(Run(f"{count} steps", steps=count))
    if chosen:
        runs += [parse_run(text, steps) for text in chosen]
    else:
        runs += [Run(name, backend, config or None, steps) for name, backend, config in RUNS.get(model) or RUNS[""]]
    _check_names(runs)
    return runs


def _check_names(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two runs are called {name!r}: name them, as in NAME=BACKEND:JSON")


def method_of(run: Run) -> str:
    """What the runs of one line in the plots have in common: the backend, its forecaster, and whether it has a mask."""
    if run.method is not None:
        return run.method
    if run.backend is None:
        return PLAIN
    config = run.config or {}
    forecaster = "taylorseer" if config.get("enable_taylorseer") else config.get("forecaster")
    masked = any(config.get(key) is not None for key in ("scm_steps_mask_policy", "steps_computation_mask"))
    return " + ".join([run.backend, *([forecaster] if forecaster else []), *(["mask"] if masked else [])])


def prompts_of(model: str, count: int | None = 6) -> list[tuple[str, Path | None]]:
    """Prompts that an embedded model was made for, spread over its list, each with the picture that it edits, if any.

    They are in `prompts.json` beside the model: a list, or the list "contact_sheet" of an object, of texts or of
    objects with "prompt" and, for a model that edits, "image", a file beside it. None of other models. `count` None
    gives all.

    Raises:
        ValueError: the file is damaged; names it.
    """
    directory = embedded_models().get(model)
    path = directory / "prompts.json" if directory else None
    if directory is None or path is None or not path.is_file():
        return []
    listed = files.read_json(path)
    if isinstance(listed, dict):
        listed = listed.get("contact_sheet") or next(iter(listed.values()), [])
    if not isinstance(listed, list):
        raise ValueError(f"{path} must hold a list of prompts, not {type(listed).__name__}")
    entries = [one if isinstance(one, dict) else {"prompt": one} for one in listed]
    found = [
        (one["prompt"], directory / one["image"] if isinstance(one.get("image"), str) else None)
        for one in entries
        if isinstance(one.get("prompt"), str)
    ]
    return found if count is None else spread_over(found, count)


def prompts_left(model: str, count: int, compared: int = COMPARED) -> list[tuple[str, Path | None]]:
    """As `prompts_of`, of those alone that a comparison of `compared` prompts leaves out.

    Of all, where it leaves none.
    """
    taken = prompts_of(model, compared)
    everything = prompts_of(model, None)
    return spread_over([one for one in everything if one not in taken] or everything, count)


def spread_over(entries: list[Any], count: int) -> list[Any]:
    """At most `count` of the entries, at even distances."""
    return [entries[i * len(entries) // count] for i in range(count)] if len(entries) > count else entries


# Making the images


def compare(
    runs: Sequence[Run],
    pipe: Any,
    requests: Sequence[GenerationRequest],
    directory: str | Path,
    listener: Callable[[Run, GenerationRequest, Progress], Any] = lambda *of_it: contextlib.nullcontext(),
    fresh: bool = False,
) -> list[RunResult]:
    """Make every request's image under every run, or find it in `directory`; the first run is the reference.

    Runs take turns on each request, so that a machine that slows down slows them all.

    Args:
        runs: at least one.
        pipe: a loaded pipeline without a patch.
        requests: of a single image each, seeded.
        directory: gets a directory `cells` with a picture, latents and a record of each image.
        listener: called before each image that is made; gives a context that is open while that happens, and gives what
            is told of each step, or None.
        fresh: make all images, also those that are there.

    Raises:
        ValueError: two runs of one name; a request without a seed, or of several images; before anything runs. So is
            whatever is wrong about a run's backend and configuration. A picture that is not a number (NaN).
        files.WriteError: a file that could not be written; says how many pictures are kept.

    Warns:
        files.DamagedFileWarning: a cell that cannot be read, and is made again.
    """
    _check(runs, requests)
    configs = {run.name: cells.complete_config(run, pipe) for run in runs}
    folder = Path(directory) / "cells"
    files.make_directory(folder)
    fingerprint = cells.fingerprint_of(pipe)
    plan = [
        (run, request, cells.path_of(folder, cells.identity(run, configs[run.name], pipe, request, fingerprint)))
        for request in requests
        for run in runs
    ]
    there = {path: None if fresh else cells.find(path) for _, _, path in plan}
    to_make = {path: run.name for run, _, path in plan if there[path] is None}
    sitting = cells.sitting(pipe)
    if to_make:  # the first request of a process is always slow
        with Omni(pipe, cache_backend=None) as omni:
            omni.run(GenerationRequest(requests[0].prompt, 0, requests[0].arguments | {"num_inference_steps": 2}))
    taken: dict[str, list[float]] = {}
    reference: Cell | None = None
    seconds: float | None = None  # of the reference, in this sitting, where that is another than its own
    total = len(to_make)
    for run, request, path in plan:
        if run is runs[0]:
            reference, seconds = there[path], None
        if there[path] is None:
            if reference is not None and seconds is None:
                seconds = cells.seconds_of(runs[0], pipe, request)
            progress = Progress(total - len(to_make) + 1, total, seconds_left(to_make.values(), taken))
            with _telling_what_is_kept(there, directory), listener(run, request, progress) as on_step:
                there[path] = made = cells.make(run, pipe, request, path, sitting, on_step, seconds)
            taken.setdefault(run.name, []).append(made.record["seconds"])
            del to_make[path]
    by_run: dict[str, list[Cell]] = {run.name: [] for run in runs}
    for run, _, path in plan:
        cell = there[path]
        assert cell is not None  # found, or made just now
        by_run[run.name].append(cell)
    return [RunResult(run, by_run[run.name]) for run in runs]


def _check(runs: Sequence[Run], requests: Sequence[GenerationRequest]) -> None:
    _check_names(runs)
    if not (runs and requests):
        raise ValueError("there is nothing to compare: no runs, or no requests")
    for request in requests:
        if request.seed is None or request.arguments.get("num_images_per_prompt", 1) != 1:
            raise ValueError("a comparison is of single images with a seed each")


@contextlib.contextmanager
def _telling_what_is_kept(there: Mapping[Path, Cell | None], directory: str | Path) -> Iterator[None]:
    """While open, a file that could not be written also tells how many pictures are there."""
    try:
        yield
    except files.WriteError as error:
        kept = sum(cell is not None for cell in there.values())
        where = f"{kept} of {len(there)} pictures are kept in {directory}: the same call goes on from there"
        raise error.keeping(where) from error


# Measuring them


@dataclass(frozen=True)
class Measure:
    """One column of the tables: how it is called, its unit, its decimals, and whether the reference has it, too."""

    label: str
    unit: str
    digits: int
    cost: bool = False


#: What is measured, by its name in results.json.
MEASURES: dict[str, Measure] = {
    "nfe": Measure("NFE", "", 0, cost=True),
    "blocks": Measure("blocks", "%", 0, cost=True),
    "seconds": Measure("s/image", "s", 2, cost=True),
    "speedup": Measure("speedup", "×", 2, cost=True),
    "psnr": Measure("PSNR", "dB", 1),
    "ssim": Measure("SSIM", "", 3),
    "ms_ssim": Measure("MS-SSIM", "", 3),
    "latents_psnr": Measure("latents PSNR", "dB", 1),
    "lpips": Measure("LPIPS", "", 3),
}


def evaluate(results: Sequence[RunResult], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What results.json holds: `about`, how it was measured, and the runs, each with its statistics and its cells.

    NFE are transformer forwards computed; blocks, in percent, are relative to the reference's.
    """
    reference = results[0].cells
    sittings: list[Any] = []
    lpips_missing = quality.lpips_missing()
    rows = [_measured(row, lpips_missing is None) for row in zip(*(result.cells for result in results), strict=True)]
    measured = list(zip(*rows, strict=True))
    names = [name for name in MEASURES if all(name in cell for row in measured for cell in row)]
    runs = []
    for result, row in zip(results, measured, strict=True):
        listed = []
        for cell, values in zip(result.cells, row, strict=True):
            if cell.record["sitting"] not in sittings:
                sittings.append(cell.record["sitting"])
            listed.append(
                {
                    "prompt": cell.record["prompt"],
                    "seed": cell.record["seed"],
                    "image": f"{cell.path.parent.name}/{cell.path.name}",
                    **{name: _finite(values[name]) for name in names},
                    "branches": cell.record["branches"],
                    "sitting": sittings.index(cell.record["sitting"]),
                    "reference_seconds": cell.record.get("reference_seconds"),
                }
            )
        runs.append(
            {
                "name": result.run.name,
                "method": method_of(result.run),
                "cache_backend": result.run.backend,
                "cache_config": jsonable(result.run.config),
                "steps": result.run.steps,
                "threshold": _threshold(result.run),
                "notes": list(dict.fromkeys(note for cell in result.cells for note in cell.record.get("notes", []))),
                **{name: statistics_of([values[name] for values in row]) for name in names},
                "cells": listed,
            }
        )
    width, height = reference[0].image.size
    return {
        **(about or {}),
        "measures": {name: asdict(MEASURES[name]) for name in names},
        "ms_ssim_scales": quality.ms_ssim_scales(height, width),
        "lpips_missing": lpips_missing,
        "sittings": sittings,
        "runs": runs,
    }


def _measured(row: Sequence[Cell], with_lpips: bool) -> list[dict[str, float]]:
    """All measures, by name, of the images of one prompt and seed; the first is the reference."""
    reference = row[0]
    base = quality.as_float(reference.image)
    final = reference.latents
    several = max(1, PIXELS // base[0].numel())  # at once: small images cost more in calls than in arithmetic
    found = []
    for first in range(0, len(row), several):
        part = row[first : first + several]
        images = quality.as_float([cell.image for cell in part])
        bases = base.expand_as(images)
        of_images = {"psnr": quality.psnr(bases, images)}
        if quality.ms_ssim_scales(*base.shape[-2:]):
            of_images |= {"ssim": quality.ssim(bases, images), "ms_ssim": quality.ms_ssim(bases, images)}
        if with_lpips:
            of_images["lpips"] = quality.lpips(bases, images)
        for number, cell in enumerate(part):
            values = {name: float(numbers[number]) for name, numbers in of_images.items()}
            values |= {"nfe": cell.record["forwards"], "seconds": cell.record["seconds"]}
            seconds = cell.record.get("reference_seconds") or reference.record["seconds"]
            values["speedup"] = seconds / cell.record["seconds"]
            if cell.record["blocks"] and reference.record["blocks"]:
                values["blocks"] = 100 * cell.record["blocks"] / reference.record["blocks"]
            if final is not None and cell.latents is not None:
                values["latents_psnr"] = float(quality.latents_psnr(final, cell.latents))
            found.append(values)
    return found


def statistics_of(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation, smallest value and 5th percentile, fit for JSON.

    Infinite values (identical images) are counted as "identical". They are left out of mean and deviation; the smallest
    value and the percentile are those of all, None where infinite.
    """
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": float(np.mean(finite)) if finite else None,
        "std": float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0,
        "min": _finite(min(values)),
        "p5": _finite(percentile(values, 5)),
        **({"identical": len(values) - len(finite)} if len(finite) < len(values) else {}),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 lie, interpolated between neighbours."""
    # np.percentile has NaN beside infinite values, where np.interp has the value itself or infinity.
    return float(np.interp((len(values) - 1) * percent / 100, np.arange(len(values)), np.sort(values)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _threshold(run: Run) -> float | None:
    """The number that a run's distances are held against: the backend's key whose name says threshold."""
    if run.install is not None or run.backend is None:
        return None
    config = backends.get(run.backend).check(run.config)
    return next((float(value) for key, value in config.items() if "thresh" in key), None)


def about(model: str, pipe: Any, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """What a comparison's numbers hold for: the model, the prompts and seeds, the settings that all requests share."""
    settings: Mapping[str, Any] = requests[0].arguments
    return {
        "model": model,
        "pipeline": type(pipe).__name__,
        "prompts": list(dict.fromkeys(request.prompt for request in requests)),
        "seeds": list(dict.fromkeys(request.seed for request in requests)),
        "settings": {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)},
        "device": pipe._execution_device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": cells.versions(),
    }
