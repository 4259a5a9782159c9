"""A transformer block, and a whole forward: as diffusers runs it, compiled, fused, and both.

    python -m benchmarks.bench_block [--models qwen-image,…] [--layers N] [--small] [--check]
    python -m benchmarks.bench_block --count

Measures each model at its real size with random weights in bf16 (`full_size.py`), at several image sizes. The
providers:

- *eager*: diffusers' own forward.
- *compiled*: its `compile_repeated_blocks(fullgraph=True)`.
- *fused*: `omni_kernels.patch(pipe)`.
- *fused, compiled*: `omni_kernels.patch(pipe, compile="regional")`.
- *fused, reduce-overhead*: `omni_kernels.patch(pipe, compile={"mode": "reduce-overhead"})`, torch's CUDA graphs.
  Only for the forward, and only on a GPU.
- *fused, int8* and *fused, fp8*: `omni_kernels.patch(pipe, quantize=…)`; fp8 only on devices that have it.

A *block* is the last block of each class that has a fused forward, called with its arguments from a forward. Its
result is first compared with the eager block's result in fp32. A provider rounds in another order, so its error may be
1.5 times the eager error, or 10% if its layers are quantised. A larger one raises an error, and nothing is timed. A
block's time is measured on the device, from a replayed graph.

A *forward* is compared with the eager forward in the same dtype, because fp32 does not fit into memory. The rounding
errors of its blocks add up, so this only finds errors that are larger than rounding. Its time is the whole time that a
user waits, including the host's launches.

Both have two counts: operators that torch dispatches (each of our ops is one, views are not counted, compiled code is
not seen) and, on a GPU, launches by the host (a recorded graph is one).

`--check` exits with 1 if a forward of Qwen-Image at 1024² misses a target: fused, and fused and compiled, must be at
least 1.15 times as fast as eager, and fused and compiled no slower than compiled. (Fused alone against compiled is
only shown: fusing saves the compilation there.) `--count` needs no GPU: it counts the operators of a full-size forward
on the meta device, where nothing is computed. Attention counts as one; each operator is one launch or more. On a GPU,
results are written to results/blocks-<device>.json. `--small` makes everything tiny, to try it anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import omni_kernels
from benchmarks.full_size import MODELS, SMALL_SIDE, Model, build, inputs
from benchmarks.measure import device_here
from benchmarks.results import RESULTS
from omni_kernels.device import synchronize
from omni_kernels.patching.quantised import dtype_on
from omni_kernels.patching.rules import RULES
from omni_kernels.validation.record import device_name, machine, slug, write
from omni_kernels.validation.timing import Call, median_seconds

#: The provider whose blocks are CUDA graphs.
RECORDED = "fused, reduce-overhead"
#: provider → arguments of `omni_kernels.patched`; not used for eager, and for what diffusers compiles.
PROVIDERS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {},
    "fused": {"fuse": True},
    "fused, compiled": {"fuse": True, "compile": "regional"},
    RECORDED: {"fuse": True, "compile": {"mode": "reduce-overhead"}},
    "fused, int8": {"fuse": True, "quantize": {"dtype": "int8", "min_width": 0}},
    "fused, fp8": {"fuse": True, "quantize": {"dtype": "fp8", "min_width": 0}},
}
#: Prefixes of the functions by which the host launches a kernel, a copy or a graph.
LAUNCHES = (
    *("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"),
    *("hipLaunchKernel", "hipExtLaunch", "hipModuleLaunch", "hipExtModuleLaunch", "hipGraphLaunch"),
    *("hipMemcpyAsync", "hipMemsetAsync"),
)
ROUNDS, WARMUP = 10, 3
#: The largest error against fp32, as a multiple of eager's. Errors up to two roundings of bf16 are always allowed.
FARTHER, ROUNDING = 1.5, 2**-7
#: The largest ‖forward − eager's‖ / ‖eager's‖. 60 blocks with random errors of half a percent each give 4%.
FORWARD_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-3}
#: The same for quantised layers: of a block against fp32, and of a forward against eager.
BLOCK_IN_8_BITS, FORWARD_IN_8_BITS = 0.1, 0.3
FASTER_THAN_EAGER = 1.15


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: a block's class, or "forward".
        us: time of one call; None if it was not timed.
        operators: how many are dispatched, without views; None for compiled code.
        launches: how many the host makes on a GPU; None elsewhere.
        error: ‖result − fp32‖ / ‖fp32‖ for a block; for a forward, the same against eager.
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
    """The providers that run on this device."""
    return [name for name in PROVIDERS if _runs(name, device)]


def _runs(provider: str, device: torch.device) -> bool:
    quantized = PROVIDERS[provider].get("quantize")
    try:
        return (quantized is None or bool(dtype_on(quantized["dtype"], device))) and (
            device.type == "cuda" or provider != RECORDED
        )
    except ValueError:  # the device has no such dtype
        return False


@contextlib.contextmanager
def provided(transformer: Any, provider: str, compiler: str) -> Iterator[None]:
    """Set the transformer up for a provider, and restore it at the end."""
    how = dict(PROVIDERS[provider])
    if provider == "eager":
        yield
        return
    torch._dynamo.reset()
    if provider == "compiled":
        transformer.compile_repeated_blocks(fullgraph=True, backend=compiler)
        try:
            yield
        finally:
            for module in transformer.modules():
                module._compiled_call_impl = None
        return
    if "compile" in how:
        more = how["compile"] if provider == RECORDED else {}
        how["compile"] = {"backend": compiler} | more
    with omni_kernels.patched(SimpleNamespace(transformer=transformer), **how) as handle:
        left = handle.fused.left_alone
        assert not left, f"{provider}: not all blocks are fused: {left}"
        yield


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not view and "empty" not in func.__name__ and "_unsafe_view" not in func.__name__
        return func(*args, **kwargs or {})


def operators_of(call: Call) -> int:
    """How many operators a call dispatches, without views and empty tensors."""
    with _Operators() as mode:
        call()
    return mode.count


class _AttentionIsOne(TorchFunctionMode):
    """Counts calls of torch's attention, and runs none: on the meta device, each would be many operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        self.count += 1
        return torch.empty_like(args[0] if args else kwargs["query"])


@dataclass(frozen=True)
class Count:
    """Operators of one forward at full size, in diffusers' version and fused."""

    model: str
    size: str
    eager: int
    fused: int


@torch.no_grad()
def counted(name: str, model: Model, layers: int | None = None) -> Count:
    """Count the operators of a model's forward at its largest size, on the meta device.

    A model that reads its inputs runs on the CPU, with few channels and pixels, which makes no other operators.
    """
    size, side = max(model.sides.items(), key=lambda one: one[1])
    if model.reads:
        side, few = SMALL_SIDE, {name: value for name, value in model.small.items() if name not in model.layers}
        few_channels = dataclasses.replace(model, small=few)
        transformer = build(few_channels, torch.device("cpu"), torch.bfloat16, small=True, layers=layers)
    else:
        transformer = build(model, torch.device("meta"), torch.bfloat16, layers=layers)
    arguments = inputs(model, transformer, side, torch.bfloat16)

    def operators() -> int:
        with _AttentionIsOne() as attention:
            return operators_of(lambda: transformer(**arguments)) + attention.count

    transformer(**arguments)  # the first forward stores the rotary tables
    eager = operators()
    with provided(transformer, "fused", ""):
        return Count(name, size, eager, operators())


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
    """The median time of a call until the device has finished, including the host's time."""
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
    """The last block of each class that can be fused, by class name: (block, args, kwargs) of its call.

    The last one, because it does not compute the next block's first norm.
    """
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
    if isinstance(output, torch.Tensor):
        return output.float().flatten()
    return torch.cat([_flat(one) for one in output])


def in_fp32(block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The block's output in fp32, flattened; its parameters get their dtypes back."""
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
    """Measure all providers of one model at one size.

    Raises:
        AssertionError: a result is wrong, or blocks that should be fused are not.
    """
    dtype = next(transformer.parameters()).dtype
    arguments = inputs(model, transformer, side, dtype)
    blocks = calls_of_blocks(transformer, arguments)
    exact = {kind: in_fp32(*one) for kind, one in blocks.items()}
    errors: dict[str, float] = {}
    whole: torch.Tensor | None = None
    rows = []
    for provider in providers_on(device):
        recorded = provider == RECORDED
        hidden = recorded or "compiled" in provider
        quantized = "quantize" in PROVIDERS[provider]
        with provided(transformer, provider, compiler):
            parts: dict[str, tuple[Call, Callable[[Call], float]]] = {}
            for kind, (block, args, kwargs) in () if recorded else blocks.items():

                def call(block: Any = block, args: Any = args, kwargs: Any = kwargs) -> Any:
                    return block(*args, **kwargs)

                error = off(call(), exact[kind])
                eager = errors.setdefault(kind, error)
                limit = max(FARTHER * eager, ROUNDING if dtype is not torch.float32 else 1e-5)
                limit = BLOCK_IN_8_BITS if quantized else limit
                assert error <= limit, f"{name} {kind}, {provider}: off by {error:.2g}; eager by {eager:.2g}"
                parts[kind] = call, lambda one: median_seconds([one] * 4, device, ROUNDS)
            made = _flat(transformer(**arguments))
            whole = made if whole is None else whole
            exact["forward"] = whole
            error = off(made, whole)
            limit = FORWARD_IN_8_BITS if quantized else FORWARD_ROUNDING[dtype]
            assert error <= limit, f"{name} forward, {provider}: off by {error:.2g} from eager"
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
                        error=float(f"{off(one(), exact[part]):.3g}"),
                    )
                )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a text table."""
    counts = f"{'operators':>9} {'launches':>8}"
    lines = [f"{'model':18} {'size':15} {'part':27} {'provider':22} {'µs':>10} {'of eager':>9} {counts}"]
    eager = {(r.model, r.size, r.part): r.us for r in rows if r.provider == "eager"}
    for r in rows:
        share = f"{eager[r.model, r.size, r.part] / r.us:.2f}×"
        counts = f"{'' if r.operators is None else r.operators:>9} {'' if r.launches is None else r.launches:>8}"
        lines.append(f"{r.model:18} {r.size:15} {r.part:27} {r.provider:22} {r.us:10.1f} {share:>9} {counts}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Target:
    """How many times as fast one provider's forward is as another's, and the least that it must be (None: any)."""

    what: str
    times: float
    least: float | None

    @property
    def met(self) -> bool:
        """Whether the least is reached, or there is none."""
        return self.least is None or self.times >= self.least

    def __str__(self) -> str:
        verdict = "       " if self.least is None else "reached" if self.met else "MISSED "
        at_least = "" if self.least is None else f", at least {self.least:g}"
        return f"{verdict}  {self.what}: {self.times:.2f} times as fast{at_least}"


#: (our provider, the one it is compared with, how many times as fast ours must be at least)
HELD_AGAINST: tuple[tuple[str, str, float | None], ...] = (
    ("fused", "eager", FASTER_THAN_EAGER),
    ("fused, compiled", "eager", FASTER_THAN_EAGER),
    ("fused, compiled", "compiled", 1.0),
    ("fused", "compiled", None),
)


def targets(rows: Sequence[Row]) -> list[Target]:
    """The targets of Qwen-Image's forward at 1024²; none if that was not measured."""
    us = {r.provider: r.us for r in rows if (r.model, r.size, r.part) == ("qwen-image", "1024²", "forward")}
    return [
        Target(f"{ours}, against {theirs}", us[theirs] / us[ours], least)
        for ours, theirs, least in (HELD_AGAINST if us else ())
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_block", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAME,NAME", help="default: %(default)s")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks of each kind at most (default: the model's)")
    parser.add_argument("--small", action="store_true", help="a few channels and 64² pixels, fp32 on a CPU")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write; by default results/blocks-<device>.json, on a GPU")
    parser.add_argument("--count", action="store_true", help="operators of a forward at full size; nothing is computed")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(argv)
    names = options.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; there are {', '.join(MODELS)}")
    if options.count:
        print(f"{'model':22} {'size':17} {'eager':>6} {'fused':>6}   operators of a forward")
        for name in names:
            one = counted(name, MODELS[name], options.layers)
            print(f"{one.model:22} {one.size:17} {one.eager:6} {one.fused:6}")
        return 0
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
    print(*goals, sep="\n", end="\n" if goals else "")
    kept = device.type != "cpu" and not options.small
    path = options.out or (RESULTS / f"blocks-{slug(device_name(device))}.json" if kept else None)
    if path is not None:
        report = {
            "command": " ".join(["python -m benchmarks.bench_block", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine(device),
            "small": options.small,
            "layers": options.layers,
            "dtype": str(dtype).removeprefix("torch."),
            "rows": [vars(row) for row in rows],
            "targets": [
                {"what": one.what, "times_as_fast": round(one.times, 3), "least": one.least, "met": one.met}
                for one in goals
            ],
        }
        write(path, report)
        print(path)
    return int(options.check and not (goals and all(one.met for one in goals)))


if __name__ == "__main__":
    sys.exit(main())
