"""`omni generate`: one PNG or video, or more, per prompt, and a summary of each."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_runtime.cli.inputs import bar, make_directory, make_omni, request_arguments, settle, speed_of, wrong_input
from omni_runtime.cli.options import UsageError
from omni_runtime.cli.output import print_json
from omni_runtime.files import WriteError
from omni_runtime.generation import video
from omni_runtime.generation.result import OmniResult
from omni_runtime.parallel.degrees import launched

#: File name endings of formats that cannot be written.
OTHER_PICTURES = frozenset(
    [".apng", ".avif", ".bmp", ".gif", ".heic", ".jfif", ".jpe", ".jpeg", ".jpg", ".jxl", ".tif", ".tiff"]
)
OTHER_VIDEOS = frozenset([".avi", ".m4v", ".mkv", ".mov", ".mpeg", ".mpg", ".ogv", ".webm"])
FILES = frozenset([".png", *video.SUFFIXES])


def generate(options: argparse.Namespace) -> None:
    """Make the images or videos."""
    ending = options.out.suffix.lower()
    if ending in OTHER_PICTURES | OTHER_VIDEOS and not options.out.is_dir():
        raise UsageError(
            f"--out {options.out}: pictures are PNG: give a .png file or a directory; videos are .mp4 or .webp"
        )
    to_file = ending in FILES and not options.out.is_dir()
    if to_file and len(options.prompt) > 1:
        raise UsageError(f"--out {options.out} is one file, for {len(options.prompt)} prompts: give a directory")
    settle(options)
    place = launched()
    if options.parallel is None and place is not None and place.count > 1:
        raise UsageError(
            f"torchrun has started {place.count} processes, and each would make the same picture: give --parallel, "
            f"such as --parallel cfg={place.count}"
        )
    with wrong_input():
        omni = make_omni(options, parallel=options.parallel, **speed_of(options))
        if to_file:
            _check_ending(options.out, omni.makes_video)
        if options.fps is not None and not omni.makes_video:
            raise UsageError(f"--fps is for videos, and {options.model} makes pictures")
        prompts = options.prompt[0] if len(options.prompt) == 1 else options.prompt
        requests = omni.prepare(prompts, seed=options.seed, **request_arguments(options))
        make_directory(options.out.parent if to_file else options.out)
    omni.pipe.set_progress_bar_config(disable=True)
    made: list[dict[str, Any]] = []
    written: list[str] = []
    options.quiet = options.quiet or omni.rank > 0
    for request in requests:
        with bar(options, request.prompt or "", request.arguments.get("num_inference_steps", 0)) as on_step:
            result = omni.run(request, on_step)
        if omni.rank > 0:  # every rank has the same result; rank 0 writes it
            continue
        try:
            files = result.save(options.out if to_file else _unused(options.out, result), options.fps)
        except WriteError as error:
            raise error.keeping(f"kept from earlier prompts: {', '.join(written) or 'nothing'}") from error
        written += map(str, files)
        made.append({"files": [str(path) for path in files], **_as_json(result)})
        if not options.json:
            print(_summary(result, files), flush=True)
    if options.json and omni.rank == 0:
        print_json({"results": made})


def _check_ending(path: Path, of_video: bool) -> None:
    """Check before anything is loaded that the model's output can be written to this file."""
    if of_video:
        missing = video.encoder_missing(path.suffix)
        if missing is not None:
            raise UsageError(f"--out {path}: {missing}")
    elif path.suffix.lower() in video.SUFFIXES:
        raise UsageError(
            f"--out {path}: the model makes pictures, and pictures are PNG: give a .png file or a directory"
        )


def _unused(directory: Path, result: OmniResult) -> Path:
    """Return an unused path whose file name describes the image or video."""
    suffix = ".png"
    if result.frames is not None:
        suffix = next(ending for ending in video.SUFFIXES if video.encoder_missing(ending) is None)
    encoding = sys.getfilesystemencoding()
    prompt = (result.prompt or "").lower().encode(encoding, "ignore").decode(encoding)
    words = re.sub(r"\W+", "-", prompt).strip("-")[:60].strip("-") or "image"
    backend = result.settings["cache_backend"]
    stem = f"{words}-seed{result.seed}" + (f"-{backend}" if backend not in (None, "auto") else "")
    path, number = directory / f"{stem}{suffix}", 1
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}{suffix}"
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
            f"{report.forwards_saved} skipped"
            + (f"; {report.blocks_run / report.blocks_total:.0%} of the blocks run" if report.blocks_total else "")
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
