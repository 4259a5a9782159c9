"""Devices: what one is, and everything that is asked of one otherwise than by operators.

What it is (vendor, architecture, number of multiprocessors) is asked of the driver only when asked here. Nothing in
`ops` decides by it but whether tiles and grids must be Ascend's (`ascend/limits.py`), so that results do not depend on
a GPU's model; benchmarks and validation report it. Tests put a device that is not there in its place with `pretend`.

Streams, events, memory figures and the like are torch's for each kind of device, under one interface: torch.cuda
(NVIDIA, AMD) and torch.npu (Ascend) are asked alike, here and nowhere else. What only CUDA has, graphs, is asked where
they are made.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """One device.

    `vendor` is nvidia, amd, ascend, cpu or, for any other, torch's name of the device type. `arch` is what its compiler
    calls it (sm_90, gfx942, Ascend910B2, x86_64). `multiprocessors` counts SMs, compute units, AI cores or, on the CPU,
    the threads that torch uses; 0 is unknown. `memory` is in bytes; 0 is unknown.
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


# Device type → how to ask. A vendor is one row.
PROBES: dict[str, Callable[[int], Device]] = {"cpu": _cpu, "cuda": _cuda, "npu": _npu}

_pretended: dict[str, Device] = {}


@functools.cache
def _probe(kind: str, index: int) -> Device:
    probe = PROBES.get(kind)
    return probe(index) if probe else Device(kind, kind, kind)


def describe(device: torch.device | str = "cpu") -> Device:
    """What `device` is ("cuda" is the first one), remembered after the first time.

    Raises whatever torch raises where there is no such device.
    """
    device = torch.device(device)
    if device.type in _pretended:
        return _pretended[device.type]
    return _probe(device.type, device.index or 0)


@contextlib.contextmanager
def pretend(kind: str, device: Device) -> Iterator[None]:
    """For the block, every device of type `kind` ("cuda", "npu") is described as `device`, and none is asked."""
    before = _pretended.get(kind)
    _pretended[kind] = device
    try:
        yield
    finally:
        if before is None:
            del _pretended[kind]
        else:
            _pretended[kind] = before


#: Kinds of devices that compute in fp64 at a speed that can be waited for.
FP64 = frozenset({"cpu", "cuda"})


def has_fp64(device: torch.device) -> bool:
    """Whether `device` computes in float64; Ascend and most other accelerators do not."""
    return device.type in FP64


def load(kind: str) -> None:
    """Let torch know of the devices of a kind that a package of its own brings: torch_npu, where it is installed.

    Raises:
        ImportError: it is installed and cannot be loaded.
    """
    if kind == "npu" and not hasattr(torch, "npu") and find_spec("torch_npu"):
        importlib.import_module("torch_npu")


def device_count(kind: str) -> int:
    """How many devices of a kind there are here; 0 of one that torch does not know, or whose package does not load."""
    if kind == "cpu":
        return 1
    with contextlib.suppress(ImportError):  # torch_npu without CANN
        load(kind)
    part = getattr(torch, kind, None)
    return part.device_count() if part is not None and part.is_available() else 0


def _part(device: torch.device) -> Any:
    """torch.cuda, torch.npu, ...: torch's own part for this kind of device."""
    return torch.get_device_module(device)


def on_device_of(t: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes `t`'s device the current one, which is where Triton launches; costs nothing where it is already."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    if t.is_cuda or t.is_cpu or t.is_meta:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = _part(t.device).device(t.device)
    return context


@functools.cache
def warp_size() -> int:
    """Threads of a GPU's warp: 32, and on AMD what the device says, 64 (CDNA) or 32 (RDNA)."""
    return torch.cuda.get_device_properties().warp_size if torch.version.hip else 32


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type != "cpu":
        part = _part(device)
        part.synchronize() if device.type == "mps" else part.synchronize(device)


class Timer:
    """Moments of a device's work, and the seconds between them.

    The moments are events of the stream that is current, which neither wait nor make anybody wait; on the CPU, and on
    devices whose part of torch has no events, they are the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        part = None if device.type == "cpu" else _part(device)
        self._part = part if hasattr(part, "Event") and hasattr(part, "current_stream") else None

    def mark(self) -> Any:
        """This moment."""
        if self._part is None:
            return time.perf_counter()
        event = self._part.Event(enable_timing=True)
        event.record(self._part.current_stream(self._device))
        return event

    def wait(self, mark: Any) -> None:
        """Until the device has reached a moment."""
        if self._part is not None:
            mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """From one moment to another, both of which the device has reached."""
        return end - start if self._part is None else start.elapsed_time(end) / 1000


class PeakMemory:
    """The most that tensors take on a device from now on; the figure that torch keeps of it begins anew."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        part = None if device.type == "cpu" else _part(device)
        self._part = part if hasattr(part, "max_memory_allocated") else None
        if self._part is not None:
            self._part.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """The most up to now; None of a device that does not count, as the CPU."""
        return None if self._part is None else self._part.max_memory_allocated(self._device)
