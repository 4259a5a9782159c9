"""A transformer block, and a whole forward: as diffusers runs it, compiled, fused, and both.

    python -m benchmarks.bench_block [--models qwen-image,…] [--layers N] [--small] [--check]

Each model at its real size with random weights in bf16 (`full_size.py`), at several image sizes, under each provider:

- *eager*: diffusers' own forward.
- *compiled*: its `compile_repeated_blocks(fullgraph=True)`.
- *fused*: `omni_kernels.patch(pipe)`.
- *fused, compiled*: `omni_kernels.patch(pipe, compile="regional")`.
- *fused, graphs*: `omni_kernels.patch(pipe, graphs=True)`, the forward alone, on a GPU.

A *block* is the last of each class that has a fused forward, with the arguments of its call in a forward. First its
result is compared with the eager block's in fp32: a provider may be off by half more than eager is, rounding in another
order; farther off is an error, and nothing is timed. A block's time is the device's, from a replayed graph. A
*forward*'s is from one end to the other, the host's launches included, as it is in use. Both are counted in operators
that torch dispatches (one of ours is one, views are none; of what is compiled or recorded none are seen) and, on a GPU,
in launches by the host (a recorded graph is one).

`--check` exits with 1 where a fused forward of Qwen-Image at 1024² is less than 1.15 times as fast as eager, or slower
than compiled. On a GPU results go to results/blocks-<device>.json. `--small` makes everything tiny, to try it anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import omni_kernels
from benchmarks.full_size import MODELS, SMALL_SIDE, Model, build, inputs
from benchmarks.measure import device_here
from benchmarks.results import RESULTS
from omni_kernels.device import synchronize
from omni_kernels.patching.rules import RULES
from omni_kernels.validation.record import device_name, machine, slug, write
from omni_kernels.validation.timing import Call, median_seconds

#: provider → how a pipeline is patched for it; eager is not.
PROVIDERS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"fuse": False, "compile": "regional"},
    "fused": {"fuse": True},
    "fused, compiled": {"fuse": True, "compile": "regional"},
    "fused, graphs": {"fuse": True, "graphs": True},
}
#: What the host calls to launch a kernel, a copy or a graph, by how the names begin.
LAUNCHES = (
    *("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"),
    *("hipLaunchKernel", "hipExtLaunch", "hipModuleLaunch", "hipExtModuleLaunch", "hipGraphLaunch"),
    *("hipMemcpyAsync", "hipMemsetAsync"),
)
ROUNDS, WARMUP = 10, 3
#: How much farther from fp32 than eager a provider may be, and from where on that counts: two roundings of bf16.
FARTHER, ROUNDING = 1.5, 2**-7
FASTER_THAN_EAGER = 1.15


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: a block's class, or "forward".
        us: of one call; None where it was not timed.
        operators: dispatched, views apart; None of what is compiled or recorded.
        launches: by the host on a GPU; None elsewhere.
        error: ‖result − fp32‖ / ‖fp32‖ of a block.
    """

    model: str
    size: str
    part: str
    provider: str
    us: float
    operators: int | None
    launches: int | None
    error: float | None = None


def providers_on(device: torch.device) -> list[str]:
    """The providers that there are on a device."""
    return [name for name, how in PROVIDERS.items() if device.type == "cuda" or "graphs" not in how]


@contextlib.contextmanager
def provided(transformer: Any, provider: str, compiler: str) -> Iterator[None]:
    """The transformer under a provider."""
    how = dict(PROVIDERS[provider])
    if not how:
        yield
        return
    if "compile" in how:
        how["compile"] = {"backend": compiler}
    torch._dynamo.reset()
    with omni_kernels.patched(SimpleNamespace(transformer=transformer), **how) as handle:
        left = handle.fused.left_alone
        assert not left, f"{provider}: not all blocks are fused: {left}"
        yield
        if handle.graphs is not None:
            assert not handle.graphs.reasons, f"{provider}: {handle.graphs}"


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not view and "empty" not in func.__name__
        return func(*args, **kwargs or {})


def operators_of(call: Call) -> int:
    """How many operators a call dispatches, views and empty tensors apart."""
    with _Operators() as mode:
        call()
    return mode.count


def launches_of(call: Call, device: torch.device) -> int | None:
    """How many kernels, copies and graphs a call launches on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(device)
    return sum(event.name.startswith(LAUNCHES) for event in profile.events())


def seconds_of(call: Call, device: torch.device) -> float:
    """The median of a call from one end to the other, host and device."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def calls_of_blocks(transformer: Any, arguments: Mapping[str, Any]) -> dict[str, tuple[Any, tuple[Any, ...], Any]]:
    """The last block of each class that can be fused, which begins no other: (block, args, kwargs) of its call."""
    found: dict[str, tuple[Any, tuple[Any, ...], Any]] = {}

    def note(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[type(block).__name__] = block, args, kwargs

    blocks = [module for module in transformer.modules() if type(module).__name__ in RULES]
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        transformer(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, tuple | list):
        return type(value)(map(_widened, value))
    return {name: _widened(one) for name, one in value.items()} if isinstance(value, dict) else value


def _flat(output: Any) -> torch.Tensor:
    tensors = output if isinstance(output, tuple) else (output,)
    return torch.cat([t.float().flatten() for t in tensors])


def in_fp32(block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What the block returns in fp32, flat; it is put back."""
    types = {name: parameter.dtype for name, parameter in block.named_parameters()}
    try:
        return _flat(block.float()(*_widened(args), **_widened(dict(kwargs))))
    finally:
        for name, parameter in block.named_parameters():
            parameter.data = parameter.data.to(types[name])


def off(output: Any, expected: torch.Tensor) -> float:
    """‖output − expected‖ / ‖expected‖."""
    return ((_flat(output) - expected).norm() / expected.norm()).item()


@torch.no_grad()
def measure(
    name: str, model: Model, size: str, side: int, transformer: Any, device: torch.device, compiler: str
) -> list[Row]:
    """All providers of one model at one size.

    Raises:
        AssertionError: a result is wrong, or blocks that should be fused are not.
    """
    dtype = next(transformer.parameters()).dtype
    arguments = inputs(model, transformer, side, dtype)
    blocks = calls_of_blocks(transformer, arguments)
    exact = {kind: in_fp32(*one) for kind, one in blocks.items()}
    errors: dict[str, float] = {}
    rows = []
    for provider in providers_on(device):
        hidden, recorded = not {"compile", "graphs"}.isdisjoint(PROVIDERS[provider]), "graphs" in PROVIDERS[provider]
        with provided(transformer, provider, compiler):
            parts: dict[str, tuple[Call, Callable[[Call], float]]] = {}
            for kind, (block, args, kwargs) in () if recorded else blocks.items():

                def call(block: Any = block, args: Any = args, kwargs: Any = kwargs) -> Any:
                    return block(*args, **kwargs)

                error = off(call(), exact[kind])
                eager = errors.setdefault(kind, error)
                limit = max(FARTHER * eager, ROUNDING if dtype is not torch.float32 else 1e-5)
                assert error <= limit, f"{name} {kind}, {provider}: off by {error:.2g}; eager by {eager:.2g}"
                parts[kind] = call, lambda one: median_seconds([one] * 4, device, ROUNDS)
            parts["forward"] = lambda: transformer(**arguments), lambda one: seconds_of(one, device)
            for part, (one, clock) in parts.items():
                rows.append(
                    Row(
                        model=name,
                        size=size,
                        part=part,
                        provider=provider,
                        us=round(clock(one) * 1e6, 1),
                        operators=None if hidden else operators_of(one),
                        launches=launches_of(one, device),
                        error=None if part == "forward" else float(f"{off(one(), exact[part]):.3g}"),
                    )
                )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows, for reading."""
    counts = f"{'operators':>9} {'launches':>8}"
    lines = [f"{'model':18} {'size':15} {'part':27} {'provider':16} {'µs':>10} {'of eager':>9} {counts}"]
    eager = {(r.model, r.size, r.part): r.us for r in rows if r.provider == "eager"}
    for r in rows:
        share = f"{eager[r.model, r.size, r.part] / r.us:.2f}×"
        counts = f"{'' if r.operators is None else r.operators:>9} {'' if r.launches is None else r.launches:>8}"
        lines.append(f"{r.model:18} {r.size:15} {r.part:27} {r.provider:16} {r.us:10.1f} {share:>9} {counts}")
    return "\n".join(lines)


def targets(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(what, how many times as fast, at least) of Qwen-Image's forward at 1024²; none where that was not measured."""
    us = {r.provider: r.us for r in rows if (r.model, r.size, r.part) == ("qwen-image", "1024²", "forward")}
    if not us:
        return []
    return [
        ("fused, against eager", us["eager"] / us["fused"], FASTER_THAN_EAGER),
        ("fused, compiled, against eager", us["eager"] / us["fused, compiled"], FASTER_THAN_EAGER),
        ("the better of both, against compiled", us["compiled"] / min(us["fused"], us["fused, compiled"]), 1.0),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_block", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAME,NAME", help="default: %(default)s")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks of each kind at most (default: the model's)")
    parser.add_argument("--small", action="store_true", help="a few channels and 64² pixels, fp32 on a CPU")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write; by default results/blocks-<device>.json, on a GPU")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    options = parser.parse_args(argv)
    names = options.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; there are {', '.join(MODELS)}")
    device = device_here()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows: list[Row] = []
    for name in names:
        model = MODELS[name]
        transformer = build(model, device, dtype, options.small, options.layers)
        for size, side in ({"64²": SMALL_SIDE} if options.small else model.sides).items():
            rows += measure(name, model, size, side, transformer, device, options.compiler)
        del transformer
    print(table(rows))
    goals = targets(rows)
    for what, times, least in goals:
        print(f"{'reached' if times >= least else 'MISSED '}  {what}: {times:.2f} times as fast, at least {least:g}")
    path = options.out or (RESULTS / f"blocks-{slug(device_name(device))}.json" if device.type != "cpu" else None)
    if path is not None:
        report = {
            "command": " ".join(["python -m benchmarks.bench_block", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine(device),
            "small": options.small,
            "layers": options.layers,
            "dtype": str(dtype).removeprefix("torch."),
            "rows": [vars(row) for row in rows],
            "targets": [
                {"what": what, "times_as_fast": round(t, 3), "least": least, "met": t >= least}
                for what, t, least in goals
            ],
        }
        write(path, report)
        print(path)
    return int(options.check and not (goals and all(times >= least for _, times, least in goals)))


if __name__ == "__main__":
    sys.exit(main())
