"""Measures the speed and picture quality of every cache on the embedded models, ours and the libraries'.

    python -m benchmarks.quality                 # all models, 32 prompts × 3 seeds, 50 steps with guidance: hours
    python -m benchmarks.quality --quick         # `make quality`: two prompts, fewer settings, minutes

Each model has these runs: our caches, each over its range of settings; the caches of the cache-dit library and of
diffusers, installed as their users install them; and plain sampling with fewer steps, which needs no cache. All runs
take turns on each prompt and seed. Every image is compared with the full run of the same prompt and seed.
`omni_runtime.compare.comparison` makes, saves and measures the cells, so an interrupted run continues where it
stopped.

Two runs of the same method and settings, ours and theirs, are a pair. `--check` exits with 1 if ours is worse in mean
PSNR (by more than 0.1 dB) or slower (if the median over images of our speedup over theirs is below 0.98, which allows
2% of noise), or if a calibrated schedule misses a goal (`aims`).

Writes results/quality-<model>.json and .svg, and a report.html with all pictures under --work.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import libraries
from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.cache.presets import PRESETS
from omni_runtime.cache.schedules import early, even
from omni_runtime.compare import comparison as compare
from omni_runtime.compare import report_html, showing
from omni_runtime.compare.cells import Run
from omni_runtime.compare.comparison import IDENTITY, REFERENCE
from omni_runtime.generation.loading import embedded_models
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.progress import Progress

STEPS = 50
PROMPTS, SEEDS = compare.COMPARED, 3
QUICK_PROMPTS = 2
PSNR_SLACK, TIME_SLACK = 0.1, 0.98
#: Computed steps → how many dB a calibrated schedule's mean PSNR must be above plain sampling with as many steps.
ABOVE_PLAIN = {32: 0.0, 25: 8.0, 17: 8.0, 13: 0.0, 10: 0.0, 8: 0.0}
#: Computed steps → how many dB it must be above every cache of blocks with no fewer forwards.
ABOVE_BLOCKS = {25: 3.0, 17: 3.0}
#: How many dB a run must be better to be told by `behind`.
BETTER = 0.05
#: Backends that compute the steps of a schedule.
SCHEDULED = ("velocity_cache", "auto")
#: Backends that are not caches of blocks.
WHOLE_STEPS = (None, "velocity_cache", "easy_cache", "auto")

FEWER_STEPS = (40, 32, 25, 20, 17, 16, 13, 10, 8)
DBCACHE = (0.04, 0.08, 0.12, 0.2, 0.3)
FORECAST = (0.08, 0.12)
FIRST_BLOCK = (0.04, 0.07, 0.1, 0.15)
VELOCITY_SHARES = (0.9, 0.8, 0.72, 0.64, 0.5, 0.34, 0.26, 0.2, 0.16)  # 45, 40, 36, 32, 25, 17, 13, 10 and 8 of 50 steps
UNDAMPED_SHARES = (0.26, 0.2)
#: Forecasts are not limited to the last gap, and skipped steps are not corrected.
UNDAMPED = {"reach": 1000.0, "corrector_order": 0}
TEA_CACHE = (0.045, 0.05, 0.055, 0.075, 0.09, 0.13, 0.2, 0.3)  # on each model, some are near 25 and 17 of 50 steps
MASKS = ("slow", "medium", "fast", "ultra")
MAG_CACHE = (0.03, 0.06, 0.12, 0.24)
SEA_CACHE = (0.1, 0.15, 0.25, 0.4)
EASY_CACHE = (0.05, 0.08, 0.12, 0.3, 1.0)  # about 38 to 13 of 50 steps on emoji-qwen-image
TAYLOR_INTERVALS = (2, 3, 4, 6)


@dataclass(frozen=True)
class Pair:
    """Two runs, by name, of the same method at the same settings."""

    ours: str
    theirs: str


@dataclass
class Contest:
    """The runs of one model, the pairs among them, and what was left out and why."""

    runs: list[Run]
    pairs: list[Pair] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def _dbcache(contest: Contest, label: str, settings: Mapping[str, Any], method: str) -> None:
    ours, theirs = f"{method} {label}", f"cache-dit {method} {label}"
    contest.runs.append(Run(ours, "cache_dit", settings, STEPS, method))
    contest.runs.append(libraries.cache_dit_run(theirs, f"cache-dit {method}", settings, STEPS))
    contest.pairs.append(Pair(ours, theirs))


def contest_of(ratios: Sequence[float] | None, quick: bool) -> Contest:
    """All runs of a model.

    Args:
        ratios: MagCache's for the model; None if diffusers cannot measure them: then ours come from the model's file.
        quick: one setting of each method.
    """

    def some(values: Sequence[Any]) -> Sequence[Any]:
        return values[len(values) // 2 :][:1] if quick else values

    contest = Contest([Run(REFERENCE, steps=STEPS)])
    for steps in (25, 16) if quick else FEWER_STEPS:
        contest.runs.append(Run(f"{steps} steps", steps=steps))
    for budget in (round(STEPS * share) for share in some(VELOCITY_SHARES)):
        contest.runs.append(Run(f"velocity {budget}", "velocity_cache", {"budget": budget}, STEPS, "velocity cache"))
        for label, method, schedule in (("uncalibrated", "uncalibrated", early), ("even", "evenly spread", even)):
            if schedule is early and early(STEPS, budget).computed == even(STEPS, budget).computed:
                continue
            config = {"schedule": list(schedule(STEPS, budget).computed)}
            name = f"velocity, {label} {budget}"
            contest.runs.append(Run(name, "velocity_cache", config, STEPS, f"velocity, {method}"))
    for preset in some([name for name, times in PRESETS.items() if times is not None]):
        contest.runs.append(Run(f"auto, {preset}", "auto", {"quality": preset}, STEPS, "auto"))
    for budget in (round(STEPS * share) for share in some(UNDAMPED_SHARES)):
        name, config = f"velocity {budget}, undamped", {"budget": budget, **UNDAMPED}
        contest.runs.append(Run(name, "velocity_cache", config, STEPS, "velocity cache, undamped"))
    for policy in some(MASKS):
        config = {"schedule": f"scm-{policy}"}
        contest.runs.append(Run(f"velocity, scm-{policy}", "velocity_cache", config, STEPS, "velocity, SCM"))
    for threshold in some(TEA_CACHE):
        config = {"rel_l1_thresh": threshold, "coefficients": IDENTITY}
        contest.runs.append(Run(f"TeaCache {threshold:g}", "tea_cache", config, STEPS, "TeaCache"))
        config = config | {"forecaster": "newton"}
        contest.runs.append(Run(f"TeaCache + Newton {threshold:g}", "tea_cache", config, STEPS, "TeaCache + Newton"))
    for threshold in some(DBCACHE):
        settings = {"residual_diff_threshold": threshold}
        _dbcache(contest, f"{threshold:g}", settings, "DBCache")
        _dbcache(contest, f"{threshold:g}", settings | {"enable_taylorseer": True}, "DBCache + TaylorSeer")
    for threshold in some(FORECAST):
        settings = {"residual_diff_threshold": threshold}
        _dbcache(contest, f"{threshold:g}", settings | {"forecaster": "foca"}, "DBCache + FoCa")
        _dbcache(contest, f"{threshold:g}", settings | {"forecaster": "dmd"}, "DBCache + DMD")
        settings = settings | {"forecaster": "hermite", "forecaster_order": 2}
        contest.runs.append(Run(f"DBCache + HiCache {threshold:g}", "cache_dit", settings, STEPS, "DBCache + HiCache"))
    for policy in some(MASKS):
        settings = {"scm_steps_mask_policy": policy, "scm_steps_policy": "static", "enable_taylorseer": True}
        _dbcache(contest, policy, settings, "SCM + TaylorSeer")
    for threshold in some(FIRST_BLOCK):
        ours, theirs = f"first-block {threshold:g}", f"diffusers first-block {threshold:g}"
        settings = {"threshold": threshold}
        contest.runs.append(Run(ours, "first_block_cache", settings, STEPS, "first-block"))
        contest.runs.append(
            libraries.diffusers_run(theirs, "diffusers first-block", "FirstBlockCacheConfig", settings, STEPS)
        )
        contest.pairs.append(Pair(ours, theirs))
    for threshold in some(MAG_CACHE):
        ours, theirs = f"MagCache {threshold:g}", f"diffusers MagCache {threshold:g}"
        settings = {"threshold": threshold} | ({} if ratios is None else {"mag_ratios": list(ratios)})
        contest.runs.append(Run(ours, "mag_cache", settings, STEPS, "MagCache"))
        if ratios is not None:
            contest.runs.append(
                libraries.diffusers_run(theirs, "diffusers MagCache", "MagCacheConfig", settings, STEPS)
            )
            contest.pairs.append(Pair(ours, theirs))
    for threshold in some(SEA_CACHE):
        contest.runs.append(Run(f"SeaCache {threshold:g}", "sea_cache", {"threshold": threshold}, STEPS, "SeaCache"))
    for threshold in some(EASY_CACHE):
        config = {"thresh": threshold}
        contest.runs.append(Run(f"EasyCache {threshold:g}", "easy_cache", config, STEPS, "EasyCache"))
        config = config | {"forecaster": "newton"}
        contest.runs.append(Run(f"EasyCache + Newton {threshold:g}", "easy_cache", config, STEPS, "EasyCache + Newton"))
    for interval in some(TAYLOR_INTERVALS):
        settings = {"cache_interval": interval, "max_order": 1, "taylor_factors_dtype": "float32"}
        name = f"diffusers TaylorSeer {interval}"
        contest.runs.append(
            libraries.diffusers_run(name, "diffusers TaylorSeer", "TaylorSeerCacheConfig", settings, STEPS)
        )
    return contest


def generate(pipe: Any, request: GenerationRequest) -> None:
    """Run one request without a cache of ours."""
    with Omni(pipe, cache_backend=None) as omni:
        omni.run(request)


def leave_out(contest: Contest, pipe: Any, request: GenerationRequest) -> None:
    """Remove the runs that this model cannot have: the libraries' methods that raise an error, each tried once, and our
    caches that are refused.

    Raises:
        RuntimeError: a library left a hook on the pipeline.
    """
    tried: dict[str | None, str | None] = {}
    methods = {run.name: str(run.method) for run in contest.runs}
    contest.runs, refused = compare.possible(contest.runs, pipe)
    contest.left_out |= {methods[name]: why for name, why in refused.items()}
    for run in list(contest.runs):
        if run.install is None:
            continue
        if run.method not in tried:
            tried[run.method] = None
            try:
                with run.install(pipe):
                    generate(pipe, request)
            except Exception as error:
                tried[run.method] = f"{type(error).__name__}: {error}".split("\n")[0]
            if not libraries.is_clean(pipe):
                raise RuntimeError(f"{run.backend} left its hooks on the pipeline")
        if tried[run.method] is not None:
            contest.runs.remove(run)
            contest.left_out[str(run.method)] = str(tried[run.method])
    names = {run.name for run in contest.runs}
    contest.pairs = [pair for pair in contest.pairs if {pair.ours, pair.theirs} <= names]


def requests_of(omni: Omni, model: str, prompts: int, seeds: int) -> list[GenerationRequest]:
    """Prompts of the model, evenly spread over its list, each with every seed."""
    return [
        request
        for prompt, image in compare.prompts_of(model, prompts)
        for seed in range(seeds)
        for request in omni.prepare(prompt, seed=seed, num_inference_steps=STEPS, **({"image": image} if image else {}))
    ]


def compared(pair: Pair, document: Mapping[str, Any]) -> dict[str, Any]:
    """A pair's figures: mean PSNR of both, how many times as fast ours is (median over images), and whether that is
    enough.

    An image that is identical to the reference counts with 100 dB.
    """
    runs = {run["name"]: run for run in document["runs"]}
    ours, theirs = runs[pair.ours], runs[pair.theirs]
    ratio = statistics.median(a["speedup"] / b["speedup"] for a, b in zip(ours["cells"], theirs["cells"], strict=True))
    psnr, their_psnr = _mean_psnr(ours), _mean_psnr(theirs)
    return {
        "ours": pair.ours,
        "theirs": pair.theirs,
        "psnr": round(psnr, 2),
        "their_psnr": round(their_psnr, 2),
        "nfe": ours["nfe"]["mean"],
        "their_nfe": theirs["nfe"]["mean"],
        "times_as_fast": round(ratio, 3),
        "as_good": psnr >= their_psnr - PSNR_SLACK,
        "as_fast": ratio >= TIME_SLACK,
    }


def aims(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goals of the calibrated schedules whose runs exist, as differences of PSNR in dB.

    Each cache of blocks is compared by the run with the fewest forwards among those with at least as many as the
    schedule; one that has skipped nothing (diffusers' TaylorSeer on Wan) is none. The schedule's 5th percentile must be
    at least as high, too. Neither may be below evenly spread steps, nor may the default schedule of models without a
    calibration.
    """
    runs = {run["name"]: run for run in document["runs"]}
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for run in document["runs"]:
        if run["cache_backend"] not in WHOLE_STEPS and not _identical(run):
            blocks.setdefault(run["method"], []).append(run)
    found = []

    def aim(ours: str, theirs: str, least: float, statistic: Callable[[Mapping[str, Any]], float], told: str) -> None:
        figure = round(statistic(runs[ours]) - statistic(runs[theirs]), 2) + 0.0  # no -0.0
        what = f"{ours} above {theirs}, {told}"
        found.append({"what": what, "figure": figure, "at_least": least, "met": figure >= least})

    for budget, above in ABOVE_PLAIN.items():
        ours, plain = f"velocity {budget}", f"{budget} steps"
        if ours not in runs or plain not in runs:
            continue
        aim(ours, plain, above, _mean_psnr, "mean")
        aim(ours, plain, 0.0, _low_psnr, "5th percentile")
        spread = f"velocity, even {budget}"
        if spread in runs:
            aim(ours, spread, 0.0, _mean_psnr, "mean")
            aim(ours, spread, 0.0, _low_psnr, "5th percentile")
        usual = f"velocity, uncalibrated {budget}"
        if spread in runs and usual in runs:
            aim(usual, spread, 0.0, _mean_psnr, "mean")
            aim(usual, spread, 0.0, _low_psnr, "5th percentile")
        if budget not in ABOVE_BLOCKS:
            continue
        least = runs[ours]["nfe"]["mean"]
        enough = [[run for run in method if run["nfe"]["mean"] >= least] for method in blocks.values()]
        rivals = [min(some, key=lambda run: run["nfe"]["mean"]) for some in enough if some]
        if rivals:
            aim(ours, max(rivals, key=_mean_psnr)["name"], ABOVE_BLOCKS[budget], _mean_psnr, "mean")
            aim(ours, max(rivals, key=_low_psnr)["name"], 0.0, _low_psnr, "5th percentile")
    return found


def behind(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that have a better picture than the velocity cache with as many forwards, by 0.05 dB or more.

    Forwards are counted per 100 of the full run; runs with 16 to 90 of them count, which is where the velocity cache
    has runs. Between two of its runs, its PSNR is interpolated. Its runs are those of the calibrated schedules.
    """
    whole = next((run["nfe"]["mean"] for run in document["runs"] if run["name"] == REFERENCE), None)
    if whole is None:
        return []
    runs = {run["name"]: run for run in document["runs"] if "psnr" in run and not _identical(run)}

    def forwards(run: Mapping[str, Any]) -> float:
        return 100 * float(run["nfe"]["mean"]) / whole

    own = sorted((run for run in runs.values() if run["method"] == "velocity cache"), key=forwards)
    found = []
    for statistic, value in (("mean", _mean_psnr), ("5th percentile", _low_psnr)):
        for run in runs.values():
            at = forwards(run)
            if run in own or not own or not forwards(own[0]) <= at <= forwards(own[-1]):
                continue
            ours = float(np.interp(at, [forwards(one) for one in own], [value(one) for one in own]))
            if value(run) - ours >= BETTER:
                figures = {"forwards": round(at, 1), "psnr": round(value(run), 2), "ours": round(ours, 2)}
                found.append({"run": run["name"], "statistic": statistic, **figures})
    return found


def _identical(run: Mapping[str, Any]) -> bool:
    """Whether all images of a run are the reference's."""
    return run.get("psnr", {"mean": 0.0})["mean"] is None


def _psnr(run: Mapping[str, Any]) -> list[float]:
    """PSNR of all images; identical ones count with 100 dB."""
    return [100.0 if cell["psnr"] is None else cell["psnr"] for cell in run["cells"]]


def _mean_psnr(run: Mapping[str, Any]) -> float:
    return statistics.fmean(_psnr(run)) if "cells" in run else run["psnr"]["mean"]


def _low_psnr(run: Mapping[str, Any]) -> float:
    return float(np.percentile(_psnr(run), 5)) if "cells" in run else run["psnr"]["p5"]


def computed_steps(run: Mapping[str, Any]) -> list[int] | None:
    """The computed steps of a run; None if they differ between images or branches (no schedule)."""
    found = {
        tuple(step for step, bit in enumerate(branch["computed"]) if bit == "1")
        for cell in run["cells"]
        for branch in cell["branches"].values()
    }
    return list(found.pop()) if len(found) == 1 else None


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without its cells, small enough for a repository; scheduled runs get their computed steps."""
    runs = [
        {key: value for key, value in run.items() if key != "cells"}
        | ({"computed": computed_steps(run)} if "cells" in run and run["cache_backend"] in SCHEDULED else {})
        for run in document["runs"]
    ]
    return {**document, "runs": runs}


@contextlib.contextmanager
def _told(run: Run, request: GenerationRequest, progress: Progress) -> Iterator[None]:
    print(f"\r\033[K{progress} {run.name}: {request.prompt}, seed {request.seed}", end="", file=sys.stderr, flush=True)
    yield


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make or load a model's images; the document of results.json with the pairs, the aims and the left-out
    methods."""
    with Omni(model, device="cpu", cache_backend=None) as omni:
        requests = requests_of(omni, model, options.prompts, options.seeds)
        pipe = omni.pipe
    pipe.set_progress_bar_config(disable=True)
    ratios = None
    if hasattr(pipe.transformer, "enable_cache"):
        ratios = libraries.mag_ratios(pipe, lambda: generate(pipe, requests[0]), STEPS)
    contest = contest_of(ratios, options.quick)
    names = [run.name for run in contest.runs]
    before = None if options.only is None else known(options.out / f"quality-{model}.json", options)
    if options.only is not None:
        contest.runs = [run for run in contest.runs if run.name == REFERENCE or matches(run.name, options.only)]
        contest.pairs = []
    leave_out(contest, pipe, requests[0])
    results = compare.compare(contest.runs, pipe, requests, options.work / model, _told)
    print(file=sys.stderr)
    document = compare.evaluate(results, compare.about(model, pipe, requests))
    showing.write(document, options.work / model)
    made = {"command": options.command.format(model), "machine": machine(torch.device("cpu")), **document}
    if before is not None:
        return merged(made, before, names)
    pairs = [compared(pair, document) for pair in contest.pairs]
    return {**made, "pairs": pairs, "aims": aims(document), "behind": behind(document), "left_out": contest.left_out}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a run's name fits one of the patterns of --only."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def known(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The earlier results of the same prompts and seeds, of which --only keeps the other runs.

    Raises:
        SystemExit: there are none, or they are of other images.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    images = next((run["psnr"]["identical"] for run in before.get("runs", ()) if run["name"] == REFERENCE), 0)
    if images != options.prompts * options.seeds:
        raise SystemExit(f"--only needs results of as many images in {path}; there are {images}")
    return before


def merged(made: dict[str, Any], before: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """New results, with the runs that were not made again kept from earlier ones.

    The reference was made again, too, so that the speedups of the new runs are of the same sitting; those that are kept
    are of theirs.

    Args:
        made: the new results.
        before: the earlier ones.
        names: all runs of the contest, in order; others are dropped.
    """
    new = {run["name"]: run for run in made["runs"]}
    old = {run["name"]: run for run in before["runs"] if run["name"] in names and run["name"] not in new}
    document = {**made, "runs": [{**old, **new}[name] for name in names if name in old or name in new]}
    kept = {"pairs": before["pairs"], "left_out": before["left_out"], "kept": list(old)}
    return {**document, **kept, "aims": aims(document), "behind": behind(document)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=sorted(embedded_models()), default=sorted(embedded_models()))
    parser.add_argument("--prompts", type=int, help=f"prompts of each model (default {PROMPTS}; quick {QUICK_PROMPTS})")
    parser.add_argument("--seeds", type=int, help=f"seeds of each prompt (default {SEEDS}; quick 1)")
    parser.add_argument("--quick", action="store_true", help="one setting of each method")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="make only runs of these names, such as 'velocity*,auto*', and keep the others of the results file",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a pair or an aim is missed")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="where images are saved")
    parser.add_argument("--out", type=Path, help=f"where results are written (default {RESULTS.name}/; quick: --work)")
    options = parser.parse_args(argv)
    options.prompts = options.prompts or (QUICK_PROMPTS if options.quick else PROMPTS)
    options.seeds = options.seeds or (1 if options.quick else SEEDS)
    out = options.out = options.out or (options.work if options.quick else RESULTS)
    given = {"prompts": PROMPTS, "seeds": SEEDS}
    changed = [
        f" --{name} {getattr(options, name)}" for name, usual in given.items() if getattr(options, name) != usual
    ]
    quick = " --quick" if options.quick else "".join(changed)
    # The command in each model's file, without --work and the other models, which do not change the results.
    options.command = f"python -m benchmarks.quality --model {{}}{quick}"
    torch.set_num_threads(1)  # on models this small, two threads are many times slower
    holds = True
    for model in options.model:
        found = measure(model, options)
        write(out / f"quality-{model}.json", summary(found))
        (out / f"quality-{model}.svg").write_text(report_html.plot_svg(found), encoding="utf-8")
        print(f"\n{model}\n{showing.table(found)}")
        for pair in found["pairs"]:
            met = pair["as_good"] and pair["as_fast"]
            holds = holds and met
            told = f"{pair['ours']}: {pair['psnr']:.1f} dB, theirs {pair['their_psnr']:.1f}"
            print(f"{'holds ' if met else 'BEHIND'}  {told}; {pair['times_as_fast']:.2f} times as fast")
        for one in found["aims"]:
            holds = holds and one["met"]
            told = "reached" if one["met"] else "MISSED "
            print(f"{told}  {one['what']}: {one['figure']:g} dB, at least {one['at_least']:g}")
        for one in found["behind"]:
            told = f"{one['run']} at {one['forwards']:g} of 100 forwards: {one['psnr']:g} dB, ours {one['ours']:g}"
            print(f"behind    {told} ({one['statistic']})")
        for method, why in found["left_out"].items():
            print(f"left out  {method}: {why}")
    return int(options.check and not holds)


if __name__ == "__main__":
    sys.exit(main())
