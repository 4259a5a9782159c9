"""The roof: the bandwidth at which this device copies memory, measured. No op can be expected to move bytes faster.

Bytes read plus bytes written, over the median time of a copy of `COPY_BYTES` to another place.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.timing import median_seconds

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, measured at the first call."""
    source = torch.empty(COPY_BYTES.get(device.type, 1 << 30), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = median_seconds([lambda: target.copy_(source)], device)
    return 2 * source.numel() / seconds
