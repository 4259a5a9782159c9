"""The kernels, one op per file: formula, plain-torch implementation, Triton kernel, registration.

An op runs on the device of its tensors: with Triton on NVIDIA and AMD, with plain torch on the CPU and on devices
without a better implementation. Benchmarks and validation iterate over the table `OPS`.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from omni_kernels.ops.ada_layer_norm import ada_layer_norm
from omni_kernels.ops.gate_residual_norm import gate_residual_norm
from omni_kernels.ops.gelu import gelu
from omni_kernels.ops.linear_forecast import linear_forecast
from omni_kernels.ops.modulated_relative_l1 import modulated_relative_l1
from omni_kernels.ops.qk_norm_rope import qk_norm_rope
from omni_kernels.ops.quantize import quantize
from omni_kernels.ops.relative_l1 import relative_l1
from omni_kernels.ops.residual_relative_l1 import residual_relative_l1
from omni_kernels.ops.rms_norm import rms_norm
from omni_kernels.ops.scaled_mm import scaled_mm
from omni_kernels.ops.swiglu import swiglu
from omni_kernels.registration import DEFINED, direct

__all__ = [
    "OPS",
    "ada_layer_norm",
    "gate_residual_norm",
    "gelu",
    "linear_forecast",
    "modulated_relative_l1",
    "qk_norm_rope",
    "quantize",
    "relative_l1",
    "residual_relative_l1",
    "rms_norm",
    "scaled_mm",
    "swiglu",
    "trusted",
]


OPS = {
    name: DEFINED[name]
    for name in (
        "relative_l1",
        "residual_relative_l1",
        "modulated_relative_l1",
        "linear_forecast",
        "ada_layer_norm",
        "gate_residual_norm",
        "rms_norm",
        "qk_norm_rope",
        "gelu",
        "swiglu",
        "quantize",
        "scaled_mm",
    )
}

_CHECKED = SimpleNamespace(**{name: op.function for name, op in OPS.items()})


def trusted(like: torch.Tensor) -> SimpleNamespace:
    """The ops by name, for calls with tensors like this one whose arguments are known to be valid.

    If the implementations may be called directly, they are returned themselves. Code that calls several ops per step
    then skips the argument checks, and decides once whether the dispatcher is needed.
    """
    return direct(like) or _CHECKED
