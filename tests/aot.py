"""Compiles, with no GPU, the very kernels that a launch would run on one, and reads what they cost.

`launches(target, run)` calls `run` with Triton's driver replaced by one that only knows `target`: every kernel that
`run` launches is specialised and compiled as Triton would for these arguments, and is not run. It needs a process
without TRITON_INTERPRET, hence `python aot.py MODULE TARGET...`, which prints what all launches of MODULE cost as JSON.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclasses.dataclass
class Cost:
    """What one compiled kernel takes.

    `registers` are per thread (VGPRs on AMD); `spills` and `shared` are in bytes. Only what goes to memory counts as
    spilt: AMD's scalar registers overflow into lanes of vector registers.
    `loads` and `stores` are the instructions that touch global memory, each with the number of times that it occurs;
    `narrow_offsets` and `atomics` are lines of Triton's own code.
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
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: Any, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _pretending(target: str, compiled: list[Any]) -> Iterator[None]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from omni_kernels.ops import _samples

    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    active = driver.active if "active" in vars(driver) else None
    driver.set_active(_Driver(GPUTarget(*TARGETS[target]), list(TARGETS).index(target)))
    try:
        with (
            mock.patch.object(triton.JITFunction, "run", compile_only),
            mock.patch.object(_samples, "WARP_SIZE", TARGETS[target][2]),
        ):
            yield
    finally:
        if active is not None:
            driver.set_active(active)


def launches(target: str, run: Callable[[], object]) -> list[Any]:
    """The kernels that `run` launches, compiled for `target`, in order."""
    compiled: list[Any] = []
    with _pretending(target, compiled):
        run()
    return compiled


def cost(compiled: Any) -> Cost:
    """What a compiled kernel takes, from its assembly."""
    read = _nvidia if "ptx" in compiled.asm else _amd
    lines = [line.strip() for line in compiled.asm["ttir"].splitlines()]
    # A product of 32 bits added to a pointer wraps at 2³¹ elements: those of a program's number must have 64.
    narrow = [line for line in lines if re.search(r"arith\.muli .*\bi32", line)]
    atomics = [line for line in lines if "atomic" in line]
    return Cost(kernel=compiled.metadata.name, narrow_offsets=narrow, atomics=atomics, **read(compiled))


def _count(pattern: str, text: str) -> dict[str, int]:
    found = re.findall(pattern, text)
    return {name: found.count(name) for name in sorted(set(found))}


def _nvidia(compiled: Any) -> dict[str, Any]:
    import triton.backends.nvidia as backend

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "spills": found["STACK"] + found["LOCAL"],
        "shared": found["SHARED"],
        "loads": _count(r"\bld\.global[.\w:]*", compiled.asm["ptx"]),
        "stores": _count(r"\bst\.global[.\w:]*", compiled.asm["ptx"]),
    }


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    names = r"vgpr_count|private_segment_fixed_size|group_segment_fixed_size"
    found = {name: int(n) for name, n in re.findall(rf"\.({names}):\s+(\d+)", text)}
    return {
        "registers": found["vgpr_count"],
        "spills": found["private_segment_fixed_size"],
        "shared": found["group_segment_fixed_size"],
        "loads": _count(r"\b(?:global|buffer)_load_\w+", text),
        "stores": _count(r"\b(?:global|buffer)_store_\w+", text),
    }


def costs(module: str, targets: list[str]) -> dict[str, dict[str, list[Cost]]]:
    """What every launch of `module` costs on every target: a launch's name → a target → its kernels, in order.

    `module` has a table LAUNCHES of names and functions of no arguments that launch. The work is done in a process of
    its own, without the interpreter.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__, module, *targets]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout)
    return {n: {t: [Cost(**c) for c in kernels] for t, kernels in of.items()} for n, of in found.items()}


def _main() -> None:
    table = importlib.import_module(sys.argv[1]).LAUNCHES
    results = {
        name: {t: [dataclasses.asdict(cost(kernel)) for kernel in launches(t, run)] for t in sys.argv[2:]}
        for name, run in table.items()
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main()
