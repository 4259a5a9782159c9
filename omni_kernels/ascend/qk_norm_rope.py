"""qk_norm_rope in real numbers, which NPUs compute natively: by `npu_rms_norm` and `npu_rotary_mul`, in fp32.

rotate: x·cos + x'·sin        x' = (−b, a) for every pair (a, b) of x; cos and sin: [1 or B, S, 1, Dh]
"""

from __future__ import annotations

import torch

from omni_kernels.ascend.operators import fused
from omni_kernels.ascend.rms_norm import normed
from omni_kernels.device import describe

#: Samples times heads ("interleaved"), or either of them ("half"), that `npu_rotary_mul` takes.
MOST_HEADS = 999


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    freqs: torch.Tensor | None = None,
    layout: str = "interleaved",
    across_heads: bool = False,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """See `omni_kernels.ops.qk_norm_rope`."""
    if freqs is not None:
        cos, sin = (_doubled(t, layout) for t in freqs.unbind(-1))
    rotation = None if cos is None or sin is None else (cos.float().unsqueeze(-2), sin.float().unsqueeze(-2))
    for x, weight, out in ((q, q_weight, q_out), (k, k_weight, k_out)):
        y = x.float()
        if weight is not None:
            y = normed(y.flatten(2) if across_heads else y, "rms", eps, weight).view(x.shape)
        out.copy_(y if rotation is None else rotated(y, rotation, layout))
    if v is not None and v_out is not None:
        v_out.copy_(v)


def _doubled(t: torch.Tensor, layout: str) -> torch.Tensor:
    """A number per pair [..., Dh/2] as one per element."""
    return torch.stack((t, t), -1).flatten(-2) if layout == "interleaved" else torch.cat((t, t), -1)


def rotated(y: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], layout: str) -> torch.Tensor:
    """y [B, S, H, Dh] in fp32, rotated by cosines and sines [S, 1, Dh] or [1 or B, S, 1, Dh]."""
    cos, sin = (t if t.dim() == 4 else t.unsqueeze(0) for t in rotation)
    operator = fused("npu_rotary_mul")
    if operator is not None and _fits(y, cos, layout):
        out: torch.Tensor = operator(y.contiguous(), cos, sin, "interleave" if layout == "interleaved" else "half")
        return out
    apart, pair = ((-1, 2), -1) if layout == "interleaved" else ((2, -1), -2)
    a, b = y.unflatten(-1, apart).unbind(pair)
    return (y * cos).addcmul_(torch.stack((-b, a), pair).flatten(-2), sin)


def _fits(y: torch.Tensor, cos: torch.Tensor, layout: str) -> bool:
    """Whether `npu_rotary_mul` takes these, by its documentation; what differs between products it does not say."""
    B, _, H, _ = y.shape
    if not y.numel() or describe(y.device).arch.startswith("Ascend310"):  # which rotates few sizes, and halves alone
        return False
    if layout == "interleaved":
        return B * H <= MOST_HEADS and cos.shape[0] == 1
    return B <= MOST_HEADS and H <= MOST_HEADS
