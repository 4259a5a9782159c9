"""Devices: their properties, and everything else that is queried from a device other than by operators.

Properties (vendor, architecture, number of multiprocessors) are queried from the driver only on request. In `ops`, they
decide only whether tiles and grids must be Ascend's (`ascend/limits.py`), so results do not depend on a GPU's model.
Benchmarks and validation report them. Tests simulate a device that is not present with `pretend`.

torch has one interface for streams, events, memory statistics and so on of each kind of device: torch.cuda (NVIDIA,
AMD), torch.npu (Ascend). These are used here and nowhere else, except for what only CUDA has: graphs are used where
they are made.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """One device.

    `vendor` is nvidia, amd, ascend, cpu or, for any other, torch's name of the device type. `arch` is the compiler's
    name for it (sm_90, gfx942, Ascend910B2, x86_64). `multiprocessors` is the number of SMs, compute units, AI cores
    or, on the CPU, torch's threads; 0 means unknown. `memory` is in bytes; 0 means unknown.
    """

    vendor: str
    arch: str
    name: str
    multiprocessors: int = 0
    memory: int = 0


def _cuda(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        vendor, arch = "amd", found.gcnArchName.partition(":")[0]
    else:
        vendor, arch = "nvidia", f"sm_{found.major}{found.minor}"
    return Device(vendor, arch, found.name, found.multi_processor_count, found.total_memory)


def _npu(index: int) -> Device:
    load("npu")
    npu: Any = getattr(torch, "npu", None)
    name = npu.get_device_name(index)
    found = npu.get_device_properties(index)
    return Device("ascend", name, name, getattr(found, "cube_core_num", 0), getattr(found, "total_memory", 0))


def _cpu(index: int) -> Device:
    return Device("cpu", platform.machine(), platform.processor() or platform.machine(), torch.get_num_threads())


# Device type → function that queries a device. One row per device type.
PROBES: dict[str, Callable[[int], Device]] = {"cpu": _cpu, "cuda": _cuda, "npu": _npu}

_pretended: dict[str, Device] = {}


@functools.cache
def _probe(kind: str, index: int) -> Device:
    probe = PROBES.get(kind)
    return probe(index) if probe else Device(kind, kind, kind)


def describe(device: torch.device | str = "cpu") -> Device:
    """The properties of `device`, cached after the first call. "cuda" means the first CUDA device.

    Raises whatever torch raises if there is no such device.
    """
    device = torch.device(device)
    if device.type in _pretended:
        return _pretended[device.type]
    return _probe(device.type, device.index or 0)


@contextlib.contextmanager
def pretend(kind: str, device: Device) -> Iterator[None]:
    """Context manager that describes every device of type `kind` ("cuda", "npu") as `device`, without querying it."""
    before = _pretended.get(kind)
    _pretended[kind] = device
    try:
        yield
    finally:
        if before is None:
            del _pretended[kind]
        else:
            _pretended[kind] = before


#: Kinds of devices that compute in fp64 at a usable speed.
FP64 = frozenset({"cpu", "cuda"})


def has_mxfp8(device: torch.device) -> bool:
    """Whether a GPU multiplies MXFP8: NVIDIA's from sm_100 on, and AMD's gfx950."""
    found = describe(device)
    return found.arch == "gfx950" or (found.vendor == "nvidia" and generation(found.arch) >= 100)


def generation(arch: str) -> int:
    """The number of an architecture of NVIDIA's: 90 for sm_90."""
    return int(re.sub(r"\D", "", arch) or 0)


def has_fp64(device: torch.device) -> bool:
    """Whether `device` computes in float64; Ascend and most other accelerators do not."""
    return device.type in FP64


def load(kind: str) -> None:
    """Import the package that adds this kind of device to torch: for "npu", torch_npu if it is installed.

    Raises:
        ImportError: it is installed but cannot be loaded.
    """
    if kind == "npu" and not hasattr(torch, "npu") and find_spec("torch_npu"):
        importlib.import_module("torch_npu")


def device_count(kind: str) -> int:
    """The number of devices of this kind. 0 if torch does not know the kind, or its package does not load."""
    if kind == "cpu":
        return 1
    with contextlib.suppress(ImportError):  # torch_npu without CANN
        load(kind)
    part = getattr(torch, kind, None)
    return part.device_count() if part is not None and part.is_available() else 0


def _part(device: torch.device) -> Any:
    """torch.cuda, torch.npu, ...: torch's module for this kind of device."""
    return torch.get_device_module(device)


def on_device_of(t: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Context manager that makes `t`'s device the current one, where Triton launches. Free if it already is."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    if t.is_cuda or t.is_cpu or t.is_meta:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = _part(t.device).device(t.device)
    return context


@functools.cache
def warp_size() -> int:
    """Threads per warp of a GPU: 32, or on AMD as the device reports, 64 (CDNA) or 32 (RDNA)."""
    return torch.cuda.get_device_properties().warp_size if torch.version.hip else 32


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all its work."""
    if device.type != "cpu":
        part = _part(device)
        part.synchronize() if device.type == "mps" else part.synchronize(device)


class Timer:
    """Marks points in time of a device's work, and gives the seconds between them.

    The marks are events on the current stream, which do not block. On the CPU, and on devices without events in torch,
    they are times of the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        part = None if device.type == "cpu" else _part(device)
        self._part = part if hasattr(part, "Event") and hasattr(part, "current_stream") else None

    def mark(self) -> Any:
        """Mark the current point in time."""
        if self._part is None:
            return time.perf_counter()
        event = self._part.Event(enable_timing=True)
        event.record(self._part.current_stream(self._device))
        return event

    def wait(self, mark: Any) -> None:
        """Wait until the device has reached a mark."""
        if self._part is not None:
            mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """The seconds between two marks, both of which the device has reached."""
        return end - start if self._part is None else start.elapsed_time(end) / 1000


class PeakMemory:
    """The peak memory of tensors on a device from now on. Resets torch's own peak statistics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        part = None if device.type == "cpu" else _part(device)
        self._part = part if hasattr(part, "max_memory_allocated") else None
        if self._part is not None:
            self._part.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """The peak so far; None if the device has no such statistics, like the CPU."""
        return None if self._part is None else self._part.max_memory_allocated(self._device)


def is_recorded(t: torch.Tensor) -> bool:
    """Whether work on `t`'s device is being recorded in a CUDA graph, so that the host cannot wait for it."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()
