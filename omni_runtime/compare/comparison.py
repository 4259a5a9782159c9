"""Compare caches on the same prompts and seeds: what each costs, and how far its images are from those without a cache.

Every image is measured against its reference: the same prompt and seed without a cache, at the full number of steps.
Plain sampling with fewer steps is among the runs: a user gets it for free, so a cache has to beat it.

    runs = make_runs("emoji-qwen-image", ['tea_cache:{"rel_l1_thresh": 0.2}'], steps=50, fewer_steps=[25, 16, 12])
    requests = [one for seed in (0, 1) for one in Omni(pipe).prepare("a cat", seed=seed, height=64, width=64)]
    document = evaluate(compare(runs, pipe, requests, "out"), about("emoji-qwen-image", pipe, requests))
    write(document, "out")  # results.json, report.html, contact_sheet.png

A pipeline of videos is compared in the same way. The PSNR of a video is the mean over its frames, as are SSIM, MS-SSIM
and LPIPS. The motion PSNR is that of the changes from one frame to the next: it falls if a cache makes the motion
jerky, slow or different, and not if it only shifts a colour.

`compare` makes the images. Each is a cell (`omni_runtime.compare.cells`), written to the directory as soon as it is
made. An interrupted comparison, or one with an additional run, makes only the missing cells. `evaluate` measures the
cells and returns the content of results.json. The table, the contact sheet and the report
(`omni_runtime.compare.report_html`) are made from it alone.

Another library's cache takes part as a `Run` with an `install`: a context manager that installs the cache while it is
open. NFE and blocks are counted at the model itself, in the same way for every run:

    @contextlib.contextmanager
    def dbcache(pipe):
        cache_dit.enable_cache(pipe, ...)
        yield
        cache_dit.disable_cache(pipe)

    Run("DBCache", "cache-dit", {"version": "1.5.3", "threshold": 0.12}, steps=50, install=dbcache)

A run's measures are the mean, sample standard deviation, smallest value and 5th percentile over prompts × seeds; each
seed has its own reference. A speedup is the reference's time divided by the image's time, for the same prompt and seed
and in the same sitting. If images are added later, their references are timed again. An image that is identical to its
reference has an infinite PSNR (null in JSON): it counts in the percentile, but not in the mean and the deviation.
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
from omni_runtime.generation.video import makes_video
from omni_runtime.progress import Progress, seconds_left

REFERENCE = "no cache"
PLAIN = "fewer steps"

#: Coefficients with which TeaCache uses the distance itself, not a polynomial that was fitted to another checkpoint.
IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]

#: How many of an embedded model's prompts `benchmarks.quality` uses; schedules are searched on other prompts.
COMPARED = 32

PIXELS = 1 << 20  # pixels that are measured at once


_VELOCITY = (
    ("velocity cache 2x", "velocity_cache", {"speedup": 2.0}),
    ("velocity cache 2.9x", "velocity_cache", {"speedup": 2.9}),
)


def _runs_at(tea_cache: float, dbcache: float, first_block: float) -> tuple[tuple[str, str, dict[str, Any]], ...]:
    """Return the runs of an embedded model, with these thresholds."""
    tea = {"rel_l1_thresh": tea_cache, "coefficients": IDENTITY}
    return (
        *_VELOCITY,
        ("TeaCache", "tea_cache", tea),
        ("TeaCache + Newton", "tea_cache", tea | {"forecaster": "newton"}),
        ("DBCache", "cache_dit", {"residual_diff_threshold": dbcache}),
        ("DBCache + TaylorSeer", "cache_dit", {"residual_diff_threshold": dbcache, "enable_taylorseer": True}),
        ("first-block cache", "first_block_cache", {"threshold": first_block}),
    )


#: Default runs by embedded model: thresholds at which TeaCache computes about a third of the steps, the others about
#: half. For any other model, each method has its own defaults.
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


#: Prompts for models without their own, by the NAME in `--prompts @NAME`.
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
    """Parse a run from `NAME=BACKEND:JSON`. Name and configuration are optional.

    Raises:
        ValueError: the text has another form, or the configuration is not a JSON object.
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
    """Return the reference, plain sampling with fewer steps, and the chosen runs (or the model's default runs).

    If `fewer_steps` is None, plain sampling takes a half and a third of the steps.

    Raises:
        ValueError: a run cannot be parsed, two runs have the same name, or `fewer_steps` holds a number that is not
            below `steps`.
    """
    runs = [Run(REFERENCE, steps=steps)]
    if fewer_steps is None:  # schedulers with a terminal shift cannot run a single step
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


def possible(runs: Sequence[Run], pipe: Any) -> tuple[list[Run], dict[str, str]]:
    """Return the runs that this pipeline can have, and for each of the others, by name, why its cache is refused."""

    def why_not(run: Run) -> str | None:
        try:
            cells.complete_config(run, pipe)
        except ValueError as error:
            return str(error).split("\n")[0]
        return None

    refused = {run.name: why for run in runs if (why := why_not(run)) is not None}
    return [run for run in runs if run.name not in refused], refused


def _check_names(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two runs are called {name!r}: name them, as in NAME=BACKEND:JSON")


def method_of(run: Run) -> str:
    """Return a run's line in the plots: its backend, forecaster, and whether it has a mask."""
    if run.method is not None:
        return run.method
    if run.backend is None:
        return PLAIN
    config = run.config or {}
    forecaster = "taylorseer" if config.get("enable_taylorseer") else config.get("forecaster")
    masked = any(config.get(key) is not None for key in ("scm_steps_mask_policy", "steps_computation_mask"))
    return " + ".join([run.backend, *([forecaster] if forecaster else []), *(["mask"] if masked else [])])


def prompts_of(model: str, count: int | None = 6) -> list[tuple[str, Path | None]]:
    """Return prompts of an embedded model, evenly spread over its list, each with the picture to edit, if any.

    They are in the model's `prompts.json`: a list, or an object with the list "contact_sheet". An entry is a text, or
    an object with "prompt" and, for a model that edits, "image", a file in the same directory. Other models have no
    prompts, so the result is empty. If `count` is None, all prompts are returned.

    Raises:
        ValueError: the file is damaged; the message names it.
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
    """Like `prompts_of`, but only prompts that a comparison of `compared` prompts does not use.

    If it uses all of them, the result is taken from all prompts.
    """
    taken = prompts_of(model, compared)
    everything = prompts_of(model, None)
    return spread_over([one for one in everything if one not in taken] or everything, count)


def spread_over(entries: list[Any], count: int) -> list[Any]:
    """Return at most `count` of the entries, at even distances."""
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
    """Make every request's image under every run, unless it is already in `directory`. The first run is the reference.

    For each request, all runs follow one another, so a machine that slows down affects all runs alike.

    Args:
        runs: at least one.
        pipe: a loaded pipeline without a patch.
        requests: each with a seed and a single image.
        directory: each image's picture, latents and record are written to its subdirectory `cells`.
        listener: called before each image that is made. Returns a context manager, which is open while the image is
            made and whose value is the `on_step` callback or None.
        fresh: make all images again, even those that exist.

    Raises:
        ValueError: two runs have the same name, a request has no seed or several images, or a run's backend or
            configuration is wrong; all this is checked before anything runs. Later: a picture holds NaN.
        files.WriteError: a file cannot be written; the message says how many pictures are kept.

    Warns:
        files.DamagedFileWarning: a cell cannot be read, and is made again.
    """
    _check(runs, requests)
    configs = {run.name: cells.complete_config(run, pipe) for run in runs}
    folder = Path(directory) / "cells"
    files.make_directory(folder)
    fingerprint = cells.fingerprint_of(pipe)
    suffix = ".webp" if makes_video(type(pipe)) else ".png"

    def identity(run: Run, request: GenerationRequest) -> dict[str, Any]:
        return cells.identity(run, configs[run.name], pipe, request, fingerprint)

    plan = [
        (run, request, cells.path_of(folder, identity(run, request), suffix)) for request in requests for run in runs
    ]
    there = {path: None if fresh else cells.find(path) for _, _, path in plan}
    to_make = {path: run.name for run, _, path in plan if there[path] is None}
    sitting = cells.sitting(pipe)
    if to_make:  # the first request of a process is always slow
        with Omni(pipe, cache_backend=None) as omni:
            omni.run(GenerationRequest(requests[0].prompt, 0, requests[0].arguments | {"num_inference_steps": 2}))
    taken: dict[str, list[float]] = {}
    reference: Cell | None = None
    seconds: float | None = None  # the reference's time in this sitting, if the reference was made in another one
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
        several = [request.arguments.get(f"num_{kind}_per_prompt", 1) for kind in ("images", "videos")]
        if request.seed is None or several != [1, 1]:
            raise ValueError("a comparison is of single images with a seed each")


@contextlib.contextmanager
def _telling_what_is_kept(there: Mapping[Path, Cell | None], directory: str | Path) -> Iterator[None]:
    """Context manager: the message of a `WriteError` also says how many pictures are kept."""
    try:
        yield
    except files.WriteError as error:
        kept = sum(cell is not None for cell in there.values())
        where = f"{kept} of {len(there)} pictures are kept in {directory}: the same call continues from there"
        raise error.keeping(where) from error


# Measuring them


@dataclass(frozen=True)
class Measure:
    """One column of the tables: its label, unit and decimals, and whether it is a cost (which the reference has)."""

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
    "motion_psnr": Measure("motion PSNR", "dB", 1),
    "ssim": Measure("SSIM", "", 3),
    "ms_ssim": Measure("MS-SSIM", "", 3),
    "latents_psnr": Measure("latents PSNR", "dB", 1),
    "lpips": Measure("LPIPS", "", 3),
}


def evaluate(results: Sequence[RunResult], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Measure the cells and return the content of results.json.

    It holds `about`, how the cells were measured, and the runs, each with its statistics and its cells. NFE is the
    number of computed transformer forwards. Blocks are in percent of the reference's blocks.
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
    frames = reference[0].frames
    width, height = frames[0].size
    return {
        **(about or {}),
        "measures": {name: asdict(MEASURES[name]) for name in names},
        "frames": len(frames),
        "ms_ssim_scales": quality.ms_ssim_scales(height, width),
        "lpips_missing": lpips_missing,
        "sittings": sittings,
        "runs": runs,
    }


def _measured(row: Sequence[Cell], with_lpips: bool) -> list[dict[str, float]]:
    """Return all measures by name, for each image of one prompt and seed. The first image is the reference."""
    reference = row[0]
    base = quality.as_float(reference.frames)  # [frames, channels, height, width]
    final = reference.latents
    several = max(1, PIXELS // base[:, 0].numel())  # at once: for small images, calls cost more than arithmetic
    found = []
    for first in range(0, len(row), several):
        part = row[first : first + several]
        images = quality.as_float([cell.frames for cell in part])
        bases = base.expand_as(images)
        of_images = {"psnr": quality.psnr(bases, images)}
        if len(base) > 1:
            of_images["motion_psnr"] = quality.psnr(bases.diff(dim=1), images.diff(dim=1))
        if quality.ms_ssim_scales(*base.shape[-2:]):
            of_images |= {"ssim": quality.ssim(bases, images), "ms_ssim": quality.ms_ssim(bases, images)}
        if with_lpips:
            of_images["lpips"] = quality.lpips(bases, images)
        for number, cell in enumerate(part):
            values = {name: _over_frames(numbers[number]) for name, numbers in of_images.items()}
            values |= {"nfe": cell.record["forwards"], "seconds": cell.record["seconds"]}
            seconds = cell.record.get("reference_seconds") or reference.record["seconds"]
            values["speedup"] = seconds / cell.record["seconds"]
            if cell.record["blocks"] and reference.record["blocks"]:
                values["blocks"] = 100 * cell.record["blocks"] / reference.record["blocks"]
            if final is not None and cell.latents is not None:
                values["latents_psnr"] = float(quality.latents_psnr(final, cell.latents))
            found.append(values)
    return found


def _over_frames(values: torch.Tensor) -> float:
    """Return the mean over frames. Identical frames have an infinite PSNR: they are left out, unless all are."""
    finite = values[values.isfinite()]
    return float((finite if len(finite) else values).mean())


def statistics_of(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean, sample standard deviation, smallest value and 5th percentile, ready for JSON.

    Infinite values (identical images) are counted in "identical" and left out of the mean and the deviation. The
    smallest value and the percentile are over all values, and None if infinite.
    """
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": float(np.mean(finite)) if finite else None,
        "median": _finite(float(np.median(values))),
        "std": float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0,
        "min": _finite(min(values)),
        "p5": _finite(percentile(values, 5)),
        **({"identical": len(values) - len(finite)} if len(finite) < len(values) else {}),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` % of the values lie, interpolated between neighbours."""
    # Next to infinite values np.percentile returns NaN; np.interp returns the value itself or infinity.
    return float(np.interp((len(values) - 1) * percent / 100, np.arange(len(values)), np.sort(values)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _threshold(run: Run) -> float | None:
    """Return the threshold that a run's distances are compared with: the backend's key with "thresh" in its name."""
    if run.install is not None or run.backend is None:
        return None
    config = backends.get(run.backend).check(run.config)
    return next((float(value) for key, value in config.items() if "thresh" in key), None)


def about(model: str, pipe: Any, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """Describe what a comparison was made with: the model, prompts, seeds, and the first request's settings."""
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
