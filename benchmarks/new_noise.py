"""The velocity cache under schedulers that draw new noise at each step, beside fewer steps.

    python -m benchmarks.new_noise   # 5 minutes; writes benchmarks/results/new-noise.json

Each request is 25 steps of emoji-z-image. PSNR is against the same request with all steps computed, with the same
start and the same noise in the steps. *Other noise* is that request with another seed for the noise in the steps, and
nothing skipped: less similar than this, a picture has only its prompt and its start in common with the full run.
"""

from __future__ import annotations

import logging
import statistics
import sys
from typing import Any

import diffusers
import torch

import omni_kernels
from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write
from omni_runtime import embedded_pipeline
from omni_runtime.compare import quality

MODEL, STEPS, BUDGETS, SEEDS = "emoji-z-image", 25, (17, 13, 9), (0, 1)
PROMPTS = ("red apple on blue", "a fox", "a penguin", "a rocket", "a mushroom on orange", "a ghost", "a cat", "a tulip")
#: What a scheduler does with the noise → its class and settings.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "some of the noise is new (ancestral)": (diffusers.LTXEulerAncestralRFScheduler, {}),
    "all of the noise is new (stochastic)": (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
}


def pictures(pipe: Any, steps: int, noise: int = 0) -> torch.Tensor:
    """A picture of each prompt and seed; `noise` is added to the seed of the noise in the steps."""
    made = []
    for prompt in PROMPTS:
        for seed in SEEDS:
            torch.manual_seed(1000 + seed + noise)  # the pipeline gives the scheduler no generator
            start = torch.Generator().manual_seed(seed)
            settings = {"num_inference_steps": steps, "height": 64, "width": 64, "guidance_scale": 3.0}
            made.append(pipe(prompt, generator=start, output_type="pt", **settings).images[0])
    return torch.stack(made)


def main() -> int:
    """The command; returns its exit code."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    pipe = embedded_pipeline(MODEL)
    pipe.set_progress_bar_config(disable=True)
    own, rows = pipe.scheduler.config, []
    for what, (kind, settings) in SCHEDULERS.items():
        pipe.scheduler = kind.from_config(own, **settings)
        full = pictures(pipe, STEPS)

        def psnr(made: torch.Tensor, full: torch.Tensor = full) -> str:
            return f"{statistics.fmean(quality.psnr(made, full, 1.0).tolist()):.1f}"

        other = psnr(pictures(pipe, STEPS, noise=500))
        for budget in BUDGETS:
            fewer = psnr(pictures(pipe, budget))
            with omni_kernels.patched(pipe, "velocity_cache", {"budget": budget}):
                rows.append([what, str(budget), psnr(pictures(pipe, STEPS)), fewer, other])
            print(*rows[-1], sep=" | ", flush=True)
    columns = ["in each step", "computed steps of 25", "velocity_cache, dB", "fewer steps, dB", "other noise, dB"]
    report = {"command": "python -m benchmarks.new_noise", "machine": machine(torch.device("cpu")), "model": MODEL}
    write(
        RESULTS / "new-noise.json", report | {"prompts": [*PROMPTS], "seeds": SEEDS, "columns": columns, "rows": rows}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
