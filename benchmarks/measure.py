"""What `make bench` and `make gpu` measure: every case at every shape by every provider."""

from __future__ import annotations

import torch

from benchmarks.providers import PROVIDERS, unavailable
from omni_kernels.device import device_count
from omni_kernels.validation import measurement
from omni_kernels.validation.cases import CASES, Case
from omni_kernels.validation.measurement import Row
from omni_kernels.validation.shapes import Shape, shapes_for


def device_here() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if device_count("cuda") else "cpu")


def measure(case: Case, shape: Shape, provider: str, device: torch.device) -> Row:
    """Check and time one combination, where it is available."""
    reason = unavailable(provider, shape, device)
    if reason is not None:
        return Row(case.name, str(shape), provider, 0, None, None, None, reason)
    return measurement.measure(case, shape, provider, PROVIDERS[provider](case), device)


def combinations(device: torch.device) -> list[tuple[Case, Shape, str]]:
    """Everything that is measured on `device`, providers side by side."""
    return [(case, shape, p) for case in CASES.values() for shape in shapes_for(device) for p in PROVIDERS]
