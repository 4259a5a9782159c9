"""The two implementations of every op, for the same tests."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from omni_kernels.ops import OPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`self[op]` takes the op's arguments. "cpu" is the public function on CPU tensors; "triton" is the launcher, on
    CPU tensors through Triton's interpreter or, without the interpreter, on the GPU."""

    name: str

    @property
    def device(self) -> str:
        return "cpu" if self.name == "cpu" or INTERPRETED else "cuda"

    def __getitem__(self, op: str) -> Callable[..., Any]:
        return OPS[op].function if self.name == "cpu" else OPS[op].launcher

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The same numbers on every device."""
        return torch.randn(shape).to(self.device, dtype)
