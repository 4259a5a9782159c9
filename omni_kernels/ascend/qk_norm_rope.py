"""qk_norm_rope in real numbers, which NPUs compute natively: by `npu_rms_norm` and `npu_rotary_mul`, in fp32.

rotate: x·cos + x'·sin        x' = (−b, a) for every pair (a, b) of x; cos and sin: [1 or B, S, 1, Dh]
"""

from __future__ import annotations

import torch

from omni_kernels.ascend.operators import fused
from omni_kernels.device import describe

#: Samples times heads ("interleaved"), or either of them ("half"), that `npu_rotary_mul` takes.
MOST_HEADS = 999


def tables(
    freqs: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, layout: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The cosine and the sine for every element of a head, fp32 [1 or B, S, 1, Dh]; None: nothing is rotated."""
    if freqs is not None:
        cos, sin = (_doubled(t, layout) for t in freqs.unbind(-1))
    if cos is None or sin is None:
        return None
    cos, sin = (t.float().unsqueeze(-2) for t in (cos, sin))
    return (cos, sin) if cos.dim() == 4 else (cos.unsqueeze(0), sin.unsqueeze(0))


def _doubled(t: torch.Tensor, layout: str) -> torch.Tensor:
    """A number per pair [..., Dh/2] as one per element."""
    return torch.stack((t, t), -1).flatten(-2) if layout == "interleaved" else torch.cat((t, t), -1)


def rotate(y: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], layout: str, out: torch.Tensor) -> None:
    """Write y [B, S, H, Dh] in fp32, rotated by what `tables` made, to `out`, of the same shape."""
    cos, sin = rotation
    operator = fused("npu_rotary_mul")
    if operator is not None and _fits(y, cos, layout):
        out.copy_(operator(y.contiguous(), cos, sin, "interleave" if layout == "interleaved" else "half"))
        return
    apart, pair = ((-1, 2), -1) if layout == "interleaved" else ((2, -1), -2)
    a, b = y.unflatten(-1, apart).unbind(pair)
    out.copy_((y * cos).addcmul_(torch.stack((-b, a), pair).flatten(-2), sin))


def _fits(y: torch.Tensor, cos: torch.Tensor, layout: str) -> bool:
    """Whether `npu_rotary_mul` takes these, by its documentation; what differs between products it does not say."""
    B, _, H, _ = y.shape
    if not y.numel() or describe(y.device).arch.startswith("Ascend310"):  # which rotates few sizes, and halves alone
        return False
    if layout == "interleaved":
        return B * H <= MOST_HEADS and cos.shape[0] == 1
    return B <= MOST_HEADS and H <= MOST_HEADS
