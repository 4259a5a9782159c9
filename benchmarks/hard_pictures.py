"""What makes a picture hard for a schedule, and whether its first steps show it.

    python -m benchmarks.hard_pictures [--model emoji-qwen-image]   # 5 to 20 minutes a model

With 13 of 50 evenly spread steps, a picture in twenty is far behind the mean. For each model, this measures

1. *where the error arises*: every step is computed but those of one stretch, which is one gap;
2. *prompt or noise*: how much of the variance of the PSNR at 13 steps belongs to the prompt, and how much to the seed;
3. *whether the first steps show it*: the rank correlation between the PSNR at 13 steps and what a cache can measure in
   the first steps: how far the model output turns (`turn`) and bends (`bend`);
4. *what a rule would gain*: each picture gets one of two schedules, by what its first steps show, so that the mean
   number of computed steps is that of a fixed schedule. The hard ones get more steps, or as many of which more are
   early. `oracle` picks by the PSNR itself, which no cache can know: no rule can be better.

Prompts and seeds are those of `benchmarks.quality`. Writes results/hard-pictures-<model>.json and .svg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.cache.output import CORRECTOR_ORDER
from omni_runtime.cache.schedules import spaced, usual_reach
from omni_runtime.calibrate.images import FullRun, Images
from omni_runtime.calibrate.plot import LEFT, RIGHT, WIDTH, axes
from omni_runtime.calibrate.search import Forecast
from omni_runtime.compare.comparison import prompts_of
from omni_runtime.generation.loading import embedded_models

STEPS, PROMPTS, SEEDS = 50, 16, (0, 1, 2, 3)
STRETCH = 7
#: The number of computed steps whose hard pictures are looked at.
BUDGET = 13
#: Kinds of schedules: the logarithm of the density of their computed steps at `KNOTS`.
KINDS = {"even": (0.0,) * 6, "early": (0.4, 0.4, 0.2, -0.4, -0.6, 0.2)}
#: The schedules of the easy and of the hard pictures, and the fixed number of steps that a rule is compared with.
CHOICES = (
    (("even", 10), ("even", 17), 13),
    (("even", 11), ("early", 16), 13),
    (("even", 13), ("early", 13), 13),
    (("even", 8), ("even", 13), 10),
    (("even", 10), ("early", 10), 10),
)
#: Steps up to which a rule may look.
LOOK = 8


class Turning(FullRun):
    """A full run that keeps the outputs of the first steps of every batch."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.first: list[torch.Tensor] = []

    def stepped_with(self, request: Any, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `CacheSession.stepped_with`."""
        if request.step in (0, LOOK // 2, LOOK):
            self.first.append(output.flatten(1).double())
        return super().stepped_with(request, output, sample)

    def features(self) -> dict[str, np.ndarray]:
        """What the first steps show of each image: relative L2 norms of the first and the second difference."""
        a, b, c = (torch.cat(self.first[i::3]) for i in range(3))
        size = c.norm(dim=1)
        return {
            "turn": ((c - a).norm(dim=1) / size).numpy(),
            "bend": ((c - 2 * b + a).norm(dim=1) / size).numpy(),
        }


def ranks(values: Sequence[float]) -> np.ndarray:
    """The place of each value in their order."""
    return np.argsort(np.argsort(values)).astype(float)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def shares(psnr: np.ndarray) -> dict[str, float]:
    """The shares of the variance of [prompts, seeds] that belong to the prompt, to the seed, and to neither alone."""
    whole = psnr.var()
    prompt, seed = psnr.mean(1).var() / whole, psnr.mean(0).var() / whole
    found = {"prompt": prompt, "seed": seed, "both": 1 - prompt - seed}
    return {name: round(float(one), 3) for name, one in found.items()}


def statistics(psnr: np.ndarray) -> dict[str, float]:
    """Mean and 5th percentile in dB."""
    return {"mean": round(float(psnr.mean()), 2), "p5": round(float(np.percentile(psnr, 5)), 2)}


def picked(hardness: np.ndarray, of_easy: np.ndarray, of_hard: np.ndarray, share: float) -> np.ndarray:
    """The PSNR of each image where the hardest `share` of the images get the schedule of the hard ones."""
    return np.where(ranks(hardness) >= len(hardness) * (1 - share), of_hard, of_easy)


def study(model: str, prompts: int, seeds: Sequence[int]) -> dict[str, Any]:
    """All measurements of one model."""
    with Omni(model, cache_backend=None, device="cpu") as omni:
        pipe = omni.pipe
        pipe.set_progress_bar_config(disable=True)
        requests = [
            one
            for text, image in prompts_of(model, prompts)
            for seed in seeds
            for one in omni.prepare(text, seed=seed, num_inference_steps=STEPS, **({"image": image} if image else {}))
        ]
        images = Images(pipe, requests, 16, Turning)
        recorded = images.record()
        assert isinstance(recorded, Turning)
        features, sigmas = recorded.features(), recorded.sigmas
        done = 0

        def psnr(computed: Sequence[int]) -> np.ndarray:
            nonlocal done
            done += 1
            print(f"\r\033[K{model}: {done} schedules", end="", file=sys.stderr, flush=True)
            return np.array(images.sample(computed, Forecast(usual_reach(len(computed)), CORRECTOR_ORDER)).psnr)

        pairs = {pair for *two, _ in CHOICES for pair in two}
        fixed = {(kind, budget) for kind in KINDS for *_, budget in CHOICES}
        measured = {(kind, budget): psnr(spaced(KINDS[kind], STEPS, budget)) for kind, budget in sorted(pairs | fixed)}
        base = measured["even", BUDGET]
        hard = np.argsort(base)[: len(base) // 4]
        easy = np.argsort(base)[-(len(base) // 4) :]
        stretches = []
        for begin in range(0, STEPS - 1, STRETCH):
            end = min(begin + STRETCH, STEPS - 1)
            found = psnr([step for step in range(STEPS) if step <= begin or step >= end])
            stretches.append(
                {
                    "steps": [begin, end],
                    "sigmas": [round(sigmas[begin], 3), round(sigmas[end], 3)],
                    "hard": round(float(found[hard].mean()), 2),
                    "easy": round(float(found[easy].mean()), 2),
                    "correlation": round(rank_correlation(found, base), 2),
                }
            )
        print(file=sys.stderr)
    rules = []
    for low, high, budget in CHOICES:
        share = 0.5 if low[1] == high[1] else (budget - low[1]) / (high[1] - low[1])
        hardness = {**features, "oracle": measured[high] - measured[low]}
        rules.append(
            {
                "easy": list(low),
                "hard": list(high),
                "mean_steps": budget,
                "share_of_hard": round(share, 2),
                "fixed": {kind: statistics(measured[kind, budget]) for kind in KINDS},
                **{name: statistics(picked(by, measured[low], measured[high], share)) for name, by in hardness.items()},
            }
        )
    return {
        "model": model,
        "images": len(base),
        "psnr": {f"{kind} {budget}": statistics(found) for (kind, budget), found in measured.items()},
        "stretches": stretches,
        "variance": shares(base.reshape(-1, len(seeds))),
        "correlation": {name: round(rank_correlation(found, base), 2) for name, found in features.items()},
        "rules": rules,
    }


def plot(found: dict[str, Any]) -> str:
    """An SVG plot: the PSNR with one stretch skipped, of the easy and of the hard quarter of the images."""
    height, rows = 300, found["stretches"]
    values = [row[kind] for row in rows for kind in ("hard", "easy")]
    title = f'<text x="{LEFT}" y="16">{found["model"]}: PSNR in dB where only these steps are skipped</text>'
    parts, y = axes(height, 28, 44, np.floor(min(values)) - 1, np.ceil(max(values)) + 1, title=title)

    def x(place: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (place + 0.5) / len(rows)

    for place, row in enumerate(rows):
        begin, end = row["steps"]
        parts.append(f'<text x="{x(place):.1f}" y="{height - 24}" text-anchor="middle">{begin + 1}–{end - 1}</text>')
    parts.append(f'<text x="{LEFT}" y="{height - 6}">skipped steps of {STEPS}</text>')
    for kind, colour in (("easy", "#1f6feb"), ("hard", "#d1242f")):
        points = " ".join(f"{x(place):.1f},{y(row[kind]):.1f}" for place, row in enumerate(rows))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{WIDTH - RIGHT + 6}" y="{y(rows[-1][kind]) + 4:.1f}" fill="{colour}">{kind} quarter</text>'
        )
    return "".join([*parts, "</svg>\n"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hard_pictures", description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=sorted(embedded_models()), default=sorted(embedded_models()))
    parser.add_argument("--prompts", type=int, default=PROMPTS, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for model in options.model:
        found = study(model, options.prompts, SEEDS)
        command = f"python -m benchmarks.hard_pictures --model {model}"
        command += "" if options.prompts == PROMPTS else f" --prompts {options.prompts}"
        write(
            options.out / f"hard-pictures-{model}.json",
            {"command": command, "machine": machine(torch.device("cpu")), **found},
        )
        (options.out / f"hard-pictures-{model}.svg").write_text(plot(found), encoding="utf-8")
        for row in found["stretches"]:
            print(f"{model}: {row}")
        for key in ("variance", "correlation"):
            print(f"{model}, {key}: {found[key]}")
        for row in found["rules"]:
            print(f"{model}: {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
