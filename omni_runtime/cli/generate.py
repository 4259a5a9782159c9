"""`omni generate`: one PNG or more per prompt, and a summary of each."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_runtime.cli.inputs import bar, make_directory, make_omni, request_arguments, settle, wrong_input
from omni_runtime.cli.options import UsageError
from omni_runtime.cli.output import print_json
from omni_runtime.files import WriteError
from omni_runtime.generation.result import OmniResult

#: File name endings of picture formats that cannot be written.
OTHER_PICTURES = frozenset(
    [".apng", ".avif", ".bmp", ".gif", ".heic", ".jfif", ".jpe", ".jpeg", ".jpg", ".jxl", ".tif", ".tiff", ".webp"]
)


def generate(options: argparse.Namespace) -> None:
    """Make the images."""
    if options.out.suffix.lower() in OTHER_PICTURES and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: pictures are PNG: give a .png file or a directory")
    to_file = options.out.suffix.lower() == ".png"
    if to_file and len(options.prompt) > 1:
        raise UsageError(f"--out {options.out} is one file, for {len(options.prompt)} prompts: give a directory")
    settle(options)
    how: dict[str, Any] = {"fuse": options.fuse or None, "compile": options.compile}
    if options.cache_backend is not None:
        how["cache_backend"] = options.cache_backend
    with wrong_input():
        omni = make_omni(options, cache_config=options.cache_config, **how)
        prompts = options.prompt[0] if len(options.prompt) == 1 else options.prompt
        requests = omni.prepare(prompts, seed=options.seed, **request_arguments(options))
        make_directory(options.out.parent if to_file else options.out)
    omni.pipe.set_progress_bar_config(disable=True)
    made: list[dict[str, Any]] = []
    written: list[str] = []
    for request in requests:
        with bar(options, request.prompt or "", request.arguments.get("num_inference_steps", 0)) as on_step:
            result = omni.run(request, on_step)
        try:
            files = result.save(options.out if to_file else _unused(options.out, result))
        except WriteError as error:
            raise error.keeping(f"kept from earlier prompts: {', '.join(written) or 'nothing'}") from error
        written += map(str, files)
        made.append({"files": [str(path) for path in files], **_as_json(result)})
        if not options.json:
            print(_summary(result, files), flush=True)
    if options.json:
        print_json({"results": made})


def _unused(directory: Path, result: OmniResult) -> Path:
    """Return an unused path whose file name describes the image."""
    encoding = sys.getfilesystemencoding()
    prompt = (result.prompt or "").lower().encode(encoding, "ignore").decode(encoding)
    words = re.sub(r"\W+", "-", prompt).strip("-")[:60].strip("-") or "image"
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
            f"{report.forwards_saved} skipped; {report.blocks_run / max(report.blocks_total, 1):.0%} of the blocks run"
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
