"""Lowers a kernel's Triton IR with Ascend's compilers, and builds the vendor's IR as a program for this CPU.

    Triton IR ─ triton-adapter-opt → linalg IR ─┬ bishengir-compile → HIVM for a model of NPU, its buffers planned
                                                └ mlir-opt, mlir-translate, llc, cc → a shared object for the CPU

The first two come from wheels, which are unpacked but not installed, as triton-ascend would replace Triton.
`bishengir-compile` ends by calling `hivmc`, which is not published. A script takes its place and keeps its input. So no
binary for an NPU is built, and no NPU is needed. The other tools are MLIR and LLVM 19, which both wheels are built on,
and a C compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

#: Wheel → its version, and the SHA-256 of its file for x86_64 and CPython 3.11. Any Python can unpack it.
WHEELS = {
    "triton-ascend": ("3.2.0", "17c8d7161eed1e96a286281963fe04d3113ee85affaa5d82c7dd0c35803962f0"),
    "ascendnpu-ir": ("1.2.0", "d4e5bfab877ee4ba7b312885f4f5bf646072fd47c88d5aa96f6a11f67d3e8522"),
}
PLATFORMS = ("manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
TARGETS = ("Ascend910B1", "Ascend910B4")
#: The size of the unified buffer of one vector core of these targets, in bits.
UNIFIED_BUFFER = 192 * 1024 * 8

#: The passes as triton-ascend calls them for these targets.
TO_LINALG = (
    "--discrete-mask-access-conversion=compile-on-910-95=False force-simt-template=False",
    "--triton-to-annotation",
    "--triton-to-unstructure=compile-on-910-95=False force-simt-template=False",
    "--triton-to-hivm",
    "--triton-to-hfusion",
    "--triton-to-llvm",
    "--bubble-up-operation",
    "--triton-to-linalg=global-kernel=false named-ops=True enable-nd2nz-on-vector=False "
    "enable-select-analysis=False compile-on-910-95=False",
)
TO_HIVM = (
    "--enable-auto-multi-buffer=True",
    "--enable-auto-bind-sub-block=True",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
TO_LLVM = (
    "--allow-unregistered-dialect",
    "--transform-interpreter",
    "--convert-elementwise-to-linalg",
    "--linalg-fuse-elementwise-ops",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--buffer-deallocation-pipeline",
    "--convert-bufferization-to-memref",
    "--convert-linalg-to-loops",
    "--arith-expand=include-bf16=true",
    "--expand-strided-metadata",
    "--memref-expand",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--convert-cf-to-llvm",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--convert-arith-to-llvm",
    "--convert-index-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--lower-affine",
    "--convert-arith-to-llvm",
    "--reconcile-unrealized-casts",
)
LLVM = Path("/usr/lib/llvm-19/bin")
#: Tools for computing on the CPU → the Debian package of each.
CPU_TOOLS = {"mlir-opt": "mlir-19-tools", "mlir-translate": "mlir-19-tools", "llc": "llvm-19", "cc": "gcc"}

# Replacement for hivmc: copies its input, the planned IR, to its output.
STUB = """#!/bin/sh
[ "$1" = --version ] && exit 0
module=$1
while [ "$1" != -o ]; do shift; done
: > "$2"
cp "$module" "$2.o"
"""

# The IR does not specify the order of a reduction. Adding 4096 fp32 numbers one by one has a larger error than the
# oracle allows, which expects pairwise sums. 64 partial sums are closer to what a vector unit does.
SPLIT = """
module attributes {transform.with_named_sequence} {
  transform.named_sequence @__transform_main(%module: !transform.any_op {transform.readonly}) {
    %all = transform.structured.match attributes{omni.long} in %module : (!transform.any_op) -> !transform.any_op
    transform.foreach %all : !transform.any_op {
    ^bb0(%reduce: !transform.any_op):
      transform.structured.split_reduction %reduce {split_factor = 64, insert_split_dimension = 0}
        : (!transform.any_op) -> (!transform.any_op, !transform.any_op, !transform.any_op, !transform.any_op)
    }
    transform.yield
  }
}
"""

# Functions that the programs call: MLIR's copy between strided memory (with its C interface's types), and a rounding.
RUNTIME = """
#include <stdint.h>
#include <string.h>
struct ranked { char *allocated, *aligned; int64_t offset, sizes_and_strides[]; };
struct unranked { int64_t rank; struct ranked *memref; };
static void copy(int64_t size, int64_t rank, const int64_t *sizes, const char *from, const int64_t *f, char *to,
                 const int64_t *t) {
  if (!rank) { memcpy(to, from, size); return; }
  for (int64_t i = 0; i < sizes[0]; i++)
    copy(size, rank - 1, sizes + 1, from + i * f[0] * size, f + 1, to + i * t[0] * size, t + 1);
}
void memrefCopy(int64_t size, struct unranked *from, struct unranked *to) {
  struct ranked *f = from->memref, *t = to->memref;
  copy(size, from->rank, f->sizes_and_strides, f->aligned + f->offset * size, f->sizes_and_strides + from->rank,
       t->aligned + t->offset * size, t->sizes_and_strides + to->rank);
}
/* What LLVM calls to make a bf16 of a float, where the C compiler's own library is too old to have it: to the nearest,
   ties to even. It is returned in the low half of a float's register. */
__attribute__((weak)) float __truncsfbf2(float value) {
  union { float f; uint32_t u; } x = {value};
  x.u = x.u << 1 > 0xff000000u ? x.u >> 16 | 0x40 : (x.u + 0x7fff + (x.u >> 16 & 1)) >> 16;
  return x.f;
}
"""


class ToolError(RuntimeError):
    """A tool is missing, or failed; then the message has its output."""


@dataclass(frozen=True)
class Lowered:
    """The result of lowering a kernel's linalg IR for one target.

    `used` is the size in bits of the unified buffer that the planned buffers take. `required` is the size that they
    would need if they do not fit. With any other compiler `error`, both are None.
    """

    used: int | None = None
    required: int | None = None
    error: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it was lowered, which the compiler does only if all buffers fit."""
        return self.error is None and self.required is None


def cache_directory() -> Path:
    """The default directory for the wheels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omni-kernels" / "ascend"


class Tools:
    """The vendor's compilers, unpacked under `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.adapter = directory / "triton/backends/ascend/triton-adapter-opt"
        self.compiler = directory / "ascendnpuir/bin/bishengir-compile"
        self.stub = directory / "stub"

    @classmethod
    def found(cls, directory: Path) -> Tools | None:
        """The tools that `fetched` left in `directory`, or None."""
        unpacked = directory / "-".join(version for version, _ in WHEELS.values())
        return cls(unpacked) if (unpacked / "complete").exists() else None

    @classmethod
    def fetched(cls, directory: Path) -> Tools:
        """The tools in `directory`. pip downloads them if they are not there yet.

        Raises:
            ToolError: the wheels are not available, are damaged, or are not for this machine.
        """
        here = f"{platform.system()} on {platform.machine()}"
        if here != "Linux on x86_64":
            raise ToolError(f"the wheels are those for Linux on x86_64, not {here}")
        tools = cls.found(directory)
        if tools is not None:
            return tools
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as work:
            unpacked = Path(work) / "unpacked"
            for name in WHEELS:
                unpack(_download(name, Path(work)), unpacked)
            cls(unpacked)._prepare()
            (unpacked / "complete").touch()
            unpacked.rename(directory / "-".join(version for version, _ in WHEELS.values()))
        return Tools.fetched(directory)

    def _prepare(self) -> None:
        self.stub.mkdir(parents=True, exist_ok=True)
        (self.stub / "hivmc").write_text(STUB)
        for path in (self.adapter, self.compiler, self.stub / "hivmc"):
            path.chmod(0o755)

    def linalg(self, ttir: str) -> str:
        """The linalg IR of a kernel in Triton IR.

        Raises:
            ToolError: it cannot be converted.
        """
        with tempfile.TemporaryDirectory() as work:
            source, out = Path(work) / "kernel.ttir", Path(work) / "kernel.mlir"
            source.write_text(ttir)
            _run([self.adapter, source, *TO_LINALG, "-o", out])
            return out.read_text()

    def lower(self, linalg: str, target: str) -> Lowered:
        """Lower linalg IR for a target, one of `TARGETS`."""
        with tempfile.TemporaryDirectory() as work:
            source, out = Path(work) / "kernel.mlir", Path(work) / "kernel"
            # Remove the attribute for the units that a kernel uses (vector, cube). The compiler determines it itself.
            source.write_text(re.sub(r', mix_mode = "[^"]*"', "", linalg))
            path = os.pathsep.join([str(self.stub), os.environ.get("PATH", "")])
            try:
                _run([self.compiler, source, f"--target={target}", *TO_HIVM, "-o", out], PATH=path)
            except ToolError as error:
                required = overflow(str(error))
                return Lowered(required=required) if required else Lowered(error=first_error(str(error)))
            return Lowered(used=buffers_end(out.with_suffix(".o").read_text()))


def _download(name: str, directory: Path) -> Path:
    """Download a wheel with pip, from pip's configured index."""
    version, expected = WHEELS[name]
    platforms = [word for tag in PLATFORMS for word in ("--platform", tag)]
    wanted = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", *platforms]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--only-binary", ":all:", *wanted, "--dest", directory, f"{name}=={version}"])
    (wheel,) = directory.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != expected:
        raise ToolError(f"{wheel.name} is not the file that is expected: its SHA-256 differs")
    return wheel


def unpack(wheel: Path, directory: Path) -> None:
    """Extract a wheel.

    Raises:
        ToolError: it is damaged.
    """
    with zipfile.ZipFile(wheel) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ToolError(f"{wheel.name} is damaged at {damaged}")
        archive.extractall(directory)


def _run(command: Sequence[str | Path], **environment: str) -> None:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        raise ToolError(f"{Path(command[0]).name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def first_error(text: str) -> str:
    """The line of a compiler's output with the error, without paths."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"error:|[Aa]ssertion", line)]
    found = lines[0] if lines else text.strip().splitlines()[0] if text.strip() else "no output"
    return re.sub(r"(?:/[\w.+-]+)+/", "", found)[:300]


def overflow(text: str) -> int | None:
    """The bits of the unified buffer that the compiler's last attempt would need, from its output."""
    found: list[str] = re.findall(r"ub overflow, requires (\d+) bits", text)
    return int(found[-1]) if found else None


WIDTH = {"i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "index": 64}


def buffers_end(hivm: str) -> int:
    """The bits of the unified buffer up to the end of the last planned buffer."""
    constants = dict(re.findall(r"(%[\w]+) = arith\.constant (\d+) : i64", hivm))
    cast = r"hivm\.hir\.pointer_cast\(([^)]*)\)[^:\n]* : memref<((?:\d+x)*)(\w+)[^\n]*#hivm\.address_space<ub>>"
    ends = [0]
    for places, sizes, kind in re.findall(cast, hivm):
        bits = math.prod(int(n) for n in sizes.split("x") if n) * WIDTH[kind]
        ends += [int(constants[place.strip()]) * 8 + bits for place in places.split(",")]
    return max(ends)


def discrete_accesses(linalg: str) -> int:
    """The number of a kernel's accesses in which the conversion found no regular stride.

    These are made row by row, without their masks. Values read past the end are discarded. Stores past the end write
    back what was read there before, which another program may have changed meanwhile.
    """
    return linalg.count("DiscreteMemAccess")


def missing_cpu_tools() -> list[str]:
    """The missing Debian packages that are needed for computing on the CPU."""
    return sorted({package for tool, package in CPU_TOOLS.items() if _cpu_tool(tool) is None})


def _cpu_tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH") if name == "cc" else str(LLVM))


class _Memref(ctypes.Structure):
    """One-dimensional memory in the form of MLIR's C interface."""

    _fields_ = (
        ("allocated", ctypes.c_void_p),
        ("aligned", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


SCALARS: dict[str, Callable[..., object]] = {
    "i1": ctypes.c_bool,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "f32": ctypes.c_float,
}


REDUCE = re.compile(r"linalg\.reduce ins\([^\n]*tensor<([\dx]+)x\w+>\) outs[^\n]*dimensions = \[(\d)\]")


def _marked(reduce: re.Match[str]) -> str:
    """A reduction, marked for the split into 64 if its size is a multiple of 64."""
    size = int(reduce[1].split("x")[int(reduce[2])])
    return reduce[0] + (" {omni.long}" if size % 64 == 0 else "")


class Program:
    """A kernel's linalg IR, built for this CPU.

    Its function takes two workspaces, the kernel's arguments, the grid and a program's position in it (three numbers
    each). It is called once for every program, one after another.
    """

    def __init__(self, linalg: str, directory: Path) -> None:
        """Prepare the program. It is built in `directory` at its first run; keep the directory as long as the program.

        Raises:
            ToolError: the IR contains no function.
        """
        self._text = linalg
        found = re.search(r"func\.func @(\w+)\((.*?)\) attributes \{", linalg)
        if found is None:
            raise ToolError("there is no function in the linalg IR")
        self.name = found[1]
        self.types: list[str] = re.findall(r"%\w+: (memref<[^>]*>|\w+)", found[2])
        self._directory = directory

    @cached_property
    def _function(self) -> Callable[..., object]:
        missing = missing_cpu_tools()
        if missing:
            raise ToolError(f"apt packages are missing: {', '.join(missing)}")
        text = re.sub(r" ?\{(?:tt|hivm)\.[^{}]*\}", "", self._text)
        text = re.sub(rf"(@{self.name}\(.*?\) attributes) \{{[^{{}}]*\}}", r"\1 {llvm.emit_c_interface}", text)
        text = REDUCE.sub(_marked, text)
        stem = self._directory / hashlib.sha256(text.encode()).hexdigest()[:16]
        source, split, module, ir, thing, c, library = (
            stem.with_suffix(end) for end in (".mlir", ".split.mlir", ".llvm.mlir", ".ll", ".o", ".c", ".so")
        )
        split.write_text(SPLIT)
        source.write_text(text)
        c.write_text(RUNTIME)
        tool = {name: str(_cpu_tool(name)) for name in CPU_TOOLS}
        preload = f"--transform-preload-library=transform-library-paths={split}"
        _run([tool["mlir-opt"], source, preload, *TO_LLVM, "-o", module])
        _run([tool["mlir-translate"], "--mlir-to-llvmir", module, "-o", ir])
        _run([tool["llc"], "-O2", "-relocation-model=pic", "-filetype=obj", ir, "-o", thing])
        _run([tool["cc"], "-O2", "-shared", "-fPIC", thing, c, "-lm", "-o", library])
        function: Callable[..., object] = getattr(ctypes.CDLL(str(library)), f"_mlir_ciface_{self.name}")
        return function

    def run(self, arguments: Sequence[torch.Tensor | int | float | bool], grid: Sequence[int]) -> None:
        """Run every program of a grid.

        Args:
            arguments: the arguments that are not constants, with tuples flattened.
            grid: the launch grid.

        Raises:
            ToolError: the arguments do not match the IR, or a tool is missing or fails.
        """
        x, y, z = [*grid, 1, 1][:3]
        workspace = torch.empty(0, dtype=torch.int8)
        values = [workspace, workspace, *arguments]
        if len(values) + 6 != len(self.types):
            raise ToolError(f"{self.name} takes {len(self.types) - 8} arguments, not {len(arguments)}")
        memory: list[_Memref] = []
        given: list[object] = []
        for value, kind in zip(values, self.types, strict=False):
            if isinstance(value, torch.Tensor):
                memory.append(_Memref(value.data_ptr(), value.data_ptr(), 0, sys.maxsize, 1))
                given.append(ctypes.byref(memory[-1]))
            else:
                given.append(SCALARS[kind](value))
        for k in range(z):
            for j in range(y):
                for i in range(x):
                    self._function(*given, *(ctypes.c_int32(n) for n in (x, y, z, i, j, k)))
