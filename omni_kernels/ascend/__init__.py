"""What the ops are on an Ascend NPU, which torch knows as `PrivateUse1`; nothing of it leaves the device.

An op is, in this order: its Triton kernel, where triton-ascend is what compiles and the op is proven there; torch_npu's
fused operators, where they are there and compute the same (`operators`); plain torch, in operators that CANN has. It is
chosen at the op's first call on such a device, by what can be called there and not by versions.

A kernel is proven when it has run on an NPU and was right there (`python -m omni_kernels.validate`); `proven.json`
names those that are. Others run only where `OMNI_KERNELS_TRITON_ASCEND` names them, separated by commas, or says "all".
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from typing import Any

from omni_kernels.ascend.gelu import gelu
from omni_kernels.ascend.qk_norm_rope import qk_norm_rope
from omni_kernels.ascend.rms_norm import normed, rms_norm
from omni_kernels.ascend.swiglu import swiglu
from omni_kernels.ops.ada_layer_norm import reference as ada_layer_norm
from omni_kernels.ops.gate_residual_norm import reference as gate_residual_norm
from omni_kernels.ops.gate_residual_norm import without_norm
from omni_kernels.ops.gelu import into
from omni_kernels.ops.modulated_relative_l1 import reference as modulated_relative_l1

#: Names ops, separated by commas, or says "all": their Triton kernels run through triton-ascend, proven or not.
TRITON_VARIABLE = "OMNI_KERNELS_TRITON_ASCEND"
PROVEN = frozenset(json.loads((resources.files(__name__) / "proven.json").read_text(encoding="utf-8"))["ops"])

#: By the name of the op's schema; the others are their plain-torch implementations.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ada_layer_norm": functools.partial(ada_layer_norm, normed=normed),
    "gate_residual_norm": functools.partial(gate_residual_norm, normed=normed),
    "gate_residual_norm.without_norm": without_norm(functools.partial(gate_residual_norm, normed=normed)),
    "gelu": gelu,
    "gelu_into": into(gelu),
    "modulated_relative_l1": functools.partial(modulated_relative_l1, normed=normed),
    "qk_norm_rope": qk_norm_rope,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
}


def implementation(name: str, reference: Callable[..., Any], triton: Callable[..., Any]) -> Callable[..., Any]:
    """What an op is here.

    Args:
        name: of its schema, with the overload.
        reference: its plain-torch implementation.
        triton: what launches its kernel.
    """
    if by_triton(name.partition(".")[0].removesuffix("_into")):
        return triton
    return IMPLEMENTATIONS.get(name, reference)


def by_triton(op: str) -> bool:
    """Whether an op is its Triton kernel here."""
    wanted = [word.strip() for word in os.environ.get(TRITON_VARIABLE, "").split(",")]
    return (op in PROVEN or op in wanted or "all" in wanted) and triton_compiles()


def triton_compiles() -> bool:
    """Whether Triton compiles for NPUs here: triton-ascend is installed, and its driver is the active one."""
    if find_spec("triton") is None:
        return False
    from triton.runtime.driver import driver

    try:
        return driver.active.get_current_target().backend in ("npu", "ascend")
    except Exception:  # whatever a driver raises that finds no device
        return False
