"""The kernels, one op to a file: formula, plain-torch implementation, Triton kernel, registration.

An op runs where its tensors are: plain torch on the CPU and on devices without better, Triton on NVIDIA and AMD. `OPS`
is the table that benchmarks and validation go through.
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
from omni_kernels.ops.relative_l1 import relative_l1
from omni_kernels.ops.residual_relative_l1 import residual_relative_l1
from omni_kernels.ops.rms_norm import rms_norm
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
    "relative_l1",
    "residual_relative_l1",
    "rms_norm",
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
    )
}

_CHECKED = SimpleNamespace(**{name: op.function for name, op in OPS.items()})


def trusted(like: torch.Tensor) -> SimpleNamespace:
    """The ops by name, to be called with tensors like this one that are known to fit.

    Where an op may call its implementation directly, that implementation itself: whoever calls several ops a step is
    spared their checks, and asking each of them what was asked once.
    """
    return direct(like) or _CHECKED
