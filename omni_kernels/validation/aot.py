"""Compiles, without a GPU, exactly the kernels that a launch would run on one, and reads their costs.

`launches(target, run)` calls `run` with a Triton driver that only knows `target`. Every kernel that `run` launches is
specialised and compiled as Triton would do for these arguments, but is not run. This needs a process without
TRITON_INTERPRET; `compiled` starts one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from omni_kernels.compilations import following

#: Architecture → Triton's target: the backend, the backend's name for it, threads per warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
# Allowed registers per thread, on NVIDIA and AMD. Memory-bound kernels need many warps in flight. A multiprocessor of
# NVIDIA has 65536 registers. With programs of 256 threads, it holds two of them (16 warps) at 128 registers per thread,
# three at 80, four at 64, five at 48 and six at 40. AMD has at least twice as many registers, so more per thread are
# possible: three or four programs at 128, four or five at 96, eight or six at 64. Programs that hold a row in chunks
# have 64 or 128 threads with more elements each: at 168 registers, six or three of them fit.
BUDGETS: dict[str, tuple[int, int]] = {
    "relative_l1_kernel": (80, 80),  # 16 elements of two tensors and of two sums
    "residual_relative_l1_kernel": (48, 64),
    # Whole rows of all inputs at once, up to 64 bytes of each per thread, or 80 in five chunks.
    "modulated_relative_l1_kernel": (168, 168),
    "gate_residual_norm_kernel": (168, 240),
    "ada_layer_norm_kernel": (168, 240),
    "rms_norm_kernel": (96, 112),
    # Up to 17 streams of 32 bytes per thread: a single program has 136 KB in flight. With up to 3 streams, 5 programs.
    "linear_forecast_kernel": (192, 192),
    # q and k of a token in up to six chunks, and the angles.
    "qk_norm_rope_kernel": (168, 168),
    "gelu_kernel": (40, 96),
    "swiglu_kernel": (40, 80),
    "quantize_kernel": (80, 104),
    "add_partials_kernel": (40, 64),
    # 128 × 128 sums of 256 threads are 64 registers; one program is enough, as the copies of its operands overlap.
    "scaled_mm_kernel": (255, 288),
}


#: 8-bit floating-point dtype → the targets that convert to it. Launches that write it have its name in theirs.
FP8 = {"float8_e4m3fn": ("sm_89", "sm_90", "sm_100", "sm_120", "gfx950"), "float8_e4m3fnuz": ("gfx942",)}


def runs_on(launch: str, target: str) -> bool:
    """Whether a target has all dtypes that a launch needs."""
    return all(target in targets for dtype, targets in FP8.items() if dtype in launch.split())


def budget(kernel: str, target: str) -> int:
    """The registers per thread that a kernel may use on a target."""
    return BUDGETS[kernel][TARGETS[target][0] == "hip"]


@dataclasses.dataclass
class Cost:
    """The cost of one compiled kernel.

    `registers` are per thread (VGPRs on AMD). `spills` and `shared` are in bytes. Only spills to memory count; AMD's
    scalar registers spill into lanes of vector registers, which does not. `loads` and `stores` are the instructions
    that access global memory, with their counts. `narrow_offsets` and `atomics` are lines of the Triton IR.
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    loads: dict[str, int]
    stores: dict[str, int]
    narrow_offsets: list[str]
    atomics: list[str]


class _Driver:
    """The part of a Triton driver that compilation needs."""

    def __init__(self, target: Any, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def driven_by(target: Any, device: int) -> Iterator[None]:
    """Context manager in which Triton's driver has one target, a `GPUTarget`, as its device with this number."""
    from triton.runtime.driver import driver

    active = driver.active if "active" in vars(driver) else None
    driver.set_active(_Driver(target, device))
    try:
        yield
    finally:
        if active is not None:
            driver.set_active(active)


@contextlib.contextmanager
def _pretending(target: str, compiled: list[Any]) -> Iterator[None]:
    import triton
    from triton.backends.compiler import GPUTarget

    from omni_kernels.ops import _samples

    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    with (
        driven_by(GPUTarget(*TARGETS[target]), list(TARGETS).index(target)),
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(_samples, "warp_size", return_value=TARGETS[target][2]),
    ):
        yield


def launches(target: str, run: Callable[[], object]) -> list[Any]:
    """The kernels that `run` launches, compiled for `target`, in order."""
    kernels: list[Any] = []
    with _pretending(target, kernels):
        run()
    return kernels


def cost(compiled: Any) -> Cost:
    """The cost of a compiled kernel, read from its assembly."""
    read = _nvidia if "ptx" in compiled.asm else _amd
    lines = [line.strip() for line in compiled.asm["ttir"].splitlines()]
    # A 32-bit product in an offset overflows at 2³¹ elements. Products with a program's number must be 64-bit.
    narrow = [line for line in lines if re.search(r"arith\.muli .*\bi32", line)]
    atomics = [line for line in lines if "atomic" in line]
    # All shared memory of a launch, including that for reductions between warps. The assembly lists only static memory.
    shared = compiled.metadata.shared
    return Cost(kernel=compiled.metadata.name, shared=shared, narrow_offsets=narrow, atomics=atomics, **read(compiled))


def _count(pattern: str, text: str) -> dict[str, int]:
    found = re.findall(pattern, text)
    return {name: found.count(name) for name in sorted(set(found))}


def _nvidia(compiled: Any) -> dict[str, Any]:
    import triton.backends.nvidia as backend

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "spills": found["STACK"] + found["LOCAL"],
        "loads": _count(r"\bld\.global[.\w:]*", compiled.asm["ptx"]),
        "stores": _count(r"\bst\.global[.\w:]*", compiled.asm["ptx"]),
    }


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    names = "vgpr_count|private_segment_fixed_size"
    found = {name: int(n) for name, n in re.findall(rf"\.({names}):\s+(\d+)", text)}
    return {
        "registers": found["vgpr_count"],
        "spills": found["private_segment_fixed_size"],
        "loads": _count(r"\b(?:global|buffer)_load_\w+", text),
        "stores": _count(r"\b(?:global|buffer)_store_\w+", text),
    }


@dataclasses.dataclass
class Result:
    """The result of compiling a launch for a target: its kernels' costs, in order, or why there are none.

    `seconds` are the compile times by kernel name, without kernels that were found in the disk cache.
    """

    launch: str
    target: str
    kernels: list[Cost]
    error: str | None = None
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def spills(self) -> int:
        """Spilled bytes of all kernels."""
        return sum(kernel.spills for kernel in self.kernels)


def compiled(
    targets: Sequence[str],
    names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    table: str = "omni_kernels.validation.launches:table",
) -> Iterator[Result]:
    """Compile the launches of a table for `targets`, in a separate process. Yields each result as soon as it is ready.

    Args:
        targets: keys of `TARGETS`.
        names: keys of the table, for all targets or by target. None: all. A launch is left out on a target that lacks
            its dtype (`runs_on`).
        table: "module:function", a function without arguments that returns a dict: name → function that launches. The
            separate process calls it, without Triton's interpreter.

    Raises:
        RuntimeError: the process failed; the message has its output.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    by_target = {target: names[target] if isinstance(names, Mapping) else names for target in targets}
    wanted = json.dumps({"names": {t: None if n is None else [*n] for t, n in by_target.items()}, "table": table})
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", __name__, wanted]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    found = json.loads(line)
                    yield Result(**found | {"kernels": [Cost(**kernel) for kernel in found["kernels"]]})
            except GeneratorExit:  # the caller does not want the rest
                process.kill()
                raise
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"ahead-of-time compilation failed:\n{log.read()[-4000:]}")


def costs(
    table: str, targets: Sequence[str], names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, dict[str, list[Cost]]]:
    """The costs of the launches of a table: launch name → target → costs of its kernels, in order.

    Args:
        table: as in `compiled`.
        targets: keys of `TARGETS`.
        names: the keys of the table for each target. None: every launch for every target.

    Raises:
        RuntimeError: a launch cannot be compiled.
    """
    found: dict[str, dict[str, list[Cost]]] = {}
    # Two processes, as a compiler uses one processor.
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda part: list(compiled(part, names, table)), (targets[::2], targets[1::2]))
        for result in itertools.chain.from_iterable(halves):
            if result.error is not None:
                raise RuntimeError(f"{result.launch} cannot be compiled for {result.target}: {result.error}")
            found.setdefault(result.launch, {})[result.target] = result.kernels
    return found


def _main(wanted: dict[str, Any]) -> None:
    module, _, function = wanted["table"].partition(":")
    table = getattr(importlib.import_module(module), function)()
    for target, names in wanted["names"].items():
        for name in filter(lambda name: runs_on(name, target), table if names is None else names):
            try:
                with following() as compilations:
                    kernels = launches(target, table[name])
                result = Result(name, target, [cost(kernel) for kernel in kernels], seconds=compilations.seconds)
            except Exception as error:  # anything that a compiler raises is reported
                result = Result(name, target, [], f"{type(error).__name__}: {error}"[:2000])
            print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
