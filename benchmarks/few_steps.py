"""Presets of `auto` on requests of few steps, beside plain sampling with as many steps.

    python -m benchmarks.few_steps [--check]   # 20 minutes; writes benchmarks/results/few-steps.json

A preset must not cost more than fewer steps would. For requests of 8 to 28 steps of each embedded model, this takes the
steps that each preset computes without a calibration, and measures the mean PSNR against the full request. Beside it
stands plain sampling with that number of steps, against the same request. `--check` exits with 1 if a preset is behind.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.cache.output import CORRECTOR_ORDER
from omni_runtime.cache.presets import PRESETS, Asked, answer
from omni_runtime.cache.schedules import usual_reach
from omni_runtime.calibrate.images import Images
from omni_runtime.calibrate.search import Forecast
from omni_runtime.compare.comparison import prompts_of
from omni_runtime.generation.loading import embedded_models

STEPS = (8, 12, 16, 20, 28)
PROMPTS = 16


def measured(omni: Omni, model: str, steps: int) -> list[dict[str, Any]]:
    """A row for each number of steps that a preset computes of a request of `steps`."""
    requests = [
        one
        for text, image in prompts_of(model, PROMPTS)
        for one in omni.prepare(text, seed=0, num_inference_steps=steps, **({"image": image} if image else {}))
    ]
    images = Images(omni.pipe, requests, PROMPTS)
    images.record()
    rows: list[dict[str, Any]] = []
    presets: dict[tuple[int, ...], list[str]] = {}
    for name in PRESETS:
        presets.setdefault(answer(Asked(quality=name), steps).schedule.computed, []).append(name)
    for computed, names in presets.items():
        row: dict[str, Any] = {"model": model, "steps": steps, "presets": names, "computed": len(computed)}
        if len(computed) < steps:
            forecast = Forecast(usual_reach(len(computed)), CORRECTOR_ORDER)
            row["preset_psnr"] = round(statistics.fmean(images.sample(computed, forecast).psnr), 2)
            row["plain_psnr"] = round(statistics.fmean(images.plain(len(computed)).psnr), 2)
        rows.append(row)
        print(row, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_steps", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if plain sampling is better than a preset")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for model in sorted(embedded_models()):
        with Omni(model, cache_backend=None, device="cpu") as omni:
            omni.pipe.set_progress_bar_config(disable=True)
            for steps in STEPS:
                rows += measured(omni, model, steps)
    report = {
        "command": "python -m benchmarks.few_steps",
        "machine": machine(torch.device("cpu")),
        "prompts": PROMPTS,
        "columns": ["model", "steps", "presets", "computed", "with the preset, dB", "plain sampling with as many, dB"],
        "rows": [
            [
                str(row["model"]),
                str(row["steps"]),
                ", ".join(row["presets"]),
                str(row["computed"]),
                *(f"{row[key]:.1f}" if key in row else "" for key in ("preset_psnr", "plain_psnr")),
            ]
            for row in rows
        ],
    }
    write(RESULTS / "few-steps.json", report)
    behind = [row for row in rows if row.get("preset_psnr", 0.0) < row.get("plain_psnr", 0.0)]
    for row in behind:
        print(f"behind plain sampling: {row}", file=sys.stderr)
    return int(options.check and bool(behind))


if __name__ == "__main__":
    sys.exit(main())
