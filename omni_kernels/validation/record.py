"""Describes the machine that produced a result, and writes results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from omni_kernels.device import describe

PACKAGES = (
    "omni-kernels",
    "torch",
    "triton",
    "triton-ascend",
    "torch-npu",
    "diffusers",
    "transformers",
    "cache-dit",
)


def device_name(device: torch.device) -> str:
    """The name of the GPU or processor."""
    if device.type != "cpu":
        return describe(device).name
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A file name from a device name: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", name).lower()).strip("-")


def versions() -> dict[str, str | None]:
    """The versions of everything that the results depend on; None if not installed."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """The device, its driver, and the versions."""
    about = describe(device)
    facts: dict[str, Any] = {
        "name": device_name(device),
        "vendor": about.vendor,
        "arch": about.arch,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if device.type != "cpu":
        facts |= {"multiprocessors": about.multiprocessors, "memory": about.memory, "driver": driver(about.vendor)}
        facts["runtime"] = _runtime(about.vendor)
    return facts | {"versions": versions()}


def _runtime(vendor: str) -> str | None:
    if vendor == "amd":
        return f"HIP {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if vendor == "nvidia" else None


def _nvidia_driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _first_line(path: str) -> str | None:
    file = Path(path)
    return file.read_text().split("\n")[0].strip() if file.is_file() else None


# Vendor → function that returns the version of its driver.
DRIVERS: dict[str, Callable[[], str | None]] = {
    "nvidia": _nvidia_driver,
    "amd": lambda: _first_line("/sys/module/amdgpu/version"),
    "ascend": lambda: _first_line("/usr/local/Ascend/driver/version.info"),
}


def driver(vendor: str) -> str | None:
    """The version of a vendor's driver; None if unknown."""
    return DRIVERS.get(vendor, lambda: None)()


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write as JSON, with one measurement per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # Join the lines of each innermost object, so that a table has one row per line.
    text = re.sub(r"\{[^{}]*\}", lambda m: re.sub(r"\s*\n\s*", " ", m.group(0)), text)
    replace(path, text + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file completely, or leave the old one unchanged: a full disk leaves no half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
