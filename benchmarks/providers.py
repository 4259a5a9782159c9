"""What is compared: each op as ours, as the other projects write it in eager torch, and that under torch.compile.

The cases are those of `python -m omni_kernels.validate`. All providers are charged the bytes that the op itself has to
move: what a provider moves on top of that shows as lost bandwidth.
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
    torch._dynamo.reset()  # there is a limit on recompilations of one function, which all shapes would share
    return torch.compile(case.eager, dynamic=False)


#: name → (case → what runs on its inputs). What ours returned still has to go through `Case.values`.
PROVIDERS: dict[str, Callable[[Case], Callable[[Inputs], Any]]] = {**cases.PROVIDERS, "torch.compile": _compiled}


def unavailable(provider: str, shape: Shape, device: torch.device) -> str | None:
    """Why `provider` is not run here; None where it is."""
    if provider != "torch.compile" or device.type != "cpu":
        return None
    if not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler on the CPU; there is none on the PATH"
    if shape.name != "qwen-image-1024":
        return "on the CPU torch.compile is measured at Qwen-Image's shape only: each compilation takes seconds"
    return None
