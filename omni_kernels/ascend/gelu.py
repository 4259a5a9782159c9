"""gelu with `npu_gelu`, called for the tanh approximation (`operators`)."""

from __future__ import annotations

import torch

from omni_kernels.ascend.operators import fused

#: The most dimensions that the operator supports.
MOST_DIMENSIONS = 8


def gelu(
    x: torch.Tensor, quantize: torch.dtype | None = None, beside: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `omni_kernels.ops.gelu`. Returns NotImplemented if the operator is missing or does not support these."""
    operator = fused("npu_gelu")
    if operator is None or quantize is not None or x.dim() > MOST_DIMENSIONS or not x.numel():
        return NotImplemented
    y: torch.Tensor = operator(x, approximate="tanh")
    return y.contiguous() if out is None else out.copy_(y)
