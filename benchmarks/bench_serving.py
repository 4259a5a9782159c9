"""Many requests at once: images per second and latency of the batching engine, with caches and without.

    python -m benchmarks.bench_serving [--check]   # 10 minutes; writes benchmarks/results/serving-<model>.json

- *At 8 in flight*: 8 requests always run; images per second. Beside it is one request at a time, and a limit: what the
  engine would reach if a request were nothing but its forwards, in batches of 8. All settings take turns, and the
  median of the turns counts.
- *Open loop*: requests arrive at random (exponential gaps, from a seed), whether or not earlier ones are done, at
  shares of the rate that one at a time manages without a cache. Latency is from arrival to result. The settings are one
  at a time without a cache (an engine with one request in flight), and batched with each cache.

The seconds of the first part are those of processor time, so that other work on the machine counts less; the second
part needs real time. One torch thread. `--check` exits with 1 if a goal is missed. The first pictures of each setting
are compared with those of one at a time.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.serving.engine import Engine

PROMPTS = (
    "red apple on blue",
    "a fox",
    "a penguin on green",
    "a rocket",
    "a wolf and a castle",
    "a ghost",
    "a tulip on red",
    "a mushroom on orange",
)
IN_FLIGHT = 8
ONE = "one at a time, no cache"
STEPS = 50
ROUNDS = 2
#: Arrivals per second, as a share of what one at a time manages without a cache.
LOADS = (0.5, 1.0, 2.0)
ARRIVALS = 12
#: A picture may differ from that of one at a time by this, in a range of 0 to 1.
EXACT = 1e-4
#: The goals: images/s at 8 in flight over one at a time; over the limit; and how well a cache's gain multiplies.
TIMES, OF_LIMIT, GAIN = 2.2, 0.85, 0.9


@dataclass(frozen=True)
class Setting:
    """A cache method and its configuration."""

    name: str
    backend: str | None
    config: dict[str, Any]


SETTINGS = (
    Setting("no cache", None, {}),
    Setting("velocity_cache, half of the steps", "velocity_cache", {"budget": STEPS // 2}),
    Setting("first_block_cache 0.15", "first_block_cache", {"threshold": 0.15}),
)


def ask(setting: Setting, place: int) -> dict[str, Any]:
    """The arguments of request number `place`."""
    return {
        "prompt": PROMPTS[place % len(PROMPTS)],
        "seed": place,
        "num_inference_steps": STEPS,
        "output_type": "pt",
        "cache_backend": setting.backend,
        "cache_config": setting.config or None,
    }


def one_at_a_time(omni: Omni, setting: Setting, images: int) -> tuple[float, list[torch.Tensor]]:
    """Images per second of processor time, and the pictures. `omni` has the setting's cache, and no engine."""
    asked = [ask(setting, place) for place in range(images)]
    for one in asked:
        del one["cache_backend"], one["cache_config"]
    begun = time.process_time()
    made = [omni.generate(**one)[0].images for one in asked]
    return images / (time.process_time() - begun), made


def in_flight(engine: Engine, setting: Setting, images: int) -> tuple[float, list[torch.Tensor], float]:
    """As `one_at_a_time` with `IN_FLIGHT` requests at once; also the mean number of samples in a forward."""
    before = engine.forwards.made, engine.forwards.samples
    begun = time.process_time()
    jobs = [engine.submit(**ask(setting, place)) for place in range(images)]
    made = [job.result().images for job in jobs]
    rate = images / (time.process_time() - begun)
    return rate, made, (engine.forwards.samples - before[1]) / (engine.forwards.made - before[0])


@torch.no_grad()
def seconds_of_a_forward(omni: Omni, samples: int, repeats: int = 15) -> float:
    """The median processor time of a bare forward of so many samples."""
    kept: list[dict[str, Any]] = []
    handle = omni.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs), with_kwargs=True
    )
    try:
        omni.generate(PROMPTS[0], seed=0, num_inference_steps=2)
    finally:
        handle.remove()
    call = {
        name: torch.cat([value] * samples) if isinstance(value, torch.Tensor) else value * samples
        if isinstance(value, list) else value
        for name, value in kept[0].items()
    }  # fmt: skip
    seconds = []
    for _ in range(repeats):
        begun = time.process_time()
        omni.pipe.transformer(**call)
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds)


def open_loop(engine: Engine, setting: Setting, rate: float, seed: int = 0) -> dict[str, float]:
    """`ARRIVALS` requests at `rate` per second: latencies, images per second, and the mean batch."""
    draws = random.Random(seed)
    before = engine.forwards.made, engine.forwards.samples
    begun = time.perf_counter()
    due, jobs, ends = begun, [], []
    for place in range(ARRIVALS):
        due += draws.expovariate(rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        arrived = time.perf_counter()
        job = engine.submit(**ask(setting, place))
        job.add_done_callback(lambda _, arrived=arrived: ends.append(time.perf_counter() - arrived))
        jobs.append(job)
    for job in jobs:
        job.result()
    made = engine.forwards.made - before[0]
    p50, p95, p99 = np.percentile(ends, [50, 95, 99])
    return {
        "offered_per_second": rate,
        "images_per_second": ARRIVALS / (time.perf_counter() - begun),
        "p50_seconds": float(p50),
        "p95_seconds": float(p95),
        "p99_seconds": float(p99),
        "forwards": made,
        "mean_batch": (engine.forwards.samples - before[1]) / made,
    }


def open_loops(single: Engine, batched: Engine, real: float) -> list[dict[str, Any]]:
    """The open loop of each setting at each load; `real` is the rate of one at a time without a cache."""
    rows: list[tuple[str, Engine, Setting]] = [(ONE, single, SETTINGS[0])]
    rows += [(f"batched, {setting.name}", batched, setting) for setting in SETTINGS]
    loads = []
    for load in LOADS:
        for name, engine, setting in rows:
            loads.append({"setting": name, "load": load, **open_loop(engine, setting, load * real)})
            print(f"load {load}, {name}: p50 {loads[-1]['p50_seconds']:.2f} s", flush=True)
    return loads


def differ(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference of pictures."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def measure(model: str, rounds: int, open_rounds: bool = True) -> dict[str, Any]:
    """All figures of one model."""
    omni = Omni(model, cache_backend=None)
    guided = 2  # forwards a step
    single, many = seconds_of_a_forward(omni, 1), seconds_of_a_forward(omni, IN_FLIGHT)
    limit = IN_FLIGHT / (guided * STEPS * many)
    rows: dict[str, dict[str, list[float]]] = {one.name: {"alone": [], "together": [], "batch": []} for one in SETTINGS}
    alone = {one.name: Omni(model, cache_backend=one.backend, cache_config=one.config or None) for one in SETTINGS}
    for one in alone.values():
        one.pipe.set_progress_bar_config(disable=True)
    with omni.engine(max_batch=IN_FLIGHT, in_flight=IN_FLIGHT) as engine:
        for setting in SETTINGS:  # everything that is done once
            in_flight(engine, setting, IN_FLIGHT)
        for turn in range(rounds):
            for setting in SETTINGS:
                rate, made = one_at_a_time(alone[setting.name], setting, 4)
                rows[setting.name]["alone"].append(rate)
                rate, together, batch = in_flight(engine, setting, 2 * IN_FLIGHT)
                rows[setting.name]["together"].append(rate)
                rows[setting.name]["batch"].append(batch)
                off = differ(made, together[: len(made)])
                if off > EXACT:
                    raise RuntimeError(f"{setting.name}: pictures of the engine differ by {off:.2g} from those alone")
                print(f"turn {turn + 1}, {setting.name}: {rows[setting.name]['alone'][-1]:.2f} images/s one at a time, "
                      f"{rate:.2f} at {IN_FLIGHT} in flight, pictures differ by {off:.1g}", flush=True)  # fmt: skip
        begun = time.perf_counter()
        one_at_a_time(alone[SETTINGS[0].name], SETTINGS[0], 3)
        real = 3 / (time.perf_counter() - begun)
        with alone[SETTINGS[0].name].engine(max_batch=1, in_flight=1) as single_engine:
            loads = open_loops(single_engine, engine, real) if open_rounds else []
    medians = {name: {key: statistics.median(each) for key, each in row.items()} for name, row in rows.items()}
    return {
        "steps": STEPS,
        "in_flight": IN_FLIGHT,
        "forward_seconds": {"1": single, str(IN_FLIGHT): many},
        "limit_images_per_second": limit,
        "images_per_second": medians,
        "turns": rows,
        "open_loop": loads,
    }


def table(found: dict[str, Any]) -> dict[str, list[Any]]:
    """What the page of results shows: a row for each setting."""
    rows = [
        [
            name,
            f"{row['alone']:.2f}",
            f"{row['together']:.2f}",
            f"{row['together'] / row['alone']:.2f}×",
            f"{row['batch']:.1f}",
        ]
        for name, row in found["images_per_second"].items()
    ]
    single, many = found["forward_seconds"].values()
    limit = found["limit_images_per_second"]
    rows.append(["limit: bare forwards, no cache", f"{limit * many / IN_FLIGHT / single:.2f}", f"{limit:.2f}", "", ""])
    columns = ["", "one at a time, images/s", f"{IN_FLIGHT} in flight, images/s", "", "samples in a forward"]
    return {"columns": columns, "rows": rows}


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal, the figure and whether it is met."""
    rates = found["images_per_second"]
    plain = rates[SETTINGS[0].name]
    listed = [
        ("8 in flight, images/s over one at a time", plain["together"] / plain["alone"], TIMES),
        (
            "8 in flight, images/s of the limit of bare forwards",
            plain["together"] / found["limit_images_per_second"],
            OF_LIMIT,
        ),
    ]
    for setting in SETTINGS[1:]:
        own = rates[setting.name]
        gain = (own["together"] / plain["together"]) / (own["alone"] / plain["alone"])
        listed.append((f"{setting.name}: its gain in flight, of its gain alone", gain, GAIN))
    return [
        {"what": what, "figure": figure, "at_least": least, "met": figure >= least} for what, figure, least in listed
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_serving", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="emoji-qwen-image", help="an embedded model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each setting (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--out", type=Path, help="where to write (default: benchmarks/results/serving-MODEL.json)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = measure(options.model, options.rounds)
    reached = goals(found)
    for goal in reached:
        word = "reached" if goal["met"] else "MISSED "
        print(f"{word}  {goal['what']}: {goal['figure']:.2f}, at least {goal['at_least']}")
    report = {
        "command": f"python -m benchmarks.bench_serving --model {options.model}",
        "machine": machine(torch.device("cpu")),
        "model": options.model,
        **found,
        "goals": reached,
        **table(found),
    }
    write(options.out or RESULTS / f"serving-{options.model}.json", report)
    return int(options.check and not all(goal["met"] for goal in reached))


if __name__ == "__main__":
    sys.exit(main())
