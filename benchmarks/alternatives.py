"""Published alternatives to the forecast and the schedule of `velocity_cache`, measured beside them.

    python -m benchmarks.alternatives [--model emoji-qwen-image]   # about 10 minutes a model

None of them has a row in the tables, because none is better here. All skip whole steps of the same requests, and all
but DPCache do so on the same schedules.

- *newton*: a line in σ through the last two computed outputs, as `velocity_cache` without its corrector.
- *velocity_cache*: the same with the corrector: what is used.
- *spectrum*: ridge regression on 4 Chebyshev polynomials of the step, λ = 0.1, through all computed outputs (Spectrum,
  arXiv:2603.01623).
- *tacache*: the change of the output from one step to the next is split into a part along the output, and one at right
  angles to it. The lengths of both parts, relative to the output, are means over other pictures, one pair for each
  step. The direction of the second part is the picture's own, from its last two computed outputs (after the abstract of
  TACache, arXiv:2605.16789; its text leaves room for other readings).
- *tacache, its schedule*: the same, where a step is computed as soon as the two lengths have added up to a threshold.
- *dpcache*: `velocity_cache` on the schedule that costs least by dynamic programming. The cost of a gap depends on the
  computed steps before it and behind it, and on the one before these: it is how far the skipped steps would move the
  latents wrongly, on recorded trajectories of other pictures (after DPCache, arXiv:2602.22654).
- *dpcache, corrected*: the same with the cost after the corrector.

Writes results/alternatives-<model>.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.hard_pictures import statistics
from benchmarks.results import RESULTS
from omni_kernels.patching import Patch
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.cache.forecasters import make_forecaster, newton
from omni_runtime.cache.gates import ScheduleGate
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.output import CORRECTOR_ORDER, Chosen, OutputSession, OutputSite, reached
from omni_runtime.cache.schedules import early, even, usual_reach
from omni_runtime.calibrate.images import FullRun, Images
from omni_runtime.calibrate.search import Forecast
from omni_runtime.compare.comparison import prompts_left, prompts_of
from omni_runtime.generation.loading import embedded_models

STEPS, PROMPTS, SEEDS, FITTED_SEED = 50, 16, (0, 1), 2
BUDGETS = (25, 17, 13, 10)
TERMS, RIDGE = 4, 0.1

#: (step, computed steps so far, their outputs [B, ...], σ of all steps) → the output of a skipped step
Predict = Callable[[int, list[int], list[torch.Tensor], Sequence[float]], torch.Tensor]


class Trajectories(FullRun):
    """A full run that keeps the outputs of all batches."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.kept: list[list[torch.Tensor]] = []

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `CacheSession.stepped_with`."""
        if request.step == 0:
            self.kept.append([])
        self.kept[-1].append(output.flatten(1).float())
        return super().stepped_with(request, output, sample)

    def outputs_by_step(self) -> torch.Tensor:
        """The outputs of all images, [steps, images, elements]."""
        return torch.cat([torch.stack(one) for one in self.kept], 1)


class Forecasting(OutputSession):
    """Computes some steps, and forecasts the others by `predict`."""

    def __init__(self, pipe: Any, computed: Sequence[int], predict: Predict) -> None:
        mask = [int(step in computed) for step in range(STEPS)]
        super().__init__(
            "alternative", pipe, OutputSite(lambda _: Chosen(ScheduleGate(mask)), make_forecaster("reuse"))
        )
        self._mask = mask
        self._predict = predict
        self._steps: list[int] = []
        self._found: list[torch.Tensor] = []

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `CacheSession.stepped_with`."""
        super().stepped_with(request, output, sample)  # decides; its own forecast is not used
        if request.step == 0:
            self._steps, self._found = [], []
        if not self._mask[request.step]:
            return self._predict(request.step, self._steps, self._found, request.sigmas[request.begin :])
        self._steps.append(request.step)
        self._found.append(output)
        return output


# Forecasts


def by_newton(count: int) -> Predict:
    """A line in σ, no farther than `velocity_cache` goes with `count` computed steps."""

    def predict(step: int, steps: list[int], found: list[torch.Tensor], sigmas: Sequence[float]) -> torch.Tensor:
        levels = [sigmas[one] for one in steps[:-3:-1]]
        weights = newton(levels, reached(levels, sigmas[step], usual_reach(count)))
        return sum(weight * one for weight, one in zip(weights, found[:-3:-1], strict=True))  # type: ignore[return-value]

    return predict


def by_ridge(step: int, steps: list[int], found: list[torch.Tensor], sigmas: Sequence[float]) -> torch.Tensor:
    """Spectrum: weights are linear in the outputs, so they are found without them."""

    def row(of: Sequence[int]) -> np.ndarray:
        return np.polynomial.chebyshev.chebvander(2 * np.array(of) / (STEPS - 1) - 1, TERMS - 1)

    known = row(steps)
    weights = row([step]) @ np.linalg.solve(known.T @ known + RIDGE * np.eye(TERMS), known.T)
    return sum(float(weight) * one for weight, one in zip(weights[0], found, strict=True))  # type: ignore[return-value]


class Split:
    """TACache's statistics of recorded outputs [steps, images, elements]: two lengths for each step.

    Attributes:
        along, across: of the change from step i to i + 1, relative to the output of step i; means over the images.
    """

    def __init__(self, outputs: torch.Tensor) -> None:
        change, before = outputs[1:] - outputs[:-1], outputs[:-1]
        size = before.norm(dim=2)
        along = (change * before).sum(2) / size**2
        across = (change - along[..., None] * before).norm(dim=2) / size
        self.along: list[float] = along.mean(1).tolist()
        self.across: list[float] = across.mean(1).tolist()

    def predict(self, step: int, steps: list[int], found: list[torch.Tensor], sigmas: Sequence[float]) -> torch.Tensor:
        """The output of a skipped step, from the newest computed one step by step."""
        shape, value = found[-1].shape, found[-1].flatten(1)
        direction = torch.zeros_like(value)
        if len(found) > 1:
            change = value - found[-2].flatten(1)
            change = change - (change * value).sum(1, keepdim=True) / (value * value).sum(1, keepdim=True) * value
            direction = change / change.norm(dim=1, keepdim=True).clamp_min(1e-12)
        for one in range(steps[-1], step):
            length = value.norm(dim=1, keepdim=True)
            value = (1 + self.along[one]) * value + self.across[one] * length * direction
        return value.reshape(shape)

    def schedule(self, budget: int) -> tuple[int, ...]:
        """`budget` computed steps by the threshold on the added lengths that gives so many; the nearest number else."""

        def at(threshold: float) -> list[int]:
            steps, total = [0, 1], 0.0
            for one in range(1, STEPS - 1):
                total += abs(self.along[one]) + self.across[one]
                if total >= threshold:
                    steps.append(one + 1)
                    total = 0.0
            return sorted({*steps, STEPS - 1})

        low, high = 0.0, sum(map(abs, self.along)) + sum(self.across)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if len(at(middle)) > budget else (low, middle)
        return tuple(at(high))


# DPCache


def gap_costs(outputs: torch.Tensor, sigmas: Sequence[float], reach: float, corrected: bool) -> np.ndarray:
    """The cost [previous, begin, end] of skipping all steps between two computed ones; infinite where there is none.

    It is the mean over the images of |Σ (σ_{k+1} − σ_k)(forecast_k − output_k)|² over the skipped steps k. With
    `corrected`, the forecast is the interpolation between the computed steps on both sides.

    Args:
        outputs: of recorded full runs, [steps, images, elements].
        sigmas: of the steps, and of the end.
        reach: as `Chosen.reach`.
        corrected: see above.
    """
    steps = len(outputs)
    costs = np.full((steps, steps, steps), math.inf)
    for begin in range(steps - 1):
        for previous in range(max(begin, 1)):
            levels = [sigmas[begin]] if begin == 0 else [sigmas[begin], sigmas[previous]]
            known = [outputs[begin]] if begin == 0 else [outputs[begin], outputs[previous]]
            moved = torch.zeros_like(outputs[0])
            for end in range(begin + 1, steps):
                if corrected:
                    moved = torch.zeros_like(outputs[0])
                    for one in range(begin + 1, end):
                        weights = newton([sigmas[end], *levels], sigmas[one])
                        made = sum(w * v for w, v in zip(weights, [outputs[end], *known], strict=True))
                        moved += (sigmas[one + 1] - sigmas[one]) * (made - outputs[one])
                costs[previous, begin, end] = float(moved.square().sum(1).mean())
                if not corrected:
                    weights = newton(levels, reached(levels, sigmas[end], reach))
                    made = sum(w * v for w, v in zip(weights, known, strict=True))
                    moved = moved + (sigmas[end + 1] - sigmas[end]) * (made - outputs[end])
    return costs


def cheapest(costs: np.ndarray, budget: int) -> tuple[int, ...]:
    """The `budget` computed steps, with the first and the last one, whose gaps cost least in sum."""
    steps = len(costs)
    best = costs[0, 0].copy()[None, :] + np.where(np.arange(steps)[:, None] == 0, 0.0, math.inf)  # [begin, end]
    chosen: list[np.ndarray] = []
    for _ in range(budget - 2):
        sums = best[:, :, None] + costs  # [previous, begin, end]
        chosen.append(sums.argmin(0))
        best = sums.min(0)
    end, begin = steps - 1, int(best[:, steps - 1].argmin())
    found = [end, begin]
    for previous in reversed(chosen):
        begin, end = int(previous[begin, end]), begin
        found.append(begin)
    return tuple(reversed(found))


# The measurement


def study(model: str, prompts: int, budgets: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each number of computed steps and each way."""
    with Omni(model, cache_backend=None, device="cpu") as omni:
        omni.pipe.set_progress_bar_config(disable=True)

        def images(chosen: Sequence[tuple[str, Path | None]], seeds: Sequence[int]) -> Images:
            requests = [
                one
                for text, image in chosen
                for seed in seeds
                for one in omni.prepare(
                    text, seed=seed, num_inference_steps=STEPS, **({"image": image} if image else {})
                )
            ]
            return Images(omni.pipe, requests, 16, Trajectories)

        recorded = images(prompts_left(model, prompts, prompts), (FITTED_SEED,)).record()
        assert isinstance(recorded, Trajectories)
        outputs, sigmas = recorded.outputs_by_step(), recorded.sigmas
        split = Split(outputs)
        shown = images(prompts_of(model, prompts), SEEDS)
        shown.record()
        rows: list[dict[str, Any]] = []

        def add(way: str, computed: Sequence[int], psnr: Sequence[float]) -> None:
            rows.append({"way": way, "computed": [*computed], **statistics(np.array(psnr))})
            print(f"{model}: {len(computed):2} computed steps, {way:26} {rows[-1]['mean']} dB, p5 {rows[-1]['p5']}")

        for budget in budgets:
            usual = Forecast(usual_reach(budget), CORRECTOR_ORDER)
            for name, schedule in (("even", even(STEPS, budget)), ("early", early(STEPS, budget))):
                computed = schedule.computed
                if name == "early" and computed == even(STEPS, budget).computed:
                    continue
                add(f"velocity_cache, {name}", computed, shown.sample(computed, usual).psnr)
                add(f"newton, {name}", computed, replayed(shown, computed, by_newton(budget)))
                add(f"spectrum, {name}", computed, replayed(shown, computed, by_ridge))
                add(f"tacache, {name}", computed, replayed(shown, computed, split.predict))
            add("tacache, its schedule", split.schedule(budget), replayed(shown, split.schedule(budget), split.predict))
            for corrected in (False, True):
                computed = cheapest(gap_costs(outputs, sigmas, usual.reach, corrected), budget)
                add("dpcache" + ", corrected" * corrected, computed, shown.sample(computed, usual).psnr)
    return rows


def table(runs: Sequence[dict[str, Any]], budgets: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table: a row for each way, mean and 5th percentile for each number of steps.

    A schedule that computes another number of steps has it in brackets.
    """
    cells: dict[str, dict[int, str]] = {}
    for run in runs:
        count = len(run["computed"])
        budget = min(budgets, key=lambda one: abs(one - count))
        told = f"{run['mean']:.1f} / {run['p5']:.1f}"
        cells.setdefault(run["way"], {})[budget] = told if count == budget else f"{told} ({count})"
    rows = [[way, *(of.get(budget, "") for budget in budgets)] for way, of in cells.items()]
    return ["forecast, schedule", *(f"{budget} steps, dB" for budget in budgets)], rows


def replayed(images: Images, computed: Sequence[int], predict: Predict) -> list[float]:
    """The PSNR in dB of each recorded image where `predict` makes the outputs of the steps that are not computed."""
    patch, session = Patch(), Forecasting(images.pipe, computed, predict)
    try:
        session.install(patch)
        return images.measured()
    finally:
        patch.undo()
        session.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    models = sorted(embedded_models())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alternatives", description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=models, default=["emoji-qwen-image", "emoji-z-image"])
    parser.add_argument("--prompts", type=int, default=PROMPTS, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for model in options.model:
        runs = study(model, options.prompts, BUDGETS)
        columns, rows = table(runs, BUDGETS)
        command = f"python -m benchmarks.alternatives --model {model}"
        command += "" if options.prompts == PROMPTS else f" --prompts {options.prompts}"
        found = {"command": command, "machine": machine(torch.device("cpu")), "model": model}
        found |= {"images": options.prompts * len(SEEDS), "columns": columns, "rows": rows, "runs": runs}
        write(options.out / f"alternatives-{model}.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
