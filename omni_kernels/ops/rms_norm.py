"""rms_norm: RMSNorm over the last dimension of any tensor, such as hidden states or heads.

    y = x / √(mean(x²) + eps) · weight        x, y: [..., D]      weight: [D]

Zhang & Sennrich 2019, arXiv:1910.07467. Moves the bytes of x, of the weight and of y once.
"""

from __future__ import annotations

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _norms, _samples, _tiles
from omni_kernels.ops._checks import DTYPES, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# Elements per tile, at least one row: 32 heads of 128 channels, 40 registers on sm_90.
TILE = 4096


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-6) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight, computed in fp32 and rounded once.

    Args:
        x: [..., D], fp32, fp16 or bf16, any strides. Contiguous rows are read in place if the leading dimensions can
            be merged into at most three strides, which [B, S, H, D] can in any order.
        weight: [D], or None. Its dtype may differ from x's.
        eps: added to the mean square.

    Returns:
        y: contiguous, in x's shape and dtype. Infinities and NaN affect only their own row.

    Raises:
        ValueError: the weight's shape does not fit, devices differ, a dtype is not allowed, or x has no dimensions.
    """
    if not x.shape:
        raise ValueError("rms_norm: x has no dimensions; it is normalised over the last one")
    if x.dtype not in DTYPES:
        raise unlike("rms_norm", x=x)
    _norms.check_vectors("rms_norm", "x", x, weight=weight)
    return _op(x, weight, eps)


def reference(x, weight, eps):
    """In plain torch."""
    return _norms.normed(x.float(), "rms", eps, weight).to(x.dtype).contiguous()


def on_npu(x, weight, eps):
    """With torch_npu's operator, which needs x and weight in one dtype."""
    y = x if weight is None or weight.dtype == x.dtype else x.float()
    return _norms.normed_on_npu(y, "rms", eps, weight).to(x.dtype).contiguous()


@triton.jit(do_not_specialize=["n1", "n2", "tiles", "eps"])
def rms_norm_kernel(
    p_x, p_weight, p_y, n1, n2, stride_0, stride_1, stride_2, eps, tiles,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program processes one tile of ROWS rows.

    The rows are indexed by three levels with strides stride_0 to stride_2. The middle and innermost have sizes n1, n2.
    """
    pid = tl.program_id(0)
    outer = pid // tiles
    o_r = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, BLOCK)[None, :]
    m_d = o_d < D
    m = (o_r < n2) & m_d
    p_x += (outer // n1).to(tl.int64) * stride_0 + (outer % n1).to(tl.int64) * stride_1
    x = tl.load(p_x + o_r * stride_2 + o_d, mask=m, other=0.0).to(tl.float32)
    b_weight = None
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    y = _norms.modulate_rows(_norms.norm_rows(x, m_d, eps, D, False), b_weight, None, None, None)
    tl.store(p_y + (outer.to(tl.int64) * n2 + o_r) * D + o_d, y.to(p_y.dtype.element_ty), mask=m)


def levels(x: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """x with contiguous rows, and the size and stride of the three levels of its rows, outermost first.

    Dimensions that can be merged are one level. An x with more levels is copied.
    """
    x = _norms.rows(x)
    found: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = found[-1][0] * size, stride
        else:
            found.append((size, stride))
    return levels(x.contiguous()) if len(found) > 3 else (x, [(1, 0)] * (3 - len(found)) + found)


def launch(x, weight, eps):
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    D = x.shape[-1]
    limits.whole_row("rms_norm", x, D, _norms.MAX_TRITON_CHANNELS)
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    x, ((n0, stride_0), (n1, stride_1), (n2, stride_2)) = levels(x)
    rows, block, num_warps = _norms.cut(n2, D, _tiles.tile("rms_norm", x, TILE))
    tiles = triton.cdiv(n2, rows)
    with _samples.on_device_of(x):
        rms_norm_kernel[limits.grid(x, n0 * n1 * tiles)](
            x, _norms.vector(weight), y, n1, n2, stride_0, stride_1, stride_2, eps, tiles,
            D=D, ROWS=rows, BLOCK=block, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y


_op = define(rms_norm, reference, launch, npu=on_npu)
