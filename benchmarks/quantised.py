"""What quantised linear layers cost in picture quality on the embedded models, alone and under the velocity cache.

    python -m benchmarks.quantised   # 30 minutes; writes benchmarks/results/quantised.json

PSNR in dB of 8 prompts × 1 seed, 50 steps, against the same request without quantisation and without a cache. The
layers of these models are narrower than the 512 features from which layers are quantised by default, so all widths are
taken. *Default* leaves out what the rules leave out, *all* quantises every linear layer of the blocks; both leave the
models' calibrations aside. *Edges* is the default with the first and last `EDGES` steps computed in the layers' own
weights. *Calibrated* is what the model's `quantize_<dtype>.json` says, if it comes with one.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

import omni_kernels
from benchmarks.results import RESULTS
from omni_kernels.patching.quantised import DTYPES
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.cache.schedules import early
from omni_runtime.calibrate.images import Images
from omni_runtime.calibrate.search import forecasts
from omni_runtime.compare.comparison import prompts_of
from omni_runtime.generation.loading import embedded_models

STEPS, BUDGET, PROMPTS = 50, 25, 8
EDGES = (5, 5)


def rows_of(model: str) -> list[list[str]]:
    """The rows of one model."""
    with Omni(model, cache_backend=None, device="cpu") as omni:
        pipe = omni.pipe
        pipe.set_progress_bar_config(disable=True)
        omni_kernels.unpatch(pipe)  # of the patch without a cache, so that others can be made
        requests = [
            one
            for text, image in prompts_of(model, PROMPTS)
            for one in omni.prepare(text, seed=0, num_inference_steps=STEPS, **({"image": image} if image else {}))
        ]
        images = Images(pipe, requests, PROMPTS)
        images.record()
        schedule, forecast = early(STEPS, BUDGET).computed, forecasts(BUDGET)[0]

        def psnr() -> list[float]:
            found = images.plain(STEPS).psnr, images.sample(schedule, forecast).psnr
            return [float(np.mean(one)) for one in found]

        _, cached = psnr()
        rows = []
        with omni_kernels.patched(pipe, quantize={"dtype": "int8", "min_width": 0}, fuse=False) as handle:
            # What is included by name takes the place of a calibration. The rules take this layer anyway.
            default: dict[str, Any] = {"include": handle.quantised.replaced[:1]}
        ways = {
            "default": default,
            "all": {"include": ["*"]},
            "edges": default | {"edge_steps": EDGES},
            "calibrated": {"min_width": 64},  # as it was made
        }
        for dtype in DTYPES:
            for layers, way in ways.items():
                if layers == "calibrated" and not (embedded_models()[model] / f"quantize_{dtype}.json").is_file():
                    continue
                how = {"dtype": dtype, "min_width": 0, **way}
                with omni_kernels.patched(pipe, quantize=how, fuse=False) as handle:
                    alone, both = psnr()
                    count = f"{len(handle.quantised.replaced)} of {len(handle.quantised)}"
                rows.append([model, dtype, layers, count, f"{alone:.1f}", f"{cached:.1f}", f"{both:.1f}"])
                print(*rows[-1], sep=" | ", flush=True)
        return rows


def main() -> int:
    """The command; returns its exit code."""
    torch.set_num_threads(1)
    rows = [row for model in embedded_models() for row in rows_of(model)]
    columns = [
        "model",
        "quantize",
        "layers",
        "quantised",
        "alone, dB",
        f"velocity_cache {BUDGET} alone, dB",
        "both, dB",
    ]
    report = {"command": "python -m benchmarks.quantised", "machine": machine(torch.device("cpu"))}
    write(RESULTS / "quantised.json", report | {"prompts": PROMPTS, "steps": STEPS, "columns": columns, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
