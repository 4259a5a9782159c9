"""rms_norm: RMSNorm over the last dimension of any tensor, such as hidden states or heads.

    y = x / √(mean(x²) + eps) · weight        x, y: [..., D]      weight: [D]

Zhang & Sennrich 2019, arXiv:1910.07467. Moves the bytes of x, of the weight and of y once.
"""

from __future__ import annotations

from typing import Any

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _chunks, _norms, _quantized, _samples, _tiles
from omni_kernels.ops._checks import DTYPES, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# Elements per tile, at least one row: 32 heads of 128 channels, 40 registers on sm_90.
TILE = 4096


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    quantize: torch.dtype | None = None,
    beside: bool = False,
) -> torch.Tensor | Any:
    """x / √(mean(x²) + eps) · weight, computed in fp32 and rounded once.

    Args:
        x: [..., D], fp32, fp16 or bf16, any strides. Contiguous rows are read in place if the leading dimensions can
            be merged into at most three strides, which [B, S, H, D] can in any order.
        weight: [D], or None. Its dtype may differ from x's.
        eps: added to the mean square.
        quantize: a dtype that `omni_kernels.ops.quantize` takes: return y in 8 bits, as that op does.
        beside: whether to return y in x's dtype as well.

    Returns:
        y: contiguous, in x's shape and dtype. Infinities and NaN affect only their own row.
        With `quantize` (q, scale) or, with `beside`, (q, scale, y): q in y's shape, scale fp32 [...].

    Raises:
        ValueError: the weight's shape does not fit, devices differ, a dtype is not allowed, or x has no dimensions.
    """
    if not x.shape:
        raise ValueError("rms_norm: x has no dimensions; it is normalised over the last one")
    if x.dtype not in DTYPES:
        raise unlike("rms_norm", x=x)
    _norms.check_vectors("rms_norm", "x", x, weight=weight)
    _quantized.check("rms_norm", x, quantize, beside)
    return _op(x, weight, eps, quantize, beside)


def reference(x, weight, eps, quantize, beside):
    """In plain torch."""
    return _quantized.finished(_norms.normed(x.float(), "rms", eps, weight), x, quantize, beside)


def on_npu(x, weight, eps, quantize, beside):
    """With torch_npu's operator, which needs x and weight in one dtype."""
    alike = quantize is None and (weight is None or weight.dtype == x.dtype)
    return _quantized.finished(_norms.normed_on_npu(x if alike else x.float(), "rms", eps, weight), x, quantize, beside)


@triton.jit(do_not_specialize=["n1", "n2", "tiles", "eps"])
def rms_norm_kernel(
    p_x, p_weight, p_y, p_q, p_q_scale, n1, n2, stride_0, stride_1, stride_2, eps, tiles,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program processes one tile of ROWS rows. Writes y, y in 8 bits, or both.

    The rows are indexed by three levels with strides stride_0 to stride_2. The middle and innermost have sizes n1, n2.
    """
    pid = tl.program_id(0)
    outer = pid // tiles
    o_r = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_r = o_r < n2
    p_x += (outer // n1).to(tl.int64) * stride_0 + (outer % n1).to(tl.int64) * stride_1
    x = _chunks.load_rows(p_x, o_r * stride_2, m_r, D, CHUNKS, BLOCK)
    b_weight = _chunks.load_vector(p_weight, D, CHUNKS, BLOCK)
    y = _norms.norm_rows(_chunks.in_fp32(x, CHUNKS), eps, D, CHUNKS, BLOCK, False)
    y = _norms.modulate_rows(y, b_weight, None, None, None, CHUNKS)
    o_out = outer.to(tl.int64) * n2 + o_r
    if p_y is not None:
        _chunks.store_rows(p_y, o_out * D, y, m_r, D, CHUNKS, BLOCK)
    if p_q is not None:
        _quantized.store_quantized(p_q, p_q_scale, o_out * D, o_out, y, m_r, D, CHUNKS, BLOCK)


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


def launch(x, weight, eps, quantize, beside):
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    D = x.shape[-1]
    limits.whole_row("rms_norm", x, D, _norms.MAX_TRITON_CHANNELS)
    _quantized.check_device("rms_norm", x, quantize)
    y, q, q_scale = _quantized.empty(x, quantize, beside)
    if x.numel() == 0:
        return _quantized.returned(y, q, None if q_scale is None else q_scale.zero_())
    x, ((n0, stride_0), (n1, stride_1), (n2, stride_2)) = levels(x)
    rows, chunks, block, num_warps = _chunks.cut(x, n2, _tiles.tile("rms_norm", x, TILE), weight)
    num_warps *= 2 if chunks == 5 else 1  # otherwise, two registers spill on sm_100 if y is also written in 8 bits
    tiles = triton.cdiv(n2, rows)
    with _samples.on_device_of(x):
        rms_norm_kernel[limits.grid(x, n0 * n1 * tiles)](
            x, _norms.vector(weight), y, q, q_scale, n1, n2, stride_0, stride_1, stride_2, eps, tiles,
            D=D, ROWS=rows, CHUNKS=chunks, BLOCK=block, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return _quantized.returned(y, q, q_scale)


def fake(x, weight, eps, quantize, beside):
    """The outputs' shapes and dtypes."""
    return _quantized.returned(*_quantized.empty(x, quantize, beside))


_op = define(rms_norm, reference, launch, fake=fake, npu=on_npu)
