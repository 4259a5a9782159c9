"""What a device is: vendor, architecture, number of multiprocessors. Asked of the driver only when asked here.

Nothing in `ops` decides by it but whether tiles and grids must be Ascend's (`ops/_ascend.py`), so that results do not
depend on a GPU's model; benchmarks and validation report it. Tests put a device that is not there in its place with
`pretend`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    npu: Any = getattr(torch, "npu", None) or importlib.import_module("torch_npu").npu
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
