"""The roof: the measured bandwidth at which this device copies memory. No op is expected to move bytes faster.

It is bytes read plus bytes written, divided by the median time of a copy. The copy has `COPY_BYTES` bytes, but at most
an eighth of the device's memory.
"""

from __future__ import annotations

import functools

import torch

from omni_kernels.device import describe
from omni_kernels.validation.timing import median_seconds

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, measured at the first call."""
    memory = describe(device).memory
    wanted = COPY_BYTES.get(device.type, 1 << 30)
    source = torch.empty(min(wanted, memory // 8) if memory else wanted, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = median_seconds([lambda: target.copy_(source)], device)
    return 2 * source.numel() / seconds
