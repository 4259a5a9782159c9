"""Measures how much a schedule that was calibrated on few images loses on many others.

    python -m benchmarks.schedule_transfer [--model emoji-qwen-image] [--budgets 25,17] [--check]

For each number of computed steps, two schedules are searched, as by `omni calibrate schedule`:

- *few*: on its 4 prompts × 2 seeds;
- *many*: on the 32 prompts (or edits) × 3 seeds of the embedded model that `benchmarks.quality` compares on. None of
  these is among the few.

Both schedules, evenly spread steps and plain sampling are measured on the many images. The loss is the mean PSNR of
the *many* schedule minus that of the *few* schedule. It is rather over- than underestimated, because the *many*
schedule is measured on the images of its own search, and that search has more starting points: the *few* schedule, the
starting points of the *few* search, and those from its own responses, which are measured on one seed of each prompt.
`--check` exits with 1 if the loss is 1 dB or more.

Samples are saved in `--work`. After Ctrl-C, or with more tries, run the same command to continue.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.cache import schedules
from omni_runtime.calibrate.images import Images, Settings
from omni_runtime.calibrate.schedule import PATIENCE, TRIES, Journal, about, starts, statistics
from omni_runtime.calibrate.search import Tried, gain, search
from omni_runtime.cli.calibrate import SCHEDULE_PROMPTS, SCHEDULE_SEEDS
from omni_runtime.cli.options import DEFAULT_MODEL
from omni_runtime.compare.comparison import COMPARED, prompts_left, prompts_of
from omni_runtime.generation.request import GenerationRequest

MANY_SEEDS = (0, 1, 2)
#: The loss of mean PSNR in dB must be below this.
ALLOWED = 1.0


def prompts(model: str, few: int, many: int) -> tuple[list[tuple[str, Path | None]], list[tuple[str, Path | None]]]:
    """The prompts of both searches, each with the picture that it edits, if any; none is in both.

    Raises:
        ValueError: the model has too few prompts.
    """
    first, others = prompts_left(model, few, many), prompts_of(model, many)
    if len(first) < few or len(others) < many or set(first) & set(others):
        raise ValueError(f"{model} has {len(prompts_of(model, None))} prompts, but {few} and {many} others are needed")
    return first, others


def requests(
    omni: Omni, prompts: Sequence[tuple[str, Path | None]], seeds: Sequence[int], **arguments: Any
) -> list[GenerationRequest]:
    """Every prompt with every seed."""
    return [
        one
        for text, image in prompts
        for seed in seeds
        for one in omni.prepare(text, seed=seed, **arguments, **({} if image is None else {"image": image}))
    ]


class Calibration:
    """A search on some images; its samples are saved.

    Attributes:
        images: the images, with their full runs.

    Args:
        some: requests of the search.
        responding: the part of `some` whose responses are measured.
        journal: where samples are saved.
    """

    def __init__(
        self,
        omni: Omni,
        some: Sequence[GenerationRequest],
        responding: Sequence[GenerationRequest],
        batch: int,
        journal: Path,
    ) -> None:
        self.images = Images(omni.pipe, some, Settings(), batch)
        self._journal = Journal(journal, about(omni, some, Settings()))
        self._sigmas = self.images.record().sigmas
        measured = Images(omni.pipe, responding, Settings(), batch)
        measured.record()
        self._responses = measured.responses(self._sigmas)
        self._transformer = type(omni.pipe.transformer).__name__
        self._name = f"{omni.name}, {len(some)} images"

    def starts(self, budget: int) -> list[tuple[int, ...]]:
        """The starting points of a search."""
        return starts(self._responses, self._sigmas, budget, self._transformer)[0]

    def search(self, budget: int, tries: int, patience: int, also: Sequence[tuple[int, ...]] = ()) -> dict[str, Any]:
        """The best schedule, and how many were sampled."""
        own, cost = starts(self._responses, self._sigmas, budget, self._transformer)
        start = time.perf_counter()

        def on_try(number: int, tried: Tried, best: Tried) -> None:
            told = f"{self._name}, {budget} steps: {number} of {tries} schedules"
            left = (time.perf_counter() - start) / number * (tries - number) / 60
            print(f"\r\033[K{told}, {left:.0f} min left at most, best {best.score:.2f} dB", end="", file=sys.stderr)

        sample = functools.partial(self._journal.sample, self.images)
        steps = len(self._sigmas) - 1
        found = search([*also, *own], steps, sample, tries, patience, cost=cost, on_try=on_try)
        print(file=sys.stderr)
        return {"best": found.best, "tries": len(found.trail)}

    def measure(self, computed: tuple[int, ...]) -> Tried:
        """Sample with a schedule on all images."""
        return self._journal.sample(self.images, computed)


def compare(
    few: Calibration, many: Calibration, budget: int, tries: tuple[int, int], patience: int, steps: int
) -> dict[str, Any]:
    """Run both searches for one number of computed steps, and measure on the many images."""
    small = few.search(budget, tries[0], patience)
    large = many.search(budget, tries[1], patience, also=[small["best"].computed, *few.starts(budget)])
    measured = {
        "few": many.measure(small["best"].computed),
        "many": many.measure(large["best"].computed),
        "even": many.measure(schedules.even(steps, budget).computed),
        "plain": many.images.plain(budget),
    }
    loss, error = gain(measured["many"].psnr, measured["few"].psnr)
    return {
        "budget": budget,
        "loss": round(loss, 2),
        "loss_error": round(error, 2),
        "loss_of_p5": round(statistics(measured["many"])["p5"] - statistics(measured["few"])["p5"], 2),
        "searches": {
            name: {"tries": one["tries"], "searched": statistics(one["best"])}
            for name, one in (("few", small), ("many", large))
        },
        "computed": {name: list(measured[name].computed) for name in ("few", "many", "even")},
        "psnr": {name: statistics(one) for name, one in measured.items()},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± standard deviation and 5th percentile on the many images; last, the mean loss ± its standard error."""
    names = {"few": "calibrated on few", "many": "on many", "even": "evenly spread", "plain": "plain sampling"}
    lines = [f"| computed steps | {' | '.join(names.values())} | loss |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = [f"{one['mean']:.1f} ± {one['std']:.1f}, p5 {one['p5']:.1f}" for one in map(row["psnr"].get, names)]
        lines.append(f"| {row['budget']} | {' | '.join(cells)} | {row['loss']:.2f} ± {row['loss_error']:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, measure, write the numbers after each budget, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="an embedded model (default: %(default)s)")
    parser.add_argument("--budgets", default="25,17", metavar="N,N", help="computed steps (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--tries", type=int, default=TRIES, metavar="N", help="schedules on few (default: %(default)s)")
    parser.add_argument(
        "--many-tries", type=int, default=TRIES, metavar="N", help="schedules on many (default: %(default)s)"
    )
    parser.add_argument(
        "--patience", type=int, default=PATIENCE, metavar="N", help="stop after N schedules in a row that are no better"
    )
    parser.add_argument(
        "--prompts", type=int, default=COMPARED, metavar="N", help="number of other prompts (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/schedule-transfer"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if {ALLOWED:g} dB or more are lost")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    omni = Omni(options.model, cache_backend=None, device="cpu")
    omni.pipe.set_progress_bar_config(disable=True)
    try:
        few_prompts, many_prompts = prompts(options.model, SCHEDULE_PROMPTS, options.prompts)
    except ValueError as error:
        parser.error(str(error))
    few, many = (
        Calibration(
            omni,
            requests(omni, some, seeds, num_inference_steps=options.steps),
            requests(omni, some, responding, num_inference_steps=options.steps),
            options.batch,
            options.work / f"{options.model}-{name}.jsonl",
        )
        for name, some, seeds, responding in (
            ("few", few_prompts, SCHEDULE_SEEDS, SCHEDULE_SEEDS),
            ("many", many_prompts, MANY_SEEDS, MANY_SEEDS[:1]),
        )
    )
    rows: list[dict[str, Any]] = []
    path = options.out / f"schedule-transfer-{options.model}.json"
    made = {
        "command": f"python -m benchmarks.schedule_transfer --model {options.model} --budgets {options.budgets} "
        f"--tries {options.tries} --many-tries {options.many_tries}",
        "model": options.model,
        "steps": options.steps,
        "patience": options.patience,
        "few": {"prompts": [text for text, _ in few_prompts], "seeds": list(SCHEDULE_SEEDS)},
        "many": {"prompts": len(many_prompts), "seeds": list(MANY_SEEDS)},
        "machine": machine(torch.device("cpu")),
    }
    for budget in map(int, options.budgets.split(",")):
        tries = options.tries, options.many_tries
        rows.append(compare(few, many, budget, tries, options.patience, options.steps))
        write(path, made | {"rows": rows})
    print(table(rows))
    print(path)
    failed = [row["budget"] for row in rows if row["loss"] >= ALLOWED]
    if failed:
        print(f"{ALLOWED:g} dB or more are lost at {', '.join(map(str, failed))} computed steps", file=sys.stderr)
    return int(options.check and bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
