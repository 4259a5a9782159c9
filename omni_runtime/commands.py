"""What the commands of `omni` do: generate, compare, calibrate, backends, models. Their options are in `cli`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from omni_kernels.patching import PatchConflictError
from omni_kernels.patching import backends as registry
from omni_runtime import loading
from omni_runtime.cache import calibration
from omni_runtime.cache.backends import METHODS
from omni_runtime.cache.models import MODELS
from omni_runtime.cli import DEFAULT_MODEL
from omni_runtime.omni import Omni
from omni_runtime.progress import Progress, StepBar, duration
from omni_runtime.request import GenerationRequest
from omni_runtime.result import OmniResult

#: How many of an embedded model's own prompts are calibrated with where none are given.
CALIBRATION_PROMPTS = 24
#: How many a schedule is searched on, and how many others it is measured on.
SCHEDULE_PROMPTS, HELD_OUT_PROMPTS = 4, 8
#: Seeds that a schedule is searched on where none are given: other ones than comparisons take.
SCHEDULE_SEEDS = (1000, 1001)
#: Seconds that a forward of a large model takes, to say what a search will cost: Qwen-Image's at 1024² on an H200.
LARGE_FORWARD = 0.2


class UsageError(Exception):
    """Wrong input; its text is all that the user needs."""


@contextmanager
def wrong_input() -> Iterator[None]:
    """While open, errors that tell of wrong input become a `UsageError`. The pipeline does not run in here."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, PatchConflictError) as error:
        raise UsageError(str(error) or type(error).__name__) from error


def generate(options: argparse.Namespace) -> None:
    """`omni generate`: one PNG or more per prompt, and a summary of each."""
    to_file = options.out.suffix.lower() == ".png"
    if to_file and len(options.prompt) > 1:
        raise UsageError(f"--out {options.out} is one file, for {len(options.prompt)} prompts: give a directory")
    _settle(options)
    how: dict[str, Any] = {"fuse": options.fuse or None, "compile": options.compile}
    if options.cache_backend is not None:
        how["cache_backend"] = options.cache_backend
    with wrong_input():
        omni = _omni(options, cache_config=options.cache_config, **how)
        prompts = options.prompt[0] if len(options.prompt) == 1 else options.prompt
        requests = omni.prepare(prompts, seed=options.seed, **_request_arguments(options))
        _make_directory(options.out.parent if to_file else options.out)
    omni.pipe.set_progress_bar_config(disable=True)
    made = []
    for request in requests:
        with _bar(options, request.prompt or "", request.arguments.get("num_inference_steps", 0)) as bar:
            result = omni.run(request, bar)
        files = result.save(options.out if to_file else _unused(options.out, result))
        made.append({"files": [str(path) for path in files], **_as_json(result)})
        if not options.json:
            print(_summary(result, files), flush=True)
    if options.json:
        _print_json({"results": made})


def compare(options: argparse.Namespace) -> None:
    """`omni compare`: images under every run, a report of them, the numbers behind it, and their table."""
    from omni_runtime import compare as comparison

    _settle(options)
    with wrong_input():
        runs = comparison.make_runs(options.model, options.run, options.steps, options.fewer_steps)
        for run in runs:
            _omni(options, cache_backend=run.backend, cache_config=run.config).check_steps(run.steps)
        omni = _omni(options, cache_backend=None)
        requests = _requests(options, omni)
        _make_directory(options.out)
    pipe = omni.pipe
    pipe.set_progress_bar_config(disable=True)
    omni.close()
    made = 0

    def listener(
        run: comparison.Run, request: GenerationRequest, progress: Progress
    ) -> AbstractContextManager[StepBar | None]:
        nonlocal made
        made = progress.number - 1
        return _bar(options, f"{run.name}: {request.prompt}", run.steps, str(progress))

    try:
        results = comparison.compare(runs, pipe, requests, options.out, listener, options.fresh)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {made} images were made, and are kept in {options.out}: the same command goes on from there"
        ) from None
    found = sum(not cell.made_now for result in results for cell in result.cells)
    if found and not options.quiet:
        print(f"{found} images were there already: --fresh makes them anew", file=sys.stderr)
    document = comparison.evaluate(results, comparison.about(options.model, pipe, requests))
    files = comparison.write(document, options.out)
    if options.json:
        _print_json({"files": [str(path) for path in files], **document})
    else:
        print(comparison.table(document))
        print(*files, sep="\n")


def calibrate(options: argparse.Namespace) -> None:
    """`omni calibrate`: the file, the fit in words, and how to use it."""
    from omni_runtime import calibrate as calibrating

    if options.method == "schedule":
        _calibrate_schedule(options)
        return
    given = [name for name in ("budgets", "held_out", "tries", "batch", "fresh") if getattr(options, name)]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for a schedule: {options.method} has no search")
    options.seeds = options.seeds or [0]
    _settle(options)
    key = calibration.KINDS[options.method].key
    with wrong_input():
        # No weights are loaded: whether the method can serve the model is seen from its index. Five ones are numbers
        # that every method takes.
        out = _calibrated_file(options, options.method, {key: [1.0] * 5})
        omni = _omni(options, cache_backend=None)
        requests = _requests(options, omni, CALIBRATION_PROMPTS)
    steps = requests[0].arguments.get("num_inference_steps", 0)
    omni.pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()

    def listener(number: int, request: GenerationRequest) -> AbstractContextManager[StepBar | None]:
        left = (time.perf_counter() - start) / number * (len(requests) - number) if number else None
        return _bar(options, request.prompt or "", steps, str(Progress(number + 1, len(requests), left)))

    try:
        fitted, document, _ = calibrating.calibrate(omni, requests, listener, options.method)
    except calibration.UselessFitError as error:
        raise UsageError(f"no file was written: {error}") from error
    calibration.write(document, out)
    if options.json:
        _print_json({"file": str(out), **document})
        return
    print(fitted.words())
    print(out)
    print(_taken(options, options.method, {} if options.out is None else {key: str(out)}))


def _calibrated_file(options: argparse.Namespace, method: str, config: dict[str, Any]) -> Path:
    """Where a calibration is to be written, once it is seen that the model can be served."""
    location = _omni(options, cache_backend=method, cache_config=config).location or options.model
    out = calibration.kept_for(location, method) if options.out is None else options.out
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory: give a file, like {out / calibration.file_name(method)}")
    _make_directory(out.parent)
    return out


def _taken(options: argparse.Namespace, method: str, config: dict[str, Any]) -> str:
    """The command that runs with a calibration. One that was kept for the model is found without being named."""
    given = f" --cache-config '{json.dumps(config)}'" if config else ""
    return f"omni generate --model {options.model} --cache-backend {method}{given}"


def _calibrate_schedule(options: argparse.Namespace) -> None:
    """`omni calibrate schedule`: the file, a plot of the search beside it, and the figures of each budget in words."""
    from omni_runtime import calibrate as calibrating
    from omni_runtime import calibrate_schedule as finding
    from omni_runtime.schedule_search import most_steps

    method = finding.VELOCITY_CACHE.name
    options.seeds = options.seeds or list(SCHEDULE_SEEDS)
    _settle(options)
    with wrong_input():
        out = _calibrated_file(options, method, {"budget": 2})
        omni = _omni(options, cache_backend=None)
        searched, others = _searched_and_held_out(options)
        requests = _with_seeds(options, omni, searched, options.seeds)
        other_seeds = [max(options.seeds) + 1 + place for place in range(len(options.seeds))]
        held_out = _with_seeds(options, omni, others, other_seeds)
        steps = requests[0].arguments["num_inference_steps"]
        budgets = options.budgets or sorted({max(2, round(steps / part)) for part in (2, 3, 4, 5)}, reverse=True)
        journal = out.with_suffix(".search.jsonl")
        if options.fresh:
            journal.unlink(missing_ok=True)
    omni.pipe.set_progress_bar_config(disable=True)
    tries = options.tries or finding.TRIES
    if not options.quiet:
        most = most_steps(budgets, tries, len(requests), len(held_out), steps)
        print(
            f"{len(requests)} images; at most {most} computed steps of one image: with guidance {2 * most} forwards, "
            f"{2 * most * LARGE_FORWARD / 3600:.1f} hours at {LARGE_FORWARD} s each",
            file=sys.stderr,
        )

    def listener(event: finding.Event) -> None:
        if not options.quiet:
            left = f"{duration(event.seconds_left)} left at most"
            told = f"{event.budget} steps: {event.number} of {event.tries} schedules, {left}"
            print(f"\r\033[K{told}, best {event.best.score:.2f} dB", end="", file=sys.stderr, flush=True)

    begun = []

    def on_step(number: int, count: int) -> None:
        if options.quiet:
            return
        begun.append(time.perf_counter())
        each = (begun[-1] - begun[0]) / max(1, len(begun) - 1)
        left = f", {duration(each * (count - number))} left" if len(begun) > 1 else ""
        told = f"how the latents respond to each step: {number} of {count} runs{left}"
        print(f"\r\033[K{told}", end="", file=sys.stderr, flush=True)

    try:
        with wrong_input():
            found, document = finding.find(
                omni, requests, held_out, budgets, tries=tries, batch=options.batch or finding.BATCH, journal=journal,
                listener=listener, on_step=on_step,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what was sampled is kept in {journal}: the same command goes on from there"
        ) from None
    if not options.quiet:
        print(file=sys.stderr)
    document = calibrating.schedule_document(omni, requests, held_out, document)
    calibration.write(document, out)
    picture = out.with_suffix(".search.svg")
    picture.write_text(finding.plot(found), encoding="utf-8")
    if options.json:
        _print_json({"files": [str(out), str(picture)], **document})
        return
    print(*finding.words(found), out, picture, sep="\n")
    print(_taken(options, method, ({} if options.out is None else {"calibration": str(out)}) | {"budget": budgets[0]}))


_Prompts = Sequence[tuple[str, Path | None]]


def _searched_and_held_out(options: argparse.Namespace) -> tuple[_Prompts, _Prompts]:
    """The prompts that a schedule is searched on, and others that it is measured on.

    Of an embedded model's own prompts, the former are those that no comparison of it is made on. Of prompts that are
    given, every fourth is held out, unless others are given for that.
    """
    from omni_runtime import compare as comparison

    if options.prompts:
        given = list(dict.fromkeys(_prompts_and_images(options, SCHEDULE_PROMPTS, options.prompts)))
        texts = list(dict.fromkeys(text for text, _ in given))
        if not options.held_out and len(texts) < 2:
            raise UsageError("--held-out is missing: a schedule is measured on prompts that it was not searched on")
        if options.held_out:
            searched, held_out = given, _prompts_and_images(options, SCHEDULE_PROMPTS, options.held_out)
        else:
            searched = [one for one in given if one[0] not in texts[1::4]]
            held_out = [one for one in given if one[0] in texts[1::4]]
    else:
        searched = _own_prompts(options, comparison.prompts_left(options.model, SCHEDULE_PROMPTS))
        known = {prompt for prompt, _ in searched}
        everything = _prompts_and_images(options, sys.maxsize, options.held_out)
        held_out = [one for one in everything if options.held_out or one[0] not in known]
        if not options.held_out:
            held_out = held_out[:: max(1, len(held_out) // HELD_OUT_PROMPTS)][:HELD_OUT_PROMPTS]
    both = {prompt for prompt, _ in searched} & {prompt for prompt, _ in held_out}
    if both:
        raise UsageError(f"--held-out has prompts that are searched on: {', '.join(sorted(both))}")
    return searched, held_out


def backends(options: argparse.Namespace) -> None:
    """`omni backends`: every cache backend, its keys, their defaults and what is allowed."""
    known = registry.available()
    found = {name: known[name] for name in (*METHODS, *known) if name in known}
    if options.json:
        fields = ("name", "default", "type_name", "allowed", "doc")
        _print_json(
            {
                name: {"summary": one.summary, "keys": [{f: getattr(key, f) for f in fields} for key in one.keys]}
                for name, one in found.items()
            }
        )
        return
    for name, one in found.items():
        print(f"{name}\n  {one.summary}")
        defaults = {key.name: json.dumps(key.default) for key in one.keys}
        width, default_width = (max(map(len, words), default=0) for words in (defaults, defaults.values()))
        for key in one.keys:
            print(f"    {key.name:<{width}}  {defaults[key.name]:<{default_width}}  {key.doc} ({key.allowed})")
        print()
    print("""omni generate --cache-backend NAME --cache-config '{"key": value}'""")


def models(options: argparse.Namespace) -> None:
    """`omni models`: the embedded models, and the transformers that the caches know."""
    embedded = {name: _embedded(path) for name, path in loading.embedded_models().items()}
    if options.json:
        transformers = {
            name: {
                "pipelines": list(row.pipelines),
                "tea_coefficients": row.tea_coefficients,
                "mag_ratios": row.mag_ratios,
            }
            for name, row in MODELS.items()
        }
        _print_json({"embedded": embedded, "transformers": transformers})
        return
    print("Embedded models")
    for name, about in embedded.items():
        print(f"  {name}{' (default)' * (name == DEFAULT_MODEL)}: {about['pipeline']}, {about['bytes'] / 1e6:.1f} MB")
        for key, value in about["defaults"].items():
            print(f"    {key} {json.dumps(value)}")
        for method, kind in calibration.KINDS.items():
            print(f"    {method} {kind.key}: {about[method] or 'those published for its transformer'}")
    if not embedded:
        print("  none in this installation")
    print("\nTransformers that the caches know, with their pipelines; any checkpoint of these can be loaded")
    for transformer, row in MODELS.items():
        print(f"  {transformer}")
        if row.tea_coefficients is not None:
            print(f"    tea_cache coefficients {', '.join(f'{one:g}' for one in row.tea_coefficients)}")
        if row.mag_ratios is not None:
            print(f"    mag_cache mag_ratios of {len(row.mag_ratios)} steps")
        for pipeline in row.pipelines:
            print(f"    {pipeline}")


# Before the pipeline runs


def _settle(options: argparse.Namespace) -> None:
    """Silence the libraries that are imported from here on, and choose the number of threads."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if options.quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with wrong_input():
        on_cpu = loading.resolve_device(options.device).type == "cpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif on_cpu and options.model in loading.embedded_models():
        torch.set_num_threads(1)


def _omni(options: argparse.Namespace, **how: Any) -> Omni:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    given = {name: getattr(options, name) for name in ("revision", "variant") if getattr(options, name) is not None}
    return Omni(options.model, dtype=options.dtype, device=options.device, **how, **given)


def _request_arguments(options: argparse.Namespace) -> dict[str, Any]:
    width, height = options.size or (None, None)
    images = options.image or []
    if dict(options.set).get("output_type", "pil") != "pil":
        raise UsageError("images are written as PNG: output_type cannot be set")
    return {
        "negative_prompt": options.negative_prompt,
        "image": images[0] if len(images) == 1 else images or None,
        "num_inference_steps": options.steps,
        "width": width,
        "height": height,
        **dict(options.set),
    }


def _prompts(given: Sequence[str]) -> list[str]:
    """The prompts themselves, and the lines of those that are files."""
    prompts = []
    for one in given:
        if len(one) < 256 and Path(one).is_file():
            prompts += [line.strip() for line in Path(one).read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            prompts.append(one)
    return prompts


def _requests(options: argparse.Namespace, omni: Omni, count: int = 6) -> list[GenerationRequest]:
    """Every prompt with every seed; `count` of the model's own prompts where none is given."""
    return _with_seeds(options, omni, _prompts_and_images(options, count, options.prompts), options.seeds)


def _with_seeds(
    options: argparse.Namespace, omni: Omni, prompts: Sequence[tuple[str, Path | None]], seeds: Sequence[int]
) -> list[GenerationRequest]:
    arguments = _request_arguments(options)
    return [
        request
        for prompt, image in prompts
        for seed in seeds
        for request in omni.prepare(prompt, seed=seed, **arguments | ({} if image is None else {"image": image}))
    ]


def _prompts_and_images(
    options: argparse.Namespace, count: int, given: Sequence[str] | None = None
) -> list[tuple[str, Path | None]]:
    """The prompts, each with a picture of its own where an embedded model brings one."""
    from omni_runtime import compare as comparison

    if not given:
        return _own_prompts(options, comparison.prompts_of(options.model, count))
    prompts: list[tuple[str, Path | None]] = []
    for one in given:
        if one == "@model":
            prompts += comparison.prompts_of(options.model, None)
        elif one.startswith("@"):
            texts = comparison.PROMPT_SETS.get(one[1:])
            if texts is None:
                known = ", ".join(f"@{name}" for name in ("model", *comparison.PROMPT_SETS))
                raise UsageError(f"no set of prompts is called {one!r}: there are {known}")
            prompts += [(text, None) for text in texts]
        else:
            prompts += [(text, None) for text in _prompts([one])]
    return prompts


def _own_prompts(
    options: argparse.Namespace, found: Sequence[tuple[str, Path | None]]
) -> list[tuple[str, Path | None]]:
    """Those that the model brings, with the picture that is given instead of theirs, if any."""
    from omni_runtime import compare as comparison

    if not found:
        sets = " or ".join(f"@{name}" for name in comparison.PROMPT_SETS)
        raise UsageError(f"{options.model} has no prompts of its own: give --prompts, such as {sets}")
    return [(prompt, None if options.image else image) for prompt, image in found]


def _make_directory(path: Path) -> None:
    """Now, and not when the first image is done: a directory that cannot be made is wrong input."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write into {path}")


# The run and its result


def _bar(options: argparse.Namespace, label: str, steps: int, note: str = "") -> AbstractContextManager[StepBar | None]:
    return nullcontext() if options.quiet else StepBar(label, sys.stderr, steps, note)


def _unused(directory: Path, result: OmniResult) -> Path:
    """A file name that says what is in it, and that no file has yet."""
    words = re.sub(r"\W+", "-", (result.prompt or "image").lower()).strip("-")[:60].strip("-") or "image"
    backend = result.settings["cache_backend"]
    stem = f"{words}-seed{result.seed}" + (f"-{backend}" if backend else "")
    path, number = directory / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}.png"
    return path


def _summary(result: OmniResult, files: Sequence[Path]) -> str:
    times = result.timings
    lines = [
        *map(str, files),
        f"  seed {result.seed}, {len(times.steps)} steps in {times.total:.2f} s "
        f"({times.before:.2f} before the first, {times.after:.2f} after the last)",
    ]
    report = result.cache
    if report is not None:
        total = report.forwards + report.forwards_saved
        lines.append(
            f"  {report.backend}: {report.forwards} of {total} transformer forwards computed, "
            f"{report.forwards_saved} reused; {report.blocks_run / max(report.blocks_total, 1):.0%} of the blocks run"
        )
        lines += [f"  {note}" for note in report.notes]
    return "\n".join(lines)


def _as_json(result: OmniResult) -> dict[str, Any]:
    return {
        "prompt": result.prompt,
        "seed": result.seed,
        "settings": result.settings,
        "cache": None if result.cache is None else result.cache.to_dict(),
        "timings": result.timings.to_dict(),
    }


def _embedded(path: Path) -> dict[str, Any]:
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    defaults = path / "defaults.json"
    own = {method: calibration.own_file(str(path), method) for method in calibration.KINDS}
    return {
        "pipeline": index["_class_name"],
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "defaults": json.loads(defaults.read_text(encoding="utf-8")) if defaults.is_file() else {},
        **{
            method: f"calibrated on {calibration.summary(calibration.read(file, method))}" if file else None
            for method, file in own.items()
        },
    }


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1), flush=True)
