"""What the ops are on an Ascend NPU, which torch knows as `PrivateUse1`; nothing of it leaves the device.

An op is, in this order: its Triton kernel, where triton-ascend is what compiles and the op is proven there; torch_npu's
fused operators, where they are there and compute the same (`operators`); plain torch, in operators that CANN has. It is
chosen at the op's first call on such a device, by what can be called there and not by versions.

A kernel is proven when it has run on an NPU and was right there (`python -m omni_kernels.validate`); `proven.json`
names those that are. Others run only where `OMNI_KERNELS_TRITON_ASCEND` names them, separated by commas, or says "all".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from typing import Any

#: Names ops, separated by commas, or says "all": their Triton kernels run through triton-ascend, proven or not.
TRITON_VARIABLE = "OMNI_KERNELS_TRITON_ASCEND"
PROVEN = frozenset(json.loads((resources.files(__name__) / "proven.json").read_text(encoding="utf-8"))["ops"])


def implementation(
    op: str, reference: Callable[..., Any], triton: Callable[..., Any], own: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """What an op is here.

    Args:
        op: its name.
        reference: its plain-torch implementation.
        triton: what launches its kernel.
        own: by torch_npu's operators; where it returns NotImplemented, the reference computes.
    """
    if by_triton(op):
        return triton
    if own is None:
        return reference

    def run(*args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        return reference(*args, **kwargs) if made is NotImplemented else made

    return run


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
