"""ada_layer_norm: the normalised, modulated input of a block's attention or feed-forward, in one pass.

    y = (norm(x) · weight + bias) · (1 + scale) + shift        norm: LayerNorm or RMSNorm over the last dimension
                                                               x, y: [B, S, D]

AdaLN (Peebles & Xie 2022, arXiv:2212.09748) as in Qwen-Image, FLUX and Wan. Z-Image has RMSNorm and no shift.
Qwen-Image-Edit-2511 has two rows of modulation per sample, and `index` selects one for each token. Moves the bytes of
its inputs and of y once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _chunks, _norms, _quantized, _samples, _tiles
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# Elements per tile, at least one row: on sm_90, 47 registers, or 64 with an fp32 modulation per token. Rows of 3072
# channels in three chunks: 63, but half as many threads.
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
    quantize: torch.dtype | None = None,
    beside: bool = False,
) -> torch.Tensor | Any:
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
        quantize: a dtype that `omni_kernels.ops.quantize` takes: return y in 8 bits, as that op does.
        beside: whether to return y in x's dtype as well.

    Returns:
        y: contiguous, in x's shape and dtype. Infinities and NaN affect only their own token.
        With `quantize` (q, scale) or, with `beside`, (q, scale, y): q in y's shape, scale fp32 [B, S].

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
    _quantized.check("ada_layer_norm", x, quantize, beside)
    return _op(x, scale, shift, index, norm, weight, bias, eps, quantize, beside)


def reference(x, scale, shift, index, norm, weight, bias, eps, quantize, beside, *, normed=_norms.normed):
    """In plain torch. `normed` computes the norm."""
    y = _norms.modulate(normed(x.float(), norm, eps, weight, bias), scale, shift, index)
    return _quantized.finished(y, x, quantize, beside)


@triton.jit(do_not_specialize=["samples", "tokens", "tiles", "eps"])
def ada_layer_norm_kernel(
    p_x, p_scale, p_shift, p_index, p_weight, p_bias, p_y, p_q, p_q_scale, samples, tokens, x_sample, x_token,
    scale_sample, scale_token, shift_sample, shift_token, index_sample, index_token, eps, tiles,
    D: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """A program processes one tile of ROWS tokens of one sample. Writes y, y in 8 bits, or both."""
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    first = (pid % tiles).to(tl.int64) * ROWS
    o_s = first + tl.arange(0, ROWS)[:, None]
    m_s = o_s < tokens
    x = _chunks.load_rows(p_x, sample * x_sample + o_s * x_token, m_s, D, CHUNKS, BLOCK)
    # Loaded here, in their own dtype, so that these loads overlap with the row's reduction.
    row = _norms.row_of(p_index, sample, samples, index_sample, first if ONE else o_s, index_token, tokens)
    b_scale = _chunks.load_rows(p_scale, row * scale_sample + o_s * scale_token, m_s, D, CHUNKS, BLOCK)
    b_shift = _chunks.load_rows(p_shift, row * shift_sample + o_s * shift_token, m_s, D, CHUNKS, BLOCK)
    b_weight = _chunks.load_vector(p_weight, D, CHUNKS, BLOCK)
    b_bias = _chunks.load_vector(p_bias, D, CHUNKS, BLOCK)
    y = _norms.norm_rows(_chunks.in_fp32(x, CHUNKS), eps, D, CHUNKS, BLOCK, LAYER)
    y = _norms.modulate_rows(y, b_weight, b_bias, b_scale, b_shift, CHUNKS)
    o_out = sample * tokens + o_s
    if p_y is not None:
        _chunks.store_rows(p_y, o_out * D, y, m_s, D, CHUNKS, BLOCK)
    if p_q is not None:
        _quantized.store_quantized(p_q, p_q_scale, o_out * D, o_out, y, m_s, D, CHUNKS, BLOCK)


def launch(x, scale, shift, index, norm, weight, bias, eps, quantize, beside):
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    B, S, D = x.shape
    limits.whole_row("ada_layer_norm", x, D, MAX_TRITON_CHANNELS)
    _quantized.check_device("ada_layer_norm", x, quantize)
    y, q, q_scale = _quantized.empty(x, quantize, beside)
    if x.numel() == 0:
        return _quantized.returned(y, q, None if q_scale is None else q_scale.zero_())
    x, scale, shift = _norms.rows(x), _norms.modulation_rows(scale), _norms.modulation_rows(shift)
    tile = 1 if limits.here(x) else _tiles.tile("ada_layer_norm", x, TILE)
    rows, chunks, block, num_warps = _chunks.cut(x, S, tile, scale, shift, weight, bias)
    tiles = triton.cdiv(S, rows)
    with _samples.on_device_of(x):
        ada_layer_norm_kernel[limits.grid(x, B * tiles)](
            x, scale, shift, index, _norms.vector(weight), _norms.vector(bias), y, q, q_scale, B, S,
            *_norms.strides(x), *_norms.strides(scale), *_norms.strides(shift), *_norms.strides(index), eps, tiles,
            D=D, LAYER=norm == "layer", ROWS=rows, CHUNKS=chunks, BLOCK=block, ONE=limits.here(x),
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return _quantized.returned(y, q, q_scale)


def fake(x, scale, shift, index, norm, weight, bias, eps, quantize, beside):
    """The outputs' shapes and dtypes."""
    return _quantized.returned(*_quantized.empty(x, quantize, beside))


on_npu = partial(reference, normed=_norms.normed_on_npu)
_op = define(ada_layer_norm, reference, launch, fake=fake, npu=on_npu)
