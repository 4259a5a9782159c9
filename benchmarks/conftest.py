"""For all benchmarks: one torch thread on the CPU, and a table of GB/s at the end, with the copy bandwidth."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # torch-npu without CANN would break `import torch`

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.measure import device_here
from omni_kernels.validation.measurement import Row, table
from omni_kernels.validation.roof import copy_bandwidth

torch.set_num_threads(1)  # the same for every provider, with steady times

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def record_row(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Adds a row to the table at the end."""
    return request.config.stash.setdefault(ROWS, []).append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    device = device_here()
    terminalreporter.section("bandwidth")
    terminalreporter.write_line(f"{device}: copies memory at {copy_bandwidth(device) / 1e9:.1f} GB/s (read + written)")
    if device.type == "cpu":
        terminalreporter.write_line("ours is the plain-torch implementation here, at a sixteenth of the tokens")
    terminalreporter.write_line(table(rows))
