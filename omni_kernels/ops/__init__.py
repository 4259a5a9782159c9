"""The kernels, one op to a file: formula, plain-torch implementation, Triton kernel, registration.

An op runs where its tensors are: plain torch on the CPU and on devices without better, Triton on NVIDIA and AMD. `OPS`
is the table that benchmarks and validation go through.
"""

from __future__ import annotations

import importlib

from omni_kernels.ops.linear_forecast import linear_forecast
from omni_kernels.ops.modulated_relative_l1 import modulated_relative_l1
from omni_kernels.ops.relative_l1 import relative_l1
from omni_kernels.ops.residual_relative_l1 import residual_relative_l1
from omni_kernels.registration import Op

__all__ = ["OPS", "linear_forecast", "modulated_relative_l1", "relative_l1", "residual_relative_l1"]


def _op(name: str) -> Op:
    # The package's attribute of that name is the function, hence the detour to the file.
    file = importlib.import_module(f"{__name__}.{name}")
    return Op(getattr(file, name), file.reference, file.launch, file.bytes_moved)


OPS = {name: _op(name) for name in ("relative_l1", "residual_relative_l1", "modulated_relative_l1", "linear_forecast")}
