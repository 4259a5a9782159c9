"""`python -m omni_kernels.validation.ascend`: compile and check the kernels with Ascend's compilers, without an NPU.

    python -m omni_kernels.validation.ascend [--tools DIR] [--out FILE] [NAME …]

1. pip downloads the compilers once. They are unpacked (`ascend_ir`), not installed.
2. Every launch that is compiled for GPUs (`launches`), and the widest ones that an op's tile must hold (`widest`), are
   lowered for every target. The result says whether the launch fits in the unified buffer, how much it would need, or
   the compiler's error.
3. The ops are checked as on a device (`checks`). Their launchers run unchanged on CPU tensors. Every kernel that they
   launch is the vendor's linalg IR, built for this CPU and called once for every program.

The CPU simulates an NPU, so the launchers choose the same as there. This shows that the compilers accept every kernel,
and that their linalg IR computes correct numbers, one program after another. It does not show an NPU's rounding,
interference between concurrent programs, or speed. The last stage, a binary, is not built.

Exit codes: 0 everything is lowered and correct; 1 something is not; 2 wrong usage; 3 the compilers are not available.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import functools
import hashlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from omni_kernels import ops as ops_package
from omni_kernels.ascend import limits
from omni_kernels.device import Device, pretend
from omni_kernels.ops import OPS
from omni_kernels.validation import aot, checks, launches, record
from omni_kernels.validation.ascend_ir import (
    TARGETS,
    UNIFIED_BUFFER,
    WHEELS,
    Lowered,
    Program,
    ToolError,
    Tools,
    cache_directory,
    discrete_accesses,
    first_error,
    missing_cpu_tools,
)

SUMMARY = "lowered by the vendor's compilers and computed on a CPU; not run on an NPU"
LOWERED_ONLY = "lowered by the vendor's compilers; neither computed on a CPU nor run on an NPU"
#: Levels of support of an op, the highest first.
COMPUTED = "computed on a CPU from the vendor's IR"
LOWERED = "compiled (lowered)"

PASSED, FAILED, _, NO_TOOLS = range(4)
COMMAND = "python -m omni_kernels.validation.ascend"
SEED = 0
#: The models' tokens are divided by this.
DIVISOR = 256


@dataclass(frozen=True)
class Launch:
    """One launched kernel: its Triton IR, its arguments without the constants, its grid."""

    kernel: str
    ttir: str
    arguments: Sequence[Any]
    grid: Sequence[int]


@functools.cache
def _backend() -> Any:
    """A Triton backend that stops at Triton IR, which is the same for all backends. It is derived from NVIDIA's."""
    import triton
    from triton.backends import Backend
    from triton.backends.nvidia.compiler import CUDABackend

    class ToTritonIR(CUDABackend):
        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = "ttir"

        @staticmethod
        def supports_target(target: Any) -> bool:
            return bool(target.backend == "npu")

        @staticmethod
        def parse_attr(description: str) -> list[Any]:
            return []  # Ascend's compilers do not use divisibility by 16

        def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
            def ttir(module: Any, metadata: dict[str, Any]) -> str:
                metadata["name"] = module.get_entry_func_name()
                return str(self.make_ttir(module, metadata, options, self.target.arch))

            stages["ttir"] = ttir

        def pack_metadata(self, metadata: Any) -> None:
            return None

        def hash(self) -> str:
            return f"Triton IR {triton.__version__}"

    return Backend(compiler=ToTritonIR, driver=None)


def _flat(value: Any, kind: Any) -> list[Any]:
    """The run-time arguments of one kernel parameter. Tuples are flattened, constants are omitted."""
    if isinstance(kind, tuple):
        return [one for v, k in zip(value, kind, strict=True) for one in _flat(v, k)]
    return [] if kind == "constexpr" else [value]


@contextlib.contextmanager
def standing_in(launched: Callable[[Launch], object]) -> Iterator[None]:
    """Context manager in which CPU tensors count as on an NPU, and `launched` is called with every launched kernel.

    Raises:
        ToolError: the process runs Triton's interpreter, which makes no IR.
    """
    import triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ToolError("TRITON_INTERPRET is set: kernels would be interpreted")
    run = triton.JITFunction.run

    def stand_in(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in self.arg_names}).arguments
        arguments = [one for name, kind in compiled.src.signature.items() for one in _flat(bound[name], kind)]
        launched(Launch(compiled.metadata.name, compiled.asm["ttir"].decode(), arguments, grid))
        return compiled

    with (
        mock.patch.dict(backends, {"ascend": _backend()}),
        aot.driven_by(GPUTarget("npu", 80, 32), -1),
        mock.patch.object(triton.JITFunction, "run", stand_in),
        pretend("cpu", Device("ascend", TARGETS[0], TARGETS[0])),
    ):
        yield


def widest() -> dict[str, Callable[[], object]]:
    """Name → a launch of an op with the largest tile that its launcher uses, and with all inputs that it can have.

    In fp32, which has the largest tiles, and in bf16, whose values are held in addition to fp32 ones. Rows are one
    element shorter than a tile, so that they also need a mask.
    """
    found: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):

        def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype)

        def add(name: str, op: str, *args: Any, **kwargs: Any) -> None:
            word = str(args[0].dtype).removeprefix("torch.")
            found[f"{op} widest {name} {word}".replace("  ", " ")] = partial(OPS[op].launcher, *args, **kwargs)

        tiles = limits.TILES
        for op, count in (("relative_l1", 2), ("residual_relative_l1", 3), ("gelu", 1), ("swiglu", 2)):
            add("", op, *(new(1, 3 * tiles[op] + 1) for _ in range(count)))
        n = 3 * tiles["linear_forecast"] + 1
        for count in (1, 3, 16):
            add(str(count), "linear_forecast", new(1, n), [new(1, n) for _ in range(count)], [0.5] * count)
        add("tensor", "linear_forecast", new(1, n), [new(1, n) for _ in range(16)], torch.empty(16))
        for D in (128, tiles["rms_norm"] - 1):
            add(str(D), "rms_norm", new(3, 4096, D), new(D))
        D = tiles["modulated_relative_l1"] - 1
        h = new(2, 9, D)
        add("layer", "modulated_relative_l1", h, h, h, h, weight=new(D))
        add("rms", "modulated_relative_l1", h, h, None, h, norm="rms", weight=new(D))
        D = tiles["ada_layer_norm"] - 1
        h, two, index = new(2, 9, D), new(4, D), torch.empty(2, 9, dtype=torch.int64)
        add("layer", "ada_layer_norm", h, h, h, weight=new(D), bias=new(D))
        add("index", "ada_layer_norm", h, two, two, index, weight=new(D), bias=new(D))
        D = tiles["gate_residual_norm"] - 1
        h, two = new(2, 9, D), new(4, D)
        own: dict[str, Any] = {"gate_tanh": True, "x_weight": new(D), "weight": new(D), "bias": new(D)}
        add("layer", "gate_residual_norm", h, h, h, h, h, **own)
        add("index", "gate_residual_norm", h, h, two, two, two, index, **own)
        for across in (False, True):
            for layout in ("interleaved", "half"):
                H = tiles["qk_norm_rope"] // 128 - 1
                thirds, places = new(2, 5, 3, H, 128).unbind(2), [new(2, 5, H, 128) for _ in range(3)]
                weight = new(H * 128 if across else 128)
                own = {"q_weight": weight, "k_weight": weight, "layout": layout, "across_heads": across}
                name = f"{layout} across" if across else layout
                add(name, "qk_norm_rope", *thirds, *places, **own, freqs=torch.empty(5, 64, 2))
                tables = {"cos": torch.empty(5, 128), "sin": torch.empty(5, 128)}
                add(f"{name}, tables", "qk_norm_rope", *thirds, *places, **own, **tables)
    return found


def lower_all(tools: Tools, table: dict[str, Callable[[], object]]) -> Iterator[dict[str, Any]]:
    """Lower every kernel of every launch. Yields one row per kernel, and one for a launch without kernels.

    `ub_bits` is the size of the buffers (what they need, if they do not fit), the largest of all targets. `by_row`
    counts the accesses that the compiler makes row by row, without masks.
    """
    for name, launch in table.items():
        found: list[Launch] = []
        row: dict[str, Any] = {"launch": name, "op": name.split()[0]}
        try:
            with standing_in(found.append):
                launch()
        except Exception as error:  # anything that Triton raises is reported
            yield row | {"status": "error", "problem": first_error(f"{type(error).__name__}: {error}")}
            continue
        if not found:
            yield row | {"status": "plain torch", "problem": "rows longer than what fits, or too large a grid"}
        for kernel in found:
            yield row | {"kernel": kernel.kernel, "programs": kernel.grid[0]} | _lowered(tools, kernel.ttir)


def _lowered(tools: Tools, ttir: str) -> dict[str, Any]:
    try:
        linalg = tools.linalg(ttir)
    except ToolError as error:
        return {"status": "error", "problem": first_error(str(error))}
    with ThreadPoolExecutor(len(TARGETS)) as pool:
        results: list[Lowered] = [*pool.map(lambda target: tools.lower(linalg, target), TARGETS)]
    bits = max((r.used or r.required or 0 for r in results), default=0)
    told: dict[str, Any] = {"ub_bits": bits, "by_row": discrete_accesses(linalg)}
    problems = [
        f"{target}: {result.error or f'needs {result.required} bits of {UNIFIED_BUFFER}'}"
        for target, result in zip(TARGETS, results, strict=True)
        if not result.fits
    ]
    if problems:
        overflows = all(result.error is None for result in results)
        return {"status": "overflow" if overflows else "error", **told, "problem": "; ".join(problems)}
    return {"status": "fits", **told}


def compute_all(tools: Tools, wanted: Sequence[checks.Check], directory: Path) -> Iterator[dict[str, Any]]:
    """Run every check. Yields one row each. Programs are built in `directory`, each once.

    `worst` is the largest error divided by the allowed error.
    """
    programs: dict[str, Program] = {}
    for check in wanted:
        kernels: Counter[str] = Counter()
        seen: list[float] = []

        def compute(launch: Launch, kernels: Counter[str] = kernels) -> None:
            kernels[launch.kernel] += 1
            if launch.ttir not in programs:
                programs[launch.ttir] = Program(tools.linalg(launch.ttir), directory)
            programs[launch.ttir].run(launch.arguments, launch.grid)

        try:
            with standing_in(compute):
                wrong = checks.run(check, lambda op: OPS[op].launcher, torch.device("cpu"), SEED, seen.append)
            problem = "; ".join(map(str, wrong))
        except Exception as error:  # a kernel that cannot be lowered or built is a failed check, too
            problem = first_error(f"{type(error).__name__}: {error}")
        row: dict[str, Any] = {"check": check.id, "op": check.use.op, "dtype": check.dtype}
        status = "failed" if problem else "passed" if kernels else "plain torch"
        row |= {"status": status, "kernels": " ".join(sorted(kernels))}
        row |= {"worst": round(max(seen), 3) if seen else None}
        yield row | ({"problem": problem} if problem else {})


def support(lowered: Sequence[dict[str, Any]], computed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per tested op: its level of support, or the first problem, with counts."""
    rows = []
    for op in OPS:
        own = [r for r in lowered if r["op"] == op]
        kernels = [r for r in own if r["status"] != "plain torch"]
        checked = [r for r in computed if r["op"] == op and r["status"] != "plain torch"]
        if not kernels and not checked:
            continue
        problems = [f"{r['launch']}: {r['problem']}" for r in kernels if r["status"] != "fits"]
        problems += [f"{r['check']}: {r['problem']}" for r in checked if r["status"] == "failed"]
        says = f"no: {problems[0]}" if problems else COMPUTED if checked else LOWERED
        rows.append(
            {
                "op": op,
                "support": says,
                "launches": len(kernels),
                "checks": len(checked),
                "dtypes": " ".join(sorted({r["dtype"] for r in checked if r["status"] == "passed"})),
                "worst": max((r["worst"] for r in checked if r["worst"] is not None), default=None),
                "tile": limits.TILES.get(op),
            }
        )
    return rows


def kernels_digest() -> str:
    """A digest of all kernels' code, without comments and docstrings. It shows to which kernels results belong."""
    digest = hashlib.sha256()
    for path in sorted(Path(ops_package.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                node.body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                digest.update(ast.dump(node).encode())
    return digest.hexdigest()[:16]


def _chosen(names: Sequence[str]) -> tuple[dict[str, Callable[[], object]], list[checks.Check]]:
    """The launches and checks selected by names of launches or ops. Without names, all.

    Raises:
        ValueError: a name is neither an op nor a launch.
    """
    table: dict[str, Callable[[], object]] = {**launches.table(), **widest()}
    unknown = [name for name in names if name not in OPS and name not in table]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is neither an op ({', '.join(OPS)}) nor the name of a launch")
    if names:
        table = {n: launch for n, launch in table.items() if n in names or set(n.split()) & set(names)}
    ops = [op for op in OPS if not names or op in names]
    return table, checks.plan(ops, divisor=DIVISOR, quick=True)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, or raises SystemExit(2) for wrong usage."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0].partition(": ")[2])
    parser.add_argument("names", nargs="*", metavar="NAME", help="an op, or a launch; default: all")
    parser.add_argument(
        "--tools", type=Path, default=cache_directory(), metavar="DIR", help="where the compilers are kept"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the results go, as JSON (default: nowhere)")
    options = parser.parse_args(argv)
    try:
        table, wanted = _chosen(options.names)
    except ValueError as error:
        parser.error(str(error))
    try:
        tools = Tools.fetched(options.tools)
    except ToolError as error:
        print(f"the vendor's compilers are not available: {error}", file=sys.stderr)
        return NO_TOOLS
    lowered: list[dict[str, Any]] = []
    for row in lower_all(tools, table):
        lowered.append(row)
        told = f"{row['ub_bits'] / UNIFIED_BUFFER:.0%} of the unified buffer" if "ub_bits" in row else ""
        words = [row["launch"], row.get("kernel", "no kernel"), row["status"], told, row.get("problem", "")]
        print(": ".join(word for word in words if word), flush=True)
    missing = missing_cpu_tools()
    computed: list[dict[str, Any]] = []
    if missing:
        print(f"nothing was computed: apt-get install {' '.join(missing)}", file=sys.stderr)
    else:
        with tempfile.TemporaryDirectory() as directory:
            for row in compute_all(tools, wanted, Path(directory)):
                computed.append(row)
                words = [row["check"], row["status"], row.get("problem", "")]
                print(": ".join(word for word in words if word), flush=True)
    what = SUMMARY if computed else LOWERED_ONLY
    says = support(lowered, computed)
    for row in says:
        print(f"{row['op']}: {row['support']}")
    failed = [row for row in lowered if row["status"] in ("overflow", "error")]
    failed += [row for row in computed if row["status"] == "failed"]
    if options.out is not None:
        document = {
            "what": what,
            "command": COMMAND,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": record.versions() | {name: version for name, (version, _) in WHEELS.items()},
            "kernels": kernels_digest(),
            "targets": [*TARGETS],
            "unified_buffer_bits": UNIFIED_BUFFER,
            "not_computed": f"apt packages are missing: {', '.join(missing)}" if missing else None,
            "support": says,
            "lowered": lowered,
            "computed": computed,
        }
        record.write(options.out, document)
    print(f"{len(lowered)} kernels, {len(computed)} checks, {len(failed)} failed: {what}")
    return FAILED if failed else PASSED


if __name__ == "__main__":
    sys.exit(main())
