"""The providers that are compared: our op, the eager torch code of other projects, and that code under torch.compile.

The cases are those of `python -m omni_kernels.validate`. GB/s are computed for all providers from the bytes that the
op itself has to move. If a provider moves more, this shows as lost bandwidth.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch

from omni_kernels.validation import cases
from omni_kernels.validation.cases import Case, Inputs
from omni_kernels.validation.shapes import Shape


def _compiled(case: Case) -> Callable[[Inputs], Any]:
    torch._dynamo.reset()  # otherwise all shapes would share one function's recompile limit
    return torch.compile(case.eager, dynamic=False)


#: name → (case → the function of its inputs). Our ops' results still have to go through `Case.values`.
PROVIDERS: dict[str, Callable[[Case], Callable[[Inputs], Any]]] = {**cases.PROVIDERS, "torch.compile": _compiled}


def unavailable(provider: str, shape: Shape, device: torch.device) -> str | None:
    """Why `provider` cannot run here; None if it can."""
    if provider != "torch.compile" or device.type != "cpu":
        return None
    if not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler on the CPU; there is none on the PATH"
    if shape.name != "qwen-image-1024":
        return "on the CPU torch.compile is measured at Qwen-Image's shape only: each compilation takes seconds"
    return None
