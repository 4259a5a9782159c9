"""ada_layer_norm: the normalised, modulated input of a block's attention or feed-forward, in one pass.

    y = (norm(x) · weight + bias) · (1 + scale) + shift        norm: LayerNorm or RMSNorm over the last dimension
                                                               x, y: [B, S, D]

AdaLN (Peebles & Xie 2022, arXiv:2212.09748) as in Qwen-Image, FLUX and Wan. Z-Image has RMSNorm and no shift.
Qwen-Image-Edit-2511 has two rows of modulation per sample, and `index` selects one for each token. Moves the bytes of
its inputs and of y once.
"""

from __future__ import annotations

from functools import partial

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _norms, _samples, _tiles
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# Elements per tile, at least one row: on sm_90, 47 registers, or 64 with an fp32 modulation per token.
TILE = 4096
# Longer rows, with all inputs in fp32, do not fit in a program's registers.
MAX_TRITON_CHANNELS = 8192


def ada_layer_norm(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None = None,
    *,
    index: torch.Tensor | None = None,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """(norm(x)·weight + bias)·(1 + scale) + shift, computed in fp32 and rounded once.

    Args:
        x: [B, S, D], fp32, fp16 or bf16, any strides.
        scale: [B, D], [B, 1, D] or, per token, [B, S, D]; a batch size of 1 is broadcast. Its dtype may differ from
            x's. A view with contiguous rows, such as a chunk of a projection, is read in place. None: no scale.
        shift: like scale; None adds nothing.
        index: [B, S], bool or integer. With it, scale and shift are [2B, D], and token (b, s) takes row b where index
            is 0 and row B + b elsewhere.
        norm: "layer" (subtract the mean, divide by the standard deviation) or "rms" (divide by the root mean square).
        weight: [D], the norm's weight, or None.
        bias: [D], the norm's bias, or None.
        eps: added to the variance or the mean square.

    Returns:
        y: contiguous, in x's shape and dtype. Infinities and NaN affect only their own token.

    Raises:
        ValueError: a shape does not fit, devices differ, a dtype is not allowed, or the norm is unknown.
    """
    if x.dim() != 3:
        raise ValueError(f"ada_layer_norm: x has shape {[*x.shape]}; it must be [B, S, D]")
    if not alike(x):
        raise unlike("ada_layer_norm", x=x)
    _norms.check_norm("ada_layer_norm", norm)
    _norms.check_modulation("ada_layer_norm", "x", x, index, scale=scale, shift=shift)
    _norms.check_vectors("ada_layer_norm", "x", x, weight=weight, bias=bias)
    return _op(x, scale, shift, index, norm, weight, bias, eps)


def reference(x, scale, shift, index, norm, weight, bias, eps, *, normed=_norms.normed):
    """In plain torch. `normed` computes the norm."""
    y = _norms.modulate(normed(x.float(), norm, eps, weight, bias), scale, shift, index)
    return y.to(x.dtype).contiguous()


@triton.jit(do_not_specialize=["samples", "tokens", "tiles", "eps"])
def ada_layer_norm_kernel(
    p_x, p_scale, p_shift, p_index, p_weight, p_bias, p_y, samples, tokens, x_sample, x_token,
    scale_sample, scale_token, shift_sample, shift_token, index_sample, index_token, eps, tiles,
    D: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """A program processes one tile of ROWS tokens of one sample."""
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    first = (pid % tiles).to(tl.int64) * ROWS
    o_s = first + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, BLOCK)[None, :]
    m_d = o_d < D
    m = (o_s < tokens) & m_d
    x = tl.load(p_x + sample * x_sample + o_s * x_token + o_d, mask=m, other=0.0).to(tl.float32)
    # Loaded here, in their own dtype, so that these loads overlap with the row's reduction.
    row = _norms.row_of(p_index, sample, samples, index_sample, first if ONE else o_s, index_token, tokens)
    b_scale, b_shift, b_weight, b_bias = None, None, None, None
    if p_scale is not None:
        b_scale = tl.load(p_scale + row * scale_sample + o_s * scale_token + o_d, mask=m, other=0.0)
    if p_shift is not None:
        b_shift = tl.load(p_shift + row * shift_sample + o_s * shift_token + o_d, mask=m, other=0.0)
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    y = _norms.modulate_rows(_norms.norm_rows(x, m_d, eps, D, LAYER), b_weight, b_bias, b_scale, b_shift)
    tl.store(p_y + (sample * tokens + o_s) * D + o_d, y.to(p_y.dtype.element_ty), mask=m)


def launch(x, scale, shift, index, norm, weight, bias, eps):
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    B, S, D = x.shape
    limits.whole_row("ada_layer_norm", x, D, MAX_TRITON_CHANNELS)
    y = x.new_empty((B, S, D))
    if y.numel() == 0:
        return y
    x, scale, shift = _norms.rows(x), _norms.modulation_rows(scale), _norms.modulation_rows(shift)
    rows, block, num_warps = _norms.cut(S, D, 1 if limits.here(x) else _tiles.tile("ada_layer_norm", x, TILE))
    tiles = triton.cdiv(S, rows)
    with _samples.on_device_of(x):
        ada_layer_norm_kernel[limits.grid(x, B * tiles)](
            x, scale, shift, index, _norms.vector(weight), _norms.vector(bias), y, B, S, *_norms.strides(x),
            *_norms.strides(scale), *_norms.strides(shift), *_norms.strides(index), eps, tiles,
            D=D, LAYER=norm == "layer", ROWS=rows, BLOCK=block, ONE=limits.here(x), num_warps=num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return y


_op = define(ada_layer_norm, reference, launch, npu=partial(reference, normed=_norms.normed_on_npu))
