"""Compares TeaCache with calibrated coefficients, with those of another model, and with the distance itself.

    python -m benchmarks.tea_calibration [--model emoji-qwen-image] [--images 32] [--coefficients FILE]

The prompts (or edits) of the embedded model and the seeds were not used in the calibration. A threshold has another
meaning under every polynomial. So each polynomial gets the thresholds at which it computes a half, a third and a
quarter of the steps, found by replaying the distances of the full runs through the gate. Then the polynomials differ
only in *which* steps they compute. Plain sampling with as many steps is measured, too. Results are written after each
image, so after Ctrl-C those that are complete are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, versions
from omni_runtime import Omni
from omni_runtime.cache import calibration
from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits
from omni_runtime.cache.models import row_of
from omni_runtime.calibrate.fitting import Point, recording
from omni_runtime.cli.calibrate import CALIBRATION_PROMPTS
from omni_runtime.cli.options import DEFAULT_MODEL
from omni_runtime.compare.comparison import prompts_of
from omni_runtime.compare.quality import psnr
from omni_runtime.generation.loading import embedded_models
from omni_runtime.generation.request import GenerationRequest

SHARES = (1 / 2, 1 / 3, 1 / 4)
IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)
UNLIMITED = (-math.inf, math.inf)


def unknown_prompts(model: str, known: Sequence[str]) -> list[tuple[str, Path | None]]:
    """The embedded model's prompts that were not used in the calibration, each with the picture that it edits, if any.

    The same instruction may occur with several pictures, and a calibration does not record pictures. So the pairs that
    `omni calibrate` takes by default count as used.
    """
    taken = prompts_of(model, CALIBRATION_PROMPTS)
    return [
        (text, image)
        for text, image in prompts_of(model, None)
        if text not in known or (image is not None and (text, image) not in taken)
    ]


def series(points: Sequence[Point]) -> list[list[float]]:
    """The distances of the input for each request, branch and image, in the order of steps."""
    found: dict[tuple[str, int, int], list[float]] = {}
    request: dict[tuple[str, int], int] = {}
    for point in points:
        key = point.branch, point.image
        request[key] = request.get(key, -1) + (point.step == 1)
        found.setdefault((*key, request[key]), []).append(point.input)
    return list(found.values())


def computed_steps(
    distances: Sequence[Sequence[float]], threshold: float, coefficients: Sequence[float], ends: Sequence[float]
) -> float:
    """The mean number of steps that the gate computes over the series; it always computes the first of a request."""
    counts = []
    for one in distances:
        gate = AccumulatedPolynomialGate(Limits(), threshold, coefficients, ends)
        count = 1
        for distance in one:
            verdict = gate.judge([(distance, 1.0)], 0)
            gate.settle(verdict.computed)
            count += verdict.computed
        counts.append(count)
    return statistics.fmean(counts)


def threshold_for(
    wanted: float, distances: Sequence[Sequence[float]], coefficients: Sequence[float], ends: Sequence[float]
) -> float:
    """The smallest threshold at which at most `wanted` steps are computed."""
    low, high = 1e-6, 1e3
    for _ in range(40):
        middle = math.sqrt(low * high)
        if computed_steps(distances, middle, coefficients, ends) > wanted:
            low = middle
        else:
            high = middle
    return high


def make_runs(
    borrowed: Sequence[float] | None, calibrated: dict[str, Any], points: Sequence[Point], steps: int
) -> list[dict[str, Any]]:
    """The runs: plain sampling and each polynomial, at each share of the steps."""
    distances = series(points)
    polynomials = {"identity": (IDENTITY, UNLIMITED), "calibrated": (calibrated["coefficients"], calibrated["range"])}
    if borrowed is not None:
        polynomials["borrowed"] = (borrowed, UNLIMITED)
    runs: list[dict[str, Any]] = []
    for share in SHARES:
        wanted = round(share * steps)
        runs.append({"share": share, "name": "fewer steps", "steps": wanted, "threshold": None, "coefficients": None})
        for name, (coefficients, ends) in polynomials.items():
            threshold = threshold_for(wanted, distances, coefficients, ends)
            given = calibrated if name == "calibrated" else list(coefficients)
            runs.append({"share": share, "name": name, "steps": steps, "threshold": threshold, "coefficients": given})
    return [run | {"psnr": [], "computed": []} for run in runs]


def measure(pipe: Any, run: dict[str, Any], request: GenerationRequest, reference: Any) -> None:
    """Append to the run the PSNR against the reference, and the mean number of computed steps of a branch."""
    plain = run["coefficients"] is None
    config = None if plain else {"rel_l1_thresh": run["threshold"], "coefficients": run["coefficients"]}
    arguments = request.arguments | {"num_inference_steps": run["steps"]}
    with Omni(pipe, cache_backend=None if plain else "tea_cache", cache_config=config) as omni:
        result = omni.run(GenerationRequest(request.prompt, request.seed, arguments))
    run["psnr"].append(float(psnr(reference, result.images[0])))
    run["computed"].append(run["steps"] if plain else result.cache.forwards / len(result.cache.branches))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A table of mean ± standard deviation over the images, and the mean gain over the identity ± its error."""
    lines = [
        "| steps computed | polynomial | PSNR dB | 5th percentile | over the identity |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        values = np.array(run["psnr"])
        identity = next(one for one in runs if one["name"] == "identity" and one["share"] == run["share"])
        gain = values - np.array(identity["psnr"])
        cells = (
            f"{statistics.fmean(run['computed']):.1f}",
            run["name"],
            f"{values.mean():.1f} ± {values.std(ddof=1):.1f}",
            f"{np.percentile(values, 5):.1f}",
            "" if run is identity else f"{gain.mean():+.2f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="an embedded model (default: %(default)s)")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="at least 2 (default: %(default)s)")
    parser.add_argument("--coefficients", type=Path, metavar="FILE", help="default: the model's own tea_cache.json")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    file = options.coefficients or embedded_models()[options.model] / calibration.file_name("tea_cache")
    calibrated = calibration.read(file, "tea_cache")
    prompts = unknown_prompts(options.model, json.loads(file.read_text(encoding="utf-8"))["provenance"]["prompts"])
    if not prompts or options.images < 2:
        parser.error("at least 2 images are needed, and prompts that the calibration did not use")
    prompts = [prompts[i * len(prompts) // options.images % len(prompts)] for i in range(options.images)]
    torch.set_num_threads(1)
    omni = Omni(options.model, cache_backend=None, device="cpu")
    pipe = omni.pipe
    pipe.set_progress_bar_config(disable=True)
    requests = [
        one
        for number, (text, image) in enumerate(prompts)
        for one in omni.prepare(text, seed=1000 + number, **({} if image is None else {"image": image}))
    ]
    with recording(pipe) as session:
        references = [omni.run(request).images[0] for request in requests]
    omni.close()
    borrowed = row_of(type(pipe.transformer).__name__).tea_coefficients
    runs = make_runs(borrowed, calibrated, session.points, session.describe_last()["steps"])
    about = {"model": options.model, "calibration": calibrated, "machine": machine(torch.device("cpu"))}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"tea-calibration-{options.model}.json"
    measured: list[dict[str, Any]] = []
    try:
        for request, reference in zip(requests, references, strict=True):
            for run in runs:
                measure(pipe, run, request, reference)
            measured.append({"prompt": request.prompt, "seed": request.seed})
            shown = [run | {"coefficients": run["name"]} for run in runs]
            made = about | {"versions": versions(), "measured": measured, "runs": shown}
            path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
            print(f"{len(measured)} of {len(requests)} images", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        for run in runs:
            del run["psnr"][len(measured) :], run["computed"][len(measured) :]
    if len(measured) > 1:
        print(table(runs))
    print(path)


if __name__ == "__main__":
    main()
