"""The cost of a cache itself: the host time and operators that it adds to a forward, for ours and the peers.

    python -m benchmarks.bench_overhead [--check]

The model is a tiny Qwen-Image transformer of 60 blocks, with the same weights for all contenders, and no guidance.
Each contender is installed on its own pipeline, as its users install it, and runs whole requests (`set_timesteps`,
then forward and `step` in turn). All contenders take turns in one process. On the CPU, only the thread's own CPU time
counts, so that other processes matter less.

Other activity on a machine only adds to times. So the result is the tenth percentile of a forward's times, and the
added time is the difference of two such percentiles. The number after ± is the noise: the width of the middle half of
the differences between forwards that were timed in the same turn. The memory layout of code and data changes the added
time by a tenth from one process to the next. So everything is measured in several processes, and medians are reported.

- A *skipped* forward is one whose distance was measured and is small. The cache's added time is its time minus that of
  an unpatched transformer with only the blocks that still run: 1, or none for tea_cache.
- A *computed* forward is one whose distance was measured and is too large. The added time is its time minus that of
  the unpatched transformer. The noise of 60 blocks is larger than the cost of a cache, so computed forwards are timed
  with *idle* blocks, which return their input times a constant. Skipped forwards are timed both ways. Idle blocks
  leave the processor's caches to the measured code, so the cost is lower, and is the cache's own.
- *Operators* are those that torch's dispatcher sees; each of our ops counts as one. In the *expanded* count, each of
  our ops is replaced by the operators of its plain-torch implementation for the CPU. *H-sized* operators read or write
  a tensor of the hidden states' shape; views are not counted. All of these are the operators that the cache adds.

An op calls its implementation directly, on the CPU as on a GPU, unless something observes operators (`registration`).

A *fused* forward, of the same transformer with fused blocks, is compared with the unfused one in two ways: as it is,
and with *nothing computed*, where our ops only allocate their outputs. The second is the work of a GPU's host, without
Triton's launches.

First, the benchmark checks that every contender skips and computes when it should, and that ours gives its peer's
output. `--check` exits with 1 if a target is missed; a wrong result always raises an error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch

from benchmarks.contenders import ALWAYS_SMALL, CONTENDERS, NEVER_SMALL, STEPS, Contender
from benchmarks.counting import Counter
from benchmarks.measure import device_here
from benchmarks.results import RESULTS
from omni_kernels import patched
from omni_kernels.device import synchronize
from omni_kernels.patching import handle_of
from omni_kernels.registration import DIRECT
from omni_kernels.validation.record import device_name, machine, slug, write

BLOCKS = 60
CHANNELS = 64
IMAGE = 4  # tokens along each side
TEXT = 11
FIRST = 6  # earlier steps are not counted: they have nothing to compare with, or do something for the first time


# The transformer, and requests on it


class Weights:
    """The weights of the deepest transformer, shared by all others."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._model = _transformer(blocks).to(device)
            # With random modulation, steps differ too much. Scaled down, each step resembles the one before.
            for name, layer in self._model.named_modules():
                if isinstance(layer, torch.nn.Linear) and ("img_mod." in name or "txt_mod." in name):
                    layer.weight.data.mul_(0.3)
                    layer.bias.data.normal_(0.0, 0.3)
        self.blocks = blocks
        self.device = device

    def pipeline(self, blocks: int, idle: bool = False) -> Any:
        """A pipeline with only a scheduler and a transformer of the first `blocks` blocks."""
        model = _transformer(0)
        model.transformer_blocks = torch.nn.ModuleList(_transformer_block() for _ in range(blocks))
        mine = model.state_dict().keys()
        model.load_state_dict({k: v for k, v in self._model.state_dict().items() if k in mine}, assign=True)
        for block in model.transformer_blocks if idle else ():
            block.attn = torch.nn.Identity()
            vars(block)["forward"] = functools.partial(_idle, block)
        rest = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.QwenImagePipeline(scheduler=scheduler, transformer=model.eval().to(self.device), **rest)


def _transformer(blocks: int) -> diffusers.QwenImageTransformer2DModel:
    # 32 channels of latents, so that only the hidden states have the hidden states' shape.
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=32,
        out_channels=8,
        num_layers=blocks,
        attention_head_dim=32,
        num_attention_heads=CHANNELS // 32,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    ).eval()


def _transformer_block() -> torch.nn.Module:
    with torch.device("meta"):
        return _transformer(1).transformer_blocks[0]


def _idle(
    block: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A Qwen-Image block that does almost nothing; it calls `attn` so that blocks can be counted there."""
    return encoder_hidden_states, block.attn(hidden_states) * 1.01


class Run:
    """One contender, or none, on its own pipeline."""

    def __init__(
        self,
        weights: Weights,
        blocks: int,
        contender: Contender | None = None,
        distance: float = 0.0,
        idle: bool = False,
    ) -> None:
        self.pipe = weights.pipeline(blocks, idle)
        self.seconds: list[float] = []
        self._device = weights.device
        self._announce = None if contender is None else contender.install(self.pipe, distance)

    def request(
        self, steps: int, around: Callable[[int], contextlib.AbstractContextManager[Any]]
    ) -> Iterator[torch.Tensor]:
        """The first `steps` steps of a request, one at a time; each forward runs within `around(step)`."""
        scheduler, transformer = self.pipe.scheduler, self.pipe.transformer
        random = torch.Generator().manual_seed(0)
        latents = torch.randn(1, IMAGE * IMAGE, 32, generator=random).to(self._device)
        text = torch.randn(1, TEXT, 32, generator=random).to(self._device)
        if self._announce:
            self._announce()
        handle = handle_of(self.pipe)
        with contextlib.nullcontext() if handle is None else handle.sampling():
            scheduler.set_timesteps(STEPS, device=self._device)
            for step, t in enumerate(scheduler.timesteps[:steps]):
                arguments = {
                    "hidden_states": latents,
                    "timestep": t.expand(1) / 1000,
                    "encoder_hidden_states": text,
                    "encoder_hidden_states_mask": None,
                    "img_shapes": [[(1, IMAGE, IMAGE)]],
                    "return_dict": False,
                }
                with transformer.cache_context("cond"), around(step):
                    output = transformer(**arguments)[0]
                latents = scheduler.step(output, t, latents, return_dict=False)[0]
                yield output

    def timed(self, steps: int) -> Iterator[torch.Tensor]:
        """`request`, which also appends the times of the forwards from `FIRST` on to `seconds`."""

        now = time.thread_time if self._device.type == "cpu" else time.perf_counter

        @contextlib.contextmanager
        def clock(step: int) -> Iterator[None]:
            start = now()
            yield
            synchronize(self._device)
            if step >= FIRST:
                self.seconds.append(now() - start)

        return self.request(steps, clock)


def time_in_turns(runs: Sequence[Run], rounds: int, steps: int = STEPS) -> None:
    """Run requests of `steps` steps, one contender after the other, so that forwards of one kind follow each other."""
    for index in range(rounds):
        for run in runs if index % 2 else reversed(runs):
            for _ in run.timed(steps):
                pass


# Counting


@dataclass
class Counts:
    """Operators of one forward."""

    operators: int = 0
    h_sized: int = 0
    expanded: int = 0
    names: list[str] = field(default_factory=list)


def count(run: Run, expandable: bool = True) -> tuple[Counts, list[torch.Tensor], list[int]]:
    """Run a few forwards: the operators of the last one, all outputs, and the number of blocks that each ran."""
    ran: list[int] = []
    counters: list[Counter] = []

    def note(module: torch.nn.Module, args: Any) -> None:
        ran[-1] += 1

    def counting(step: int, expand: bool) -> contextlib.AbstractContextManager[Any]:
        ran.append(0)
        counters.append(Counter((1, IMAGE * IMAGE, CHANNELS), expand))
        return counters[-1]

    hooks = [b.attn.register_forward_pre_hook(note) for b in _blocks_of(run.pipe.transformer)]
    try:
        outputs = list(run.request(FIRST + 2, functools.partial(counting, expand=False)))
        last, blocks = counters[-1], ran[:]
        counts = Counts(len(last.names), len(last.h_sized), names=last.names)
        if expandable:
            list(run.request(FIRST + 2, functools.partial(counting, expand=True)))
            counts.expanded = len(counters[-1].names)
    finally:
        for hook in hooks:
            hook.remove()
    return counts, outputs, blocks


def _blocks_of(transformer: Any) -> list[Any]:
    return list(transformer._modules["transformer_blocks"]._modules.values())


# The benchmark


@dataclass
class Cost:
    """What one contender adds to one kind of forward, in µs and operators; `us` and `plain_us` are whole forwards'."""

    contender: str
    forward: str
    peer: str | None
    us: float
    plain_us: float
    added_us: float
    spread_us: float
    added_operators: int
    added_expanded: int
    added_h_sized: int


#: kind of forward → (distance below which steps are skipped, whether its blocks are idle)
KINDS = {
    "skipped": (ALWAYS_SMALL, False),
    "skipped, idle": (ALWAYS_SMALL, True),
    "computed, idle": (NEVER_SMALL, True),
}


@dataclass
class Fused:
    """The times of a fused and an unfused forward, in µs, and their ratio."""

    way: str
    us: float
    plain_us: float
    share: float


@contextlib.contextmanager
def nothing_computed() -> Iterator[None]:
    """While open, the ops of a fused Qwen-Image block on the CPU allocate their outputs, and compute nothing."""

    def like_first(x: torch.Tensor, *args: Any, out: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        return x.new_empty(x.shape) if out is None else out

    def two(residual: torch.Tensor, *args: Any, norm: str | None = "layer", **kwargs: Any) -> Any:
        return residual.new_empty(residual.shape), None if norm is None else residual.new_empty(residual.shape)

    def none(*args: Any, **kwargs: Any) -> None:
        pass

    with mock.patch.dict(
        vars(DIRECT["cpu"]), ada_layer_norm=like_first, gelu=like_first, gate_residual_norm=two, qk_norm_rope=none
    ):
        yield


#: way → the context in which it is measured
WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "as it is": contextlib.nullcontext,
    "nothing computed": nothing_computed,
}


@torch.no_grad()
def fused(weights: Weights, way: str, rounds: int) -> Fused:
    """Time the first steps of requests with fused blocks and without, in turns."""
    plain, ours = Run(weights, weights.blocks), Run(weights, weights.blocks)
    with patched(ours.pipe) as handle, WAYS[way]():
        assert not handle.fused.left_alone, handle.fused
        time_in_turns([plain, ours], rounds, FIRST + 4)
    if not rounds:
        return Fused(way, 0.0, 0.0, 0.0)
    us, plain_us = (_tenth(run.seconds) * 1e6 for run in (ours, plain))
    return Fused(way, round(us, 1), round(plain_us, 1), round(us / plain_us, 3))


@torch.no_grad()
def costs(weights: Weights, kind: str, rounds: int, contenders: Sequence[Contender] = CONTENDERS) -> list[Cost]:
    """What each contender adds to a forward of this kind.

    Raises:
        AssertionError: a contender did not skip or compute as it should, or ours differs from its peer.
    """
    distance, idle = KINDS[kind]
    ran = {c.name: c.runs if distance == ALWAYS_SMALL else weights.blocks for c in contenders}
    plain = {blocks: Run(weights, blocks, idle=idle) for blocks in sorted(set(ran.values()))}
    runs = {c.name: Run(weights, weights.blocks, c, distance, idle) for c in contenders}
    counts = _counted(contenders, plain, runs, ran)
    time_in_turns([*plain.values(), *runs.values()], rounds)
    found = []
    for c in contenders:
        mine, base, without = counts[c.name], counts[ran[c.name]], plain[ran[c.name]]
        us, plain_us, added_us, spread_us = _times(runs[c.name], without)
        found.append(
            Cost(
                contender=c.name,
                forward=kind,
                peer=c.peer,
                us=us,
                plain_us=plain_us,
                added_us=added_us,
                spread_us=spread_us,
                added_operators=mine.operators - base.operators,
                added_expanded=mine.expanded - base.expanded,
                added_h_sized=mine.h_sized - base.h_sized,
            )
        )
    return found


def in_processes(count: int, rounds: int, cpu: bool) -> tuple[list[Cost], list[Fused]]:
    """The costs of all kinds, and the fused forwards; each figure is the median over `count` processes."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(_in_this_process, [(rounds, cpu)] * count, chunksize=1)
    costs_found, forwards = zip(*found, strict=True)
    return [_median(same) for same in zip(*costs_found, strict=True)], [
        _median(same) for same in zip(*forwards, strict=True)
    ]


def _in_this_process(rounds: int, cpu: bool) -> tuple[list[Cost], list[Fused]]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the cache-dit library logs its configuration at every request
    weights = Weights(BLOCKS, torch.device("cpu") if cpu else device_here())
    forwards = [fused(weights, way, rounds) for way in WAYS] if weights.device.type == "cpu" else []
    return [cost for kind in KINDS for cost in costs(weights, kind, rounds)], forwards


def _median(same: Sequence[Any]) -> Any:
    figures = {f.name: 1 if f.name.endswith("us") else 3 for f in fields(same[0]) if f.name.endswith(("us", "share"))}
    return replace(
        same[0],
        **{name: round(statistics.median(getattr(one, name) for one in same), n) for name, n in figures.items()},
    )


def _times(run: Run, plain: Run) -> tuple[float, float, float, float]:
    """In µs: a forward, an unpatched one, the added time, and the width of the middle half of the differences."""
    if not run.seconds:
        return 0.0, 0.0, 0.0, 0.0
    low, _, high = statistics.quantiles(a - b for a, b in zip(run.seconds, plain.seconds, strict=True))
    us, plain_us = _tenth(run.seconds), _tenth(plain.seconds)
    us, plain_us, added_us, spread_us = (round(t * 1e6, 1) for t in (us, plain_us, us - plain_us, high - low))
    return us, plain_us, added_us, spread_us


def _tenth(seconds: Sequence[float]) -> float:
    """The tenth percentile."""
    return statistics.quantiles(seconds, n=10, method="inclusive")[0]


def _counted(
    contenders: Sequence[Contender], plain: dict[int, Run], runs: dict[str, Run], ran: dict[str, int]
) -> dict[Any, Counts]:
    """Check that every contender runs the right blocks and matches its peer; return the operators of each."""
    on_cpu = all(r.pipe.transformer.device.type == "cpu" for r in plain.values())
    counts: dict[Any, Counts] = {blocks: count(run, on_cpu)[0] for blocks, run in plain.items()}
    outputs = {}
    for c in contenders:
        counts[c.name], outputs[c.name], blocks = count(runs[c.name], on_cpu)
        assert set(blocks[FIRST:]) == {ran[c.name]}, f"{c.name} ran {blocks} blocks; it should run {ran[c.name]}"
    for c in contenders:
        if c.peer in outputs:
            for ours, theirs in zip(outputs[c.name], outputs[c.peer], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return counts


# Targets and reports


@dataclass(frozen=True)
class Target:
    """A figure and its upper limit."""

    what: str
    figure: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.figure <= self.limit


def _shares(found: Sequence[Cost], figure: str, what: str, limit: float) -> list[Target]:
    """A figure of a skipped forward as a ratio to the library's, for DBCache without and with TaylorSeer."""
    by_name = {c.contender: c for c in found if c.forward == "skipped"}
    targets = []
    for name in ("cache_dit", "cache_dit, TaylorSeer 1"):
        ours = by_name[name]
        share = getattr(ours, figure) / getattr(by_name[ours.peer], figure)
        targets.append(Target(f"{name}, skipped: {what}, of the library's", round(share, 3), limit))
    return targets


def operator_targets(found: Sequence[Cost]) -> list[Target]:
    """The targets that need no clock, and are the same on every machine."""
    (h_sized,) = (c.added_h_sized for c in found if (c.contender, c.forward) == ("tea_cache", "skipped"))
    shares = _shares(found, "added_operators", "added operators", 1 / 4)
    return [*shares, Target("tea_cache, skipped: added operators of H size", h_sized, 3)]


def time_targets(found: Sequence[Cost], forwards: Sequence[Fused]) -> list[Target]:
    """The targets of host time."""
    return [
        *_shares(found, "added_us", "added host time", 1 / 3),
        *(Target(f"fused forward, {one.way}: host time, of the plain one's", one.share, 1.0) for one in forwards),
    ]


def table(found: Sequence[Cost]) -> str:
    """The costs as a text table."""
    head = f"{'':33} {'':19}"
    lines = [
        f"{head} {'forward':>10} {'unpatched':>10} {'added':>9} {'':>9} {'of':>6}   {'added operators':^25}",
        f"{head} {'µs':>10} {'µs':>10} {'µs':>9} {'± µs':>9} {'peer':>6}   {'all':>8} {'expanded':>8} {'H-sized':>8}",
    ]
    by_name = {(c.contender, c.forward): c for c in found}
    for c in found:
        peer = by_name.get((c.peer, c.forward))
        share = f"{c.added_us / peer.added_us:.2f}" if peer and peer.added_us > 0 else ""
        times = f"{c.us:10.1f} {c.plain_us:10.1f} {c.added_us:9.1f} {c.spread_us:9.1f} {share:>6}"
        operators = f"{c.added_operators:8} {c.added_expanded:8} {c.added_h_sized:8}"
        lines.append(f"{c.contender:33} {c.forward:19} {times}   {operators}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="requests of each contender")
    parser.add_argument("--processes", type=int, default=5, help="how often all of it is measured")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--out", type=Path, help="where to write; by default results/overhead-<device>.json")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    options = parser.parse_args(argv)
    device = torch.device("cpu") if options.cpu else device_here()
    found, forwards = in_processes(options.processes, options.rounds, options.cpu)
    targets = operator_targets(found) + (time_targets(found, forwards) if device.type == "cpu" else [])
    print(table(found))
    for one in forwards:
        print(f"fused forward, {one.way}: {one.us:.1f} µs, plain {one.plain_us:.1f} µs, share {one.share:.3f}")
    for target in targets:
        print(f"{'reached' if target.met else 'MISSED '}  {target.what}: {target.figure:g}, at most {target.limit:.3g}")
    report = {
        "command": " ".join(["python -m benchmarks.bench_overhead", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(device),
        "blocks": BLOCKS,
        "rounds": options.rounds,
        "processes": options.processes,
        "costs": [vars(c) for c in found],
        "fused": [vars(one) for one in forwards],
        "targets": [vars(t) | {"met": t.met} for t in targets],
    }
    write(options.out or RESULTS / f"overhead-{slug(device_name(device))}.json", report)
    return int(options.check and not all(t.met for t in targets))


if __name__ == "__main__":
    sys.exit(main())
