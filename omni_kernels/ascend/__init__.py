"""Implementations of the ops on an Ascend NPU (torch's `PrivateUse1`). All computation stays on the device.

The first available of these is used:

1. the op's Triton kernel, if triton-ascend is installed and the kernel is proven;
2. torch_npu's fused operators, if they exist and compute the same (`operators`);
3. plain torch, with operators that CANN has.

It is chosen at the op's first call on such a device, by what can be called there, not by versions.

A kernel is proven once it has run on an NPU with correct results (`python -m omni_kernels.validate`). `proven.json`
lists the proven ones. Others run only if the environment variable `OMNI_KERNELS_TRITON_ASCEND` lists them, separated by
commas, or is "all".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from typing import Any

#: Environment variable: comma-separated ops, or "all". Their Triton kernels run through triton-ascend, proven or not.
TRITON_VARIABLE = "OMNI_KERNELS_TRITON_ASCEND"
PROVEN = frozenset(json.loads((resources.files(__name__) / "proven.json").read_text(encoding="utf-8"))["ops"])


def implementation(
    op: str, reference: Callable[..., Any], triton: Callable[..., Any], own: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """An op's implementation on NPUs.

    Args:
        op: its name.
        reference: its plain-torch implementation.
        triton: its implementation with the Triton kernel.
        own: its implementation with torch_npu's operators. If it returns NotImplemented, the reference runs.
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
    """Whether an op uses its Triton kernel on NPUs."""
    wanted = [word.strip() for word in os.environ.get(TRITON_VARIABLE, "").split(",")]
    return (op in PROVEN or op in wanted or "all" in wanted) and triton_compiles()


def triton_compiles() -> bool:
    """Whether Triton compiles for NPUs: triton-ascend is installed, and its driver is active."""
    if find_spec("triton") is None:
        return False
    from triton.runtime.driver import driver

    try:
        return driver.active.get_current_target().backend in ("npu", "ascend")
    except Exception:  # a driver that finds no device may raise anything
        return False
