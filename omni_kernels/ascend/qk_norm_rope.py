"""qk_norm_rope in real numbers, which NPUs support natively: with `npu_rms_norm` and `npu_rotary_mul`, in fp32.

rotate: x·cos + x'·sin        x' = (−b, a) for every pair (a, b) of x; cos and sin: [1 or B, S, 1 or H, Dh]
"""

from __future__ import annotations

import torch

from omni_kernels.ascend.operators import fused
from omni_kernels.device import describe

#: Limit of `npu_rotary_mul`: samples times heads ("interleaved"), or each of them ("half").
MOST_HEADS = 999


def tables(
    freqs: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, layout: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The cosine and sine for every element of a head, fp32 [1 or B, S, 1 or H, Dh]; None without a rotation."""
    if freqs is not None:
        cos, sin = (_doubled(t, layout) for t in freqs.unbind(-1))
    if cos is None or sin is None:
        return None
    if freqs is None and cos.dim() == 4:  # for each head
        return cos.float(), sin.float()
    cos, sin = (t.float().unsqueeze(-2) for t in (cos, sin))
    return (cos, sin) if cos.dim() == 4 else (cos.unsqueeze(0), sin.unsqueeze(0))


def _doubled(t: torch.Tensor, layout: str) -> torch.Tensor:
    """Expand one number per pair [..., Dh/2] to one per element [..., Dh]."""
    return torch.stack((t, t), -1).flatten(-2) if layout == "interleaved" else torch.cat((t, t), -1)


def rotate(y: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], layout: str, out: torch.Tensor) -> None:
    """Rotate y [B, S, H, Dh], in fp32, by the result of `tables`, and write it to `out` of the same shape."""
    cos, sin = rotation
    operator = fused("npu_rotary_mul")
    if operator is not None and _fits(y, cos, layout):
        out.copy_(operator(y.contiguous(), cos, sin, "interleave" if layout == "interleaved" else "half"))
        return
    apart, pair = ((-1, 2), -1) if layout == "interleaved" else ((2, -1), -2)
    a, b = y.unflatten(-1, apart).unbind(pair)
    out.copy_((y * cos).addcmul_(torch.stack((-b, a), pair).flatten(-2), sin))


def _fits(y: torch.Tensor, cos: torch.Tensor, layout: str) -> bool:
    """Whether `npu_rotary_mul` supports these, by its documentation, which does not list all product differences."""
    B, _, H, _ = y.shape
    if not y.numel() or describe(y.device).arch.startswith("Ascend310"):  # supports only few sizes, and only "half"
        return False
    if cos.shape[2] != 1:  # the documentation has tables that all heads share
        return False
    if layout == "interleaved":
        return B * H <= MOST_HEADS and cos.shape[0] == 1
    return B <= MOST_HEADS and H <= MOST_HEADS
