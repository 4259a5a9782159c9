"""RMSNorm by `npu_rms_norm`: one launch where plain torch takes five, in fp32 until it is rounded (`operators`)."""

from __future__ import annotations

import torch

from omni_kernels.ascend.operators import fused
from omni_kernels.ops import _norms


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """See `omni_kernels.ops.rms_norm`."""
    if weight is not None and weight.dtype != x.dtype:  # the operator takes one dtype
        return normed(x.float(), "rms", eps, weight).to(x.dtype).contiguous()
    return normed(x, "rms", eps, weight).to(x.dtype).contiguous()


def normed(
    x: torch.Tensor,
    norm: str,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `_norms.normed`, of an x in fp32; RMSNorm without a bias also in x's dtype, if the weight has it."""
    operator = fused("npu_rms_norm")
    if norm != "rms" or operator is None or not x.numel():
        return _norms.normed(x.float(), norm, eps, weight, bias)
    gamma = x.new_ones(x.shape[-1]) if weight is None else weight.to(x.dtype)
    # Of two dimensions, which every version takes.
    y: torch.Tensor = operator(x.reshape(-1, x.shape[-1]), gamma, eps)[0].view(x.shape)
    return y if bias is None else y.add_(bias)
