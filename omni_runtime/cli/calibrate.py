"""`omni calibrate`: write a method's calibration file for one model, and print the fit and a command that uses it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from omni_kernels.patching.quantised import options_of
from omni_runtime import files
from omni_runtime.cache import calibration
from omni_runtime.cache.methods import VELOCITY_CACHE
from omni_runtime.calibrate import fitting, precision
from omni_runtime.calibrate import schedule as finding
from omni_runtime.calibrate.images import ROUNDS
from omni_runtime.calibrate.search import most_steps
from omni_runtime.cli.inputs import (
    bar,
    make_directory,
    make_omni,
    own_prompts,
    prompts_and_images,
    settle,
    with_seeds,
    wrong_input,
)
from omni_runtime.cli.options import UsageError
from omni_runtime.cli.output import print_json
from omni_runtime.compare import comparison
from omni_runtime.generation.loading import embedded_models
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.progress import Line, Progress, StepBar, duration

Prompts = Sequence[tuple[str, Path | None]]

#: How many of an embedded model's own prompts are used for calibration if none are given.
CALIBRATION_PROMPTS = 24
#: How many prompts a schedule is searched on, and how many others it is measured on.
SCHEDULE_PROMPTS, HELD_OUT_PROMPTS = 16, 16
#: How many of these prompts are used to measure layers, and how many others to measure the result.
PRECISION_PROMPTS = 8
#: Shares of the steps that are computed by default: a schedule is searched for each.
SHARES = (0.64, 0.5, 0.34, 0.26, 0.2, 0.16)
#: Default seeds for the search of a schedule; comparisons use others.
SCHEDULE_SEEDS = (1000, 1001)
#: Seconds per forward of a large model (Qwen-Image at 1024² on an H200), to estimate what a search costs.
LARGE_FORWARD = 0.2


def calibrate(options: argparse.Namespace) -> None:
    """Fit a method's numbers, or search for schedules."""
    if options.method != "precision" and (options.quantize or options.psnr or options.min_width is not None):
        raise UsageError(f"--quantize, --psnr and --min-width are for precision, not for {options.method}")
    if options.method == "schedule":
        _calibrate_schedule(options)
        return
    if options.method == "precision":
        _calibrate_precision(options)
        return
    given = [name for name in ("budgets", "held_out", "tries", "batch", "fresh") if getattr(options, name)]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for a schedule: {options.method} has no search")
    options.seeds = options.seeds or [0]
    settle(options)
    key = calibration.KINDS[options.method].key
    with wrong_input():
        # No weights are loaded: the model's index shows whether the method supports it. Every method accepts five 1.0
        # values.
        out = _calibrated_file(options, options.method, {key: [1.0] * 5})
        omni = make_omni(options, cache_backend=None)
        prompts = prompts_and_images(options, CALIBRATION_PROMPTS, options.prompts)
        requests = with_seeds(options, omni, prompts, options.seeds)
    steps = requests[0].arguments.get("num_inference_steps", 0)
    omni.pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()

    def listener(number: int, request: GenerationRequest) -> AbstractContextManager[StepBar | None]:
        left = (time.perf_counter() - start) / number * (len(requests) - number) if number else None
        return bar(options, request.prompt or "", steps, str(Progress(number + 1, len(requests), left)))

    try:
        fitted, document, _ = fitting.calibrate(omni, requests, listener, options.method)
    except calibration.UselessFitError as error:
        raise UsageError(f"no file was written: {error}") from error
    calibration.write(document, out)
    if options.json:
        print_json({"file": str(out), **document})
        return
    config = {} if options.out is None else {key: str(out)}
    print(fitted.words(), out, _taken(options, prompts[0], options.method, config), sep="\n")


def _calibrated_file(options: argparse.Namespace, method: str, config: dict[str, Any]) -> Path:
    """Check that the method supports the model, and return the path for the calibration file."""
    location = make_omni(options, cache_backend=method, cache_config=config).location or options.model
    out = calibration.kept_for(location, method) if options.out is None else options.out
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory: give a file, like {out / calibration.file_name(method)}")
    make_directory(out.parent)
    return out


def _taken(options: argparse.Namespace, first: tuple[str, Path | None], method: str, config: dict[str, Any]) -> str:
    """Return a shell command that makes the first prompt's image with the new calibration.

    A calibration in the user's data directory is found by itself, so the command does not name it.
    """
    prompt, picture = first
    words = ["omni", "generate", "--model", options.model, "--prompt", prompt]
    for image in options.image or [picture]:
        words += [] if image is None else ["--image", str(image)]
    words += [] if options.negative_prompt is None else ["--negative-prompt", options.negative_prompt]
    words += [] if options.steps is None else ["--steps", str(options.steps)]
    words += [] if options.size is None else ["--size", "x".join(map(str, options.size))]
    for name, value in options.set:
        words += ["--set", f"{name}={json.dumps(value, ensure_ascii=False)}"]
    words += ["--cache-backend", method]
    words += ["--cache-config", json.dumps(config, ensure_ascii=False)] if config else []
    return shlex.join(words)


def _calibrate_schedule(options: argparse.Namespace) -> None:
    """Write the file of schedules and a plot of the search next to it, and print each budget's results."""
    method = VELOCITY_CACHE.name
    options.seeds = options.seeds or list(SCHEDULE_SEEDS)
    settle(options)
    with wrong_input():
        out = _calibrated_file(options, method, {"budget": 2})
        omni = make_omni(options, cache_backend=None)
        searched, others = _searched_and_held_out(options)
        requests = with_seeds(options, omni, searched, options.seeds)
        other_seeds = [max(options.seeds) + 1 + place for place in range(len(options.seeds))]
        held_out = with_seeds(options, omni, others, other_seeds)
        steps = requests[0].arguments["num_inference_steps"]
        if any(not 2 <= budget <= steps for budget in options.budgets or ()):
            raise UsageError(f"--budgets: each must be from 2 to the {steps} steps of a request")
        budgets = options.budgets or sorted({max(2, round(steps * share)) for share in SHARES}, reverse=True)
        journal = out.with_suffix(".search.jsonl")
        if options.fresh:
            journal.unlink(missing_ok=True)
    omni.pipe.set_progress_bar_config(disable=True)
    tries = options.tries or finding.TRIES
    if not options.quiet:
        most = most_steps(budgets, tries, len(requests), len(held_out), steps, ROUNDS)
        told = f"{len(requests)} images; at most {most} computed steps of one image: with guidance {2 * most} forwards"
        if options.model not in embedded_models():
            told += f", {duration(2 * most * LARGE_FORWARD)} at {LARGE_FORWARD} s each (a large model)"
        print(told, file=sys.stderr)
    progress = _Told(options.quiet)
    try:
        with wrong_input():
            found, document = finding.find(
                omni, requests, held_out, budgets, tries=tries, batch=options.batch or finding.BATCH, journal=journal,
                listener=progress.of_schedule,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what was sampled is kept in {journal}; run the same command to continue"
        ) from None
    finally:
        progress.line.close()
    document = fitting.found_document(method, omni, requests, held_out, document)
    calibration.write(document, out)
    picture = out.with_suffix(".search.svg")
    files.write(picture, finding.plot(found))
    if options.json:
        print_json({"files": [str(out), str(picture)], **document})
        return
    config = ({} if options.out is None else {"calibration": str(out)}) | {"budget": budgets[0]}
    print(*finding.words(found), out, picture, _taken(options, searched[0], method, config), sep="\n")


def _calibrate_precision(options: argparse.Namespace) -> None:
    """Write the file of the layers that are not quantised, and print what each group of layers does to the picture."""
    if options.budgets or options.tries or options.fresh:
        raise UsageError("--budgets, --tries and --fresh are for a schedule")
    dtype, psnr = options.quantize or "int8", options.psnr or precision.PSNR
    options.seeds = options.seeds or list(SCHEDULE_SEEDS[:1])
    settle(options)
    method = f"quantize_{dtype}"
    with wrong_input():
        omni = make_omni(options, cache_backend=None)
        out = calibration.kept_for(omni.location or options.model, method) if options.out is None else options.out
        make_directory(out.parent)
        searched, others = _searched_and_held_out(options)
        requests = with_seeds(options, omni, searched[:PRECISION_PROMPTS], options.seeds)
        other_seeds = [max(options.seeds) + 1 + place for place in range(len(options.seeds))]
        held_out = with_seeds(options, omni, others[:PRECISION_PROMPTS], other_seeds)
        given = {"dtype": dtype} | ({} if options.min_width is None else {"min_width": options.min_width})
        wanted = options_of(given)
        assert wanted is not None
    omni.pipe.set_progress_bar_config(disable=True)
    told = _Told(options.quiet)
    try:
        with wrong_input():
            groups, document = precision.find(
                omni, requests, held_out, wanted, psnr, options.batch or finding.BATCH, told.of_layers
            )
    finally:
        told.line.close()
    document = fitting.found_document(method, omni, requests, held_out, document)
    calibration.write(document, out)
    if options.json:
        print_json({"file": str(out), **document})
        return
    print(*precision.words(wanted, groups, document), out, sep="\n")


class _Told:
    """Shows a search's progress: on a terminal in one line that is redrawn, elsewhere in a new line each time."""

    def __init__(self, quiet: bool) -> None:
        self.line = Line(sys.stderr, quiet)
        self._lines = not quiet and not self.line.live

    def of_schedule(self, event: finding.Event) -> None:
        """Show that a schedule was sampled."""
        left = f"{duration(event.seconds_left)} left at most"
        self._tell(
            f"{event.budget} steps: {event.number} of {event.tries} schedules, {left}, best {event.best.score:.2f} dB"
        )

    def of_layers(self, number: int, most: int, what: str, psnr: float) -> None:
        """Show that some layers were measured."""
        self._tell(f"{number} of {most} at most: {what}, {psnr:.1f} dB")

    def _tell(self, text: str) -> None:
        self.line.tell(text)
        if self._lines:
            print(text, file=sys.stderr, flush=True)


def _searched_and_held_out(options: argparse.Namespace) -> tuple[Prompts, Prompts]:
    """Return the prompts that a schedule is searched on, and others that it is measured on.

    Without --prompts, the search uses those of the embedded model's prompts that no comparison uses. With --prompts,
    every fourth prompt is held out, unless --held-out gives others.
    """
    if options.prompts:
        given = list(dict.fromkeys(prompts_and_images(options, SCHEDULE_PROMPTS, options.prompts)))
        texts = list(dict.fromkeys(text for text, _ in given))
        if not options.held_out and len(texts) < 2:
            raise UsageError("--held-out is missing: a schedule is measured on other prompts than those of its search")
        if options.held_out:
            searched, held_out = given, prompts_and_images(options, SCHEDULE_PROMPTS, options.held_out)
        else:
            searched = [one for one in given if one[0] not in texts[1::4]]
            held_out = [one for one in given if one[0] in texts[1::4]]
    else:
        left = own_prompts(options, comparison.prompts_left(options.model, SCHEDULE_PROMPTS + HELD_OUT_PROMPTS))
        searched, held_out = left[::2], left[1::2]
        if options.held_out:
            held_out = prompts_and_images(options, HELD_OUT_PROMPTS, options.held_out)
    both = {prompt for prompt, image in searched if (prompt, image) in held_out}
    if both:
        raise UsageError(f"--held-out has prompts that are searched on: {', '.join(sorted(both))}")
    return searched, held_out
