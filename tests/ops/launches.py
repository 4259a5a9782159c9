"""The package's launches, a control kernel that does what no kernel of the package does, and launch configurations."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

from omni_kernels import ops
from omni_kernels.validation import launches


@triton.jit
def control_kernel(p_x, p_out, n, stride, BLOCK: tl.constexpr):
    """Does what no kernel of the package does: a mask on every block, a 32-bit product, a floating-point atomic."""
    o = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.atomic_add(p_out, tl.sum(tl.load(p_x + o, mask=o < n, other=0.0).to(tl.float32)))


def control() -> None:
    x = torch.empty(1, 4096 * 3072 + 1, dtype=torch.bfloat16)
    control_kernel[(1,)](x, torch.empty(1), x.numel(), 4096, BLOCK=4096, enable_fp_fusion=True)


def table() -> dict:
    return {"control": control, **launches.table()}


@dataclass(frozen=True)
class Configuration:
    """What a kernel is compiled for: its constants, its warps, and the dtypes of its tensors."""

    kernel: str
    constants: dict[str, int]
    num_warps: int
    tensors: dict[str, torch.dtype]

    @property
    def elements(self) -> int:
        """The number of elements of each tensor that a warp processes at a time."""
        rows, chunks = (self.constants.get(name, 1) for name in ("ROWS", "CHUNKS"))
        return rows * chunks * self.constants["BLOCK"] // self.num_warps


class _Recorder:
    """Replaces a kernel; records its launches and runs nothing."""

    def __init__(self, name: str, kernel: Any, found: list[Configuration]) -> None:
        self.name, self.found = name, found
        self.signature = inspect.signature(kernel.fn)
        self.constants = [p.name for p in self.signature.parameters.values() if "constexpr" in str(p.annotation)]

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self.launched

    def launched(self, *args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
        given = self.signature.bind(*args, **constants).arguments
        many = {f"{name}[{j}]": t for name, ts in given.items() if isinstance(ts, tuple) for j, t in enumerate(ts)}
        tensors = {name: t.dtype for name, t in (given | many).items() if isinstance(t, torch.Tensor)}
        constants = {name: int(given[name]) for name in self.constants}
        self.found.append(Configuration(self.name, constants, num_warps, tensors))


def _kernels() -> list[tuple[Any, str]]:
    """The module and the name of every kernel of the package."""
    files = [
        importlib.import_module(f"omni_kernels.ops.{module.name}") for module in pkgutil.iter_modules(ops.__path__)
    ]
    return [(file, name) for file in files for name in vars(file) if name.endswith("_kernel")]


def kernels() -> set[str]:
    return {name for _, name in _kernels()}


@contextmanager
def recorded(warp_size: int = 32) -> Iterator[list[Configuration]]:
    """While open, record the configuration of every launch; nothing runs."""
    found: list[Configuration] = []
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(ops._samples, "warp_size", return_value=warp_size))
        for file, name in _kernels():
            recorder = _Recorder(name, getattr(file, name), found)
            patches.enter_context(mock.patch.object(file, name, recorder))
        yield found


def configurations(launch: Callable[[], object], warp_size: int = 32) -> list[Configuration]:
    """The configurations of the kernels that `launch` launches, in order."""
    with recorded(warp_size) as found:
        launch()
    return found
