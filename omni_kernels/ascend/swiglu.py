"""swiglu with `npu_swiglu`, which takes both halves in one contiguous tensor (`operators`).

The halves of one packed projection are in that form. Other tensors would have to be concatenated first, which moves as
many bytes as the operators of plain torch.
"""

from __future__ import annotations

import torch

from omni_kernels.ascend.operators import fused

#: The most dimensions that the operator supports.
MOST_DIMENSIONS = 8


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    quantize: torch.dtype | None = None,
    beside: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `omni_kernels.ops.swiglu`. Returns NotImplemented if the operator is missing or does not support these."""
    operator = fused("npu_swiglu")
    both = None if operator is None or quantize is not None else packed(gate, up)
    if operator is None or both is None or gate.dim() > MOST_DIMENSIONS:
        return NotImplemented
    if gate.dtype is torch.float16:
        both = both.float()
    y: torch.Tensor = operator(both, -1)
    return y.to(gate.dtype) if out is None else out.copy_(y)


def packed(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    """The contiguous tensor [..., 2·n] of which `gate` and `up` are the halves, or None."""
    n = gate.shape[-1]
    if (
        not gate.numel()
        or (gate.dtype, gate.stride()) != (up.dtype, up.stride())
        or up.storage_offset() - gate.storage_offset() != n
        or up.untyped_storage().data_ptr() != gate.untyped_storage().data_ptr()
    ):
        return None
    both = gate.as_strided((*gate.shape[:-1], 2 * n), gate.stride())
    return both if both.is_contiguous() else None
