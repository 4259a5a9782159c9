"""`pytest benchmarks`: each op by provider (ours, eager, torch.compile) over the models' shapes.

A wrong result fails the benchmark before anything is timed. The table at the end has GB/s from the op's own byte
count, and the copy bandwidth measured on the same device. On the CPU the shapes are reduced (`shapes.ON_CPU`) and
"ours" is the plain-torch implementation; no Triton kernel is timed there.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks.measure import combinations, device_here
from benchmarks.providers import PROVIDERS, unavailable
from omni_kernels.device import synchronize
from omni_kernels.validation.cases import Case
from omni_kernels.validation.measurement import calls_for, row
from omni_kernels.validation.shapes import Shape
from omni_kernels.validation.timing import median_seconds

DEVICE = device_here()


def synchronised_clock() -> float:
    """Seconds, read after the device has finished its work."""
    synchronize(DEVICE)
    return time.perf_counter()


@pytest.mark.parametrize(
    ("case", "shape", "provider"), combinations(DEVICE), ids=lambda value: getattr(value, "name", value)
)
@pytest.mark.benchmark(timer=synchronised_clock)
def test_op_by_provider(case: Case, shape: Shape, provider: str, benchmark, record_row) -> None:
    reason = unavailable(provider, shape, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    with torch.no_grad():
        calls, nbytes = calls_for(case, shape, provider, PROVIDERS[provider](case), DEVICE)

        def run() -> None:
            for call in calls:
                call()

        benchmark.group = f"{case.name}, {shape}"
        benchmark.pedantic(run, rounds=20, warmup_rounds=2)
        # The host's clock includes the launches. For a GPU's bandwidth, only the device's own time is right.
        on_host = DEVICE.type == "cpu"
        seconds = (
            statistics.median(benchmark.stats.stats.data) / len(calls) if on_host else median_seconds(calls, DEVICE)
        )
    measured = row(case, shape, provider, DEVICE, nbytes, seconds)
    benchmark.extra_info.update(vars(measured))
    record_row(measured)
