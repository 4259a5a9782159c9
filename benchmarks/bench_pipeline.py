"""Whole requests on the full-size Qwen-Image transformer with random weights: caches, schedules, fused blocks.

    python -m benchmarks.bench_pipeline [--layers N] [--side 1024] [--steps 50] [--compile] [--small] [--check]

The pipeline has 20 billion random weights in bf16 (41 GB), a VAE of the released size, prompt embeddings of the right
shape, and guidance with two forwards a step. There is no text encoder.

With random weights, a cache cannot choose steps in a meaningful way, so the computed steps are fixed. tea_cache
computes 26 of 50 (at the others it measures, and skips at any distance) and cache_dit 27 by a mask. These are the
numbers that their published times imply (10.47 s and 10.8 s against 20.0 s, vLLM-Omni, 1024², 50 steps, one H200).
velocity_cache computes 25 and 17. Each run is measured without and with fused blocks, after a warm-up
request, and with `--compile` also with compiled blocks. The runs without a cache and with velocity_cache are also
measured with fused blocks and quantised layers, in the 8-bit dtypes that the device multiplies.

The table has the seconds of a request, and the median time of a computed and of a skipped forward (half a step,
because of guidance). *Of roof* is the time that the forward's floating-point operations would take at the rate of
large bf16 matrix products on this device, divided by the time of a computed forward.

`--check` exits with 1 if 25 computed steps of 50 with fused blocks take 6 s or more. The published seconds, without
and with a cache, are also printed. On a GPU, results are written to results/pipeline-<device>.json. `--small` makes
everything tiny, to try it anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import omni_kernels
from benchmarks.full_size import MODELS, SMALL_SIDE, build, inputs
from benchmarks.measure import device_here
from benchmarks.results import RESULTS
from omni_kernels.device import Timer, synchronize
from omni_kernels.patching.quantised import DTYPES, dtype_on
from omni_kernels.validation.record import device_name, machine, slug, write
from omni_kernels.validation.timing import median_seconds
from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits
from omni_runtime.cache.schedules import even

MODEL = "qwen-image"
LIMIT_RUN, LIMIT_SECONDS = "velocity_cache 25, fused", 6.0
#: Published by vLLM-Omni for 50 steps at 1024² on one H200: without a cache, and with its fastest one.
PUBLISHED_SECONDS = (20.0, 10.5)
MATRIX = {"cpu": 1024, "cuda": 8192}


def spread(steps: int, published: float) -> tuple[int, ...]:
    """A mask of evenly spread computed steps: as many as a published time implies if skipped steps take no time."""
    computed = even(steps, round(published / PUBLISHED_SECONDS[0] * steps)).computed
    return tuple(int(step in computed) for step in range(steps))


def told(handle: Any, steps: int) -> None:
    """Make an installed tea_cache compute the steps that its published time implies."""
    gate = functools.partial(AccumulatedPolynomialGate, Limits(mask=spread(steps, 10.47)), math.inf, (1.0, 0.0))
    for stack in handle._installed.stacks.values():
        stack.choose = functools.partial(_with_gate, stack.choose, lambda request: gate())


def _with_gate(choose: Any, gate: Any, row: Any, blocks: int) -> Any:
    return dataclasses.replace(choose(row, blocks), gate=gate)


def runs(steps: int) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """name → (backend, config)."""
    half, third = round(steps / 2), round(steps * 0.34)
    return {
        "no cache": (None, {}),
        "tea_cache": ("tea_cache", {"coefficients": [0, 0, 0, 1, 0]}),  # the computed steps are set by `told`
        "cache_dit": (
            "cache_dit",
            {
                "steps_computation_mask": list(spread(steps, 10.8)),
                "scm_steps_policy": "static",
                "max_warmup_steps": 1,
                "max_continuous_cached_steps": -1,
                "enable_taylorseer": True,
            },
        ),
        f"velocity_cache {half}": ("velocity_cache", {"budget": half}),
        f"velocity_cache {third}": ("velocity_cache", {"budget": third}),
    }


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        seconds: time of a request, including the VAE's decoding.
        computed: in how many of the `steps` the transformer ran.
        computed_ms, skipped_ms: median time of a forward in such steps; None if there are none.
        of_roof: the time of a computed forward's operations at the rate of large products, over its measured time.
    """

    run: str
    fused: bool
    compiled: bool
    seconds: float
    steps: int
    computed: int
    computed_ms: float | None
    skipped_ms: float | None
    of_roof: float | None


class Marks:
    """The times at which steps end on the device."""

    def __init__(self, device: torch.device) -> None:
        self._timer = Timer(device)
        self._marks: list[Any] = []

    def __call__(self, *of_the_step: Any) -> dict[str, Any]:
        """Mark the current time; used as a pipeline's `callback_on_step_end`."""
        self._marks.append(self._timer.mark())
        return {}

    def spans(self) -> list[float]:
        """Seconds between consecutive marks; the device must have reached all of them."""
        return [self._timer.seconds(a, b) for a, b in zip(self._marks, self._marks[1:], strict=False)]


def pipeline(device: torch.device, dtype: torch.dtype, small: bool, layers: int | None) -> Any:
    """Qwen-Image without text encoder."""
    transformer = build(MODELS[MODEL], device, dtype, small, layers)
    narrow = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if small else {}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    pipe = diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=diffusers.AutoencoderKLQwenImage(**narrow).to(device, dtype).eval(),
        scheduler=scheduler,
        text_encoder=None,
        tokenizer=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request(pipe: Any, side: int, steps: int) -> dict[str, Any]:
    """A request's arguments."""
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    channels = pipe.transformer.config.joint_attention_dim
    generator = torch.Generator(device).manual_seed(0)

    tokens = inputs(MODELS[MODEL], pipe.transformer, side, dtype)["encoder_hidden_states"].shape[1]

    def text() -> torch.Tensor:
        return torch.randn(1, tokens, channels, device=device, dtype=dtype, generator=generator)

    return {
        "prompt_embeds": text(),
        "prompt_embeds_mask": torch.ones(1, tokens, device=device, dtype=torch.long),
        "negative_prompt_embeds": text(),
        "negative_prompt_embeds_mask": torch.ones(1, tokens, device=device, dtype=torch.long),
        "true_cfg_scale": 4.0,
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "generator": torch.Generator(device).manual_seed(0),
        "output_type": "pt",
    }


@torch.no_grad()
def forward_flops(pipe: Any, side: int) -> int:
    """Floating-point operations of one forward."""
    arguments = inputs(MODELS[MODEL], pipe.transformer, side, pipe.transformer.dtype)

    def attention(query: Any, key: Any, value: Any, *settings: Any, **more: Any) -> int:
        return sdpa_flop_count(query, key, value)

    on_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention
    }  # torch counts only the attention of GPUs
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        pipe.transformer(**arguments)
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product."""
    n = MATRIX.get(device.type, 4096)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_seconds([lambda: a @ b], device, 10)


def measure(
    name: str,
    pipe: Any,
    side: int,
    steps: int,
    fuse: bool,
    compile: str | None,
    floor: float,
    rounds: int,
    quantize: dict[str, Any] | None = None,
) -> Row:
    """Measure one run: the median of `rounds` requests after a warm-up request.

    Raises:
        AssertionError: blocks are not fused, or the result is not finite.
    """
    device = pipe.transformer.device
    backend, config = runs(steps)[name]
    seconds: list[float] = []
    spans: list[list[float]] = []
    with omni_kernels.patched(pipe, backend, config, fuse=fuse, compile=compile, quantize=quantize) as handle:
        assert not (fuse and handle.fused.left_alone), handle.fused
        if backend == "tea_cache":
            told(handle, steps)
        for _ in range(1 + rounds):
            marks = Marks(device)
            synchronize(device)
            start = time.perf_counter()
            made = pipe(**request(pipe, side, steps), callback_on_step_end=marks).images
            synchronize(device)
            seconds.append(time.perf_counter() - start)
            spans.append(marks.spans())
            assert torch.isfinite(made).all(), f"{name}: the images are not finite"
        report = handle.report
    ran = [True] * steps
    if report is not None:
        (branch, *_) = report.branches.values()
        ran = [decision.computed for decision in branch.decisions]
    by_step = list(zip(ran[1:], map(statistics.median, zip(*spans[1:], strict=True)), strict=True))

    def forward_ms(computed: bool) -> float | None:
        times = [span for did, span in by_step if did is computed]
        return round(statistics.median(times) / 2 * 1000, 3) if times else None

    computed_ms = forward_ms(True)
    eight = "" if quantize is None else f", {quantize['dtype']}"
    return Row(
        run=name + (", fused" if fuse else "") + (", compiled" if compile else "") + eight,
        fused=fuse,
        compiled=compile is not None,
        seconds=round(statistics.median(seconds[1:]), 4),
        steps=steps,
        computed=sum(ran),
        computed_ms=computed_ms,
        skipped_ms=forward_ms(False),
        of_roof=None if computed_ms is None else round(floor * 1000 / computed_ms, 3),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as a text table."""
    first = rows[0].seconds
    lines = [
        f"{'run':36} {'seconds':>8} {'speedup':>8} {'steps':>9} {'computed':>12} {'skipped':>12} {'of roof':>8}",
        f"{'':36} {'':8} {'':8} {'computed':>9} {'ms a forward':>12} {'ms a forward':>12}",
    ]
    for r in rows:
        times = f"{_or_none(r.computed_ms, '12.2f')} {_or_none(r.skipped_ms, '12.2f')} {_or_none(r.of_roof, '8.0%')}"
        lines.append(f"{r.run:36} {r.seconds:8.2f} {first / r.seconds:7.2f}× {f'{r.computed}/{r.steps}':>9} {times}")
    return "\n".join(lines)


def _or_none(value: float | None, form: str) -> str:
    return f"{value:{form}}" if value is not None else " " * int(form.partition(".")[0])


@dataclass(frozen=True)
class Goal:
    """The seconds of a run, and the limit that it must stay below."""

    run: str
    seconds: float
    limit: float = LIMIT_SECONDS

    @property
    def met(self) -> bool:
        """Whether the run is below the limit."""
        return self.seconds < self.limit

    def __str__(self) -> str:
        without, cached = PUBLISHED_SECONDS
        return (
            f"{'reached' if self.met else 'MISSED '}  {self.run}: {self.seconds:.2f} s, under {self.limit:g} s; "
            f"published are {without} s without a cache, and {cached} s with one"
        )


def goal(rows: Sequence[Row]) -> Goal | None:
    """The goal for the full-size model at 1024²: 25 of 50 steps computed, fused blocks; None if not measured.

    Raises:
        AssertionError: that run computed another number of steps.
    """
    found = [row for row in rows if row.run == LIMIT_RUN and row.steps == 50]
    if not found:
        return None
    (row,) = found
    assert row.computed == 25, f"{row.run} has computed {row.computed} steps"
    return Goal(row.run, row.seconds)


def _in_8_bits(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """How layers are quantised on this device. All of a small model's layers are narrow."""
    found = []
    for name in DTYPES:
        with contextlib.suppress(ValueError):  # the device has no such dtype
            dtype_on(name, device)
            found.append({"dtype": name} | ({"min_width": 0} if small else {}))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_pipeline", description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, metavar="N", help="blocks (default: the model's 60)")
    parser.add_argument("--side", type=int, metavar="N", help="pixels (default: 1024)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="requests after the first, of each run")
    parser.add_argument("--runs", metavar="NAME,NAME", help="default: all")
    parser.add_argument("--compile", action="store_true", help="with compiled blocks too")
    parser.add_argument("--small", action="store_true", help="a few channels and 64² pixels, fp32 on a CPU")
    parser.add_argument("--out", type=Path, help="where to write; by default results/pipeline-<device>.json, on a GPU")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the target is missed")
    options = parser.parse_args(argv)
    names = list(runs(options.steps)) if options.runs is None else options.runs.split(",")
    unknown = [name for name in names if name not in runs(options.steps)]
    if unknown:
        parser.error(f"unknown run {unknown[0]!r}; there are {', '.join(runs(options.steps))}")
    device = device_here()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    side = options.side or (SMALL_SIDE if options.small else 1024)
    pipe = pipeline(device, dtype, options.small, options.layers)
    flops, rate = forward_flops(pipe, side), matrix_rate(device, dtype)
    ways: list[dict[str, Any]] = [{"fuse": False, "compile": None}, {"fuse": True, "compile": None}]
    if options.compile:
        ways += [{"fuse": fuse, "compile": "regional"} for fuse in (False, True)]
    ways += [{"fuse": True, "compile": None, "quantize": how} for how in _in_8_bits(device, options.small)]
    rows = []
    for how in ways:
        for name in (name for name in names if "quantize" not in how or name.startswith(("no cache", "velocity"))):
            row = measure(name, pipe, side, options.steps, floor=flops / rate, rounds=options.rounds, **how)
            rows.append(row)
            print(table(rows[:1] if len(rows) == 1 else [rows[0], row]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    print(f"one forward: {flops / 1e12:.2f} TFLOP; large products: {rate / 1e12:.1f} TFLOP/s")
    full = not options.small and options.layers is None and side == 1024
    reach = goal(rows) if full else None
    if reach is not None:
        print(reach)
    kept = device.type != "cpu" and not options.small
    path = options.out or (RESULTS / f"pipeline-{slug(device_name(device))}.json" if kept else None)
    if path is not None:
        report: Mapping[str, Any] = {
            "command": " ".join(["python -m benchmarks.bench_pipeline", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine(device),
            "small": options.small,
            "layers": pipe.transformer.config.num_layers,
            "side": side,
            "dtype": str(dtype).removeprefix("torch."),
            "forward_tflop": flops / 1e12,
            "matrix_tflop_per_s": rate / 1e12,
            "published_seconds": PUBLISHED_SECONDS,
            "goal": None if reach is None else {**vars(reach), "met": reach.met},
            "rows": [vars(row) for row in rows],
        }
        write(path, dict(report))
        print(path)
    return int(options.check and not (reach is not None and reach.met))


if __name__ == "__main__":
    sys.exit(main())
