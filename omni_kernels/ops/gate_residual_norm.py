"""gate_residual_norm: gate, residual and the next norm, between two parts of a block, in one pass.

    h = residual + g(gate) · N(x)                              g: identity or tanh
    y = (norm(h) · weight + bias) · (1 + scale) + shift        N: identity, or RMSNorm with x_weight
                                                               residual, x, h, y: [B, S, D]

AdaLN-Zero (Peebles & Xie 2022, arXiv:2212.09748); x is the output of attention or the feed-forward. Qwen-Image, FLUX
and Wan use the gate as it is. Z-Image uses its tanh, and normalises x first. y is computed from the stored h, rounded
to its dtype, so it equals `ada_layer_norm(h, scale, shift)`. Moves the bytes of its inputs, of h and of y once.
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

# Elements per tile, at least one row: on sm_90, 48 registers, or 63 with Z-Image's RMSNorm and tanh. Rows of 3072
# channels in three chunks: 64, but half as many threads.
TILE = 4096
# Longer rows, with all inputs in fp32, do not fit in a program's registers.
MAX_TRITON_CHANNELS = 8192
# From this magnitude on, tanh is computed with one exponential. Below, five terms of its series are used; the sixth
# would be 9e-9 of the value.
SERIES = tl.constexpr(0.25)


def gate_residual_norm(
    residual: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    index: torch.Tensor | None = None,
    gate_tanh: bool = False,
    x_weight: torch.Tensor | None = None,
    x_eps: float = 1e-6,
    norm: str | None = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    quantize: torch.dtype | None = None,
    beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None] | Any:
    """h = residual + g(gate)·N(x) and y = (norm(h)·weight + bias)·(1 + scale) + shift, computed in fp32.

    Args:
        residual: [B, S, D], fp32, fp16 or bf16, any strides.
        x: like residual; the dtype may differ.
        gate: [B, D], [B, 1, D] or, per token, [B, S, D]; a batch size of 1 is broadcast. Its dtype may differ. A view
            with contiguous rows, such as a chunk of a projection, is read in place. None means 1.
        scale: like gate; None: no scale.
        shift: like gate; None adds nothing.
        index: [B, S], bool or integer. With it, gate, scale and shift are [2B, D], and token (b, s) takes row b where
            index is 0 and row B + b elsewhere.
        gate_tanh: whether to use tanh(gate) instead of the gate.
        x_weight: [D]. With it, x is normalised before the gate: x / √(mean(x²) + x_eps) · x_weight. None: x is used as
            it is.
        x_eps: added to that mean square.
        norm: "layer" (subtract the mean, divide by the standard deviation), "rms" (divide by the root mean square) or
            None (only h is computed).
        weight: [D], the norm's weight, or None.
        bias: [D], the norm's bias, or None.
        eps: added to the variance or the mean square.
        quantize: a dtype that `omni_kernels.ops.quantize` takes: return y in 8 bits, as that op does. Needs a norm.
        beside: whether to return y in residual's dtype as well.

    Returns:
        h: contiguous, in residual's shape and dtype.
        y: like h, computed from the rounded h; None without a norm. Infinities and NaN affect only their own token.
        With `quantize` (h, q, scale) or, with `beside`, (h, q, scale, y): q in y's shape, scale fp32 [B, S].

    Raises:
        ValueError: a shape does not fit, devices differ, a dtype is not allowed, the norm is unknown, or a scale,
            shift, weight, bias or quantize is given without a norm.
    """
    op = "gate_residual_norm"
    if residual.dim() != 3:
        raise ValueError(f"{op}: residual has shape {[*residual.shape]}; it must be [B, S, D]")
    if not alike(residual, x):
        raise unlike(op, residual=residual, x=x)
    _norms.check_norm(op, norm, (*_norms.NORMS, None))
    if norm is None:
        named = {"scale": scale, "shift": shift, "weight": weight, "bias": bias, "quantize": quantize}
        for name, given in named.items():
            if given is not None:
                raise ValueError(
                    f"{op}: {name} is given, and norm is None; without a norm there is nothing to apply it to"
                )
    _norms.check_modulation(op, "residual", residual, index, gate=gate, scale=scale, shift=shift)
    _norms.check_vectors(op, "residual", residual, x_weight=x_weight, weight=weight, bias=bias)
    _quantized.check(op, residual, quantize, beside)
    return _op(
        residual, x, gate, scale, shift, index, gate_tanh, x_weight, x_eps, norm, weight, bias, eps, quantize, beside
    )


def reference(
    residual, x, gate, scale, shift, index, gate_tanh, x_weight, x_eps, norm, weight, bias, eps, quantize, beside,
    *, normed=_norms.normed,
):  # fmt: skip
    """In plain torch. `normed` computes the norms."""
    h = x.float() if x_weight is None else normed(x.float(), "rms", x_eps, x_weight)
    if gate is None:
        h = residual + h
    else:
        g = _norms.selected(gate, index).float()
        h = torch.addcmul(residual.float(), g.tanh() if gate_tanh else g, h)
    h = h.to(residual.dtype).contiguous()
    if norm is None:
        return h, None
    y = _norms.modulate(normed(h.float(), norm, eps, weight, bias), scale, shift, index)
    return _with(h, _quantized.finished(y, h, quantize, beside))


def _with(h, made):
    """h, and what `_quantized.returned` returned."""
    return (h, *made) if isinstance(made, tuple) else (h, made)


@triton.jit
def _tanh(v):
    """tanh, accurate to a few units in the last place. For small v, where the quotient cancels, it uses a series."""
    magnitude = tl.abs(v)
    power = tl.exp(-2.0 * magnitude)
    quotient = (1.0 - power) / (1.0 + power)
    square = v * v
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(magnitude < SERIES, v * series, tl.where(v < 0.0, -quotient, quotient))


@triton.jit(do_not_specialize=["samples", "tokens", "tiles", "x_eps", "eps"])
def gate_residual_norm_kernel(
    p_residual, p_x, p_gate, p_scale, p_shift, p_index, p_x_weight, p_weight, p_bias, p_h, p_y, p_q, p_q_scale,
    samples, tokens, residual_sample, residual_token, x_sample, x_token, gate_sample, gate_token, scale_sample,
    scale_token, shift_sample, shift_token, index_sample, index_token, x_eps, eps, tiles,
    D: tl.constexpr, TANH: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """A program processes one tile of ROWS tokens of one sample. Writes h, and y, y in 8 bits, both or neither."""
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    first = (pid % tiles).to(tl.int64) * ROWS
    o_s = first + tl.arange(0, ROWS)[:, None]
    m_s = o_s < tokens
    x = _chunks.load_rows(p_x, sample * x_sample + o_s * x_token, m_s, D, CHUNKS, BLOCK)
    b_residual = _chunks.load_rows(p_residual, sample * residual_sample + o_s * residual_token, m_s, D, CHUNKS, BLOCK)
    row = _norms.row_of(p_index, sample, samples, index_sample, first if ONE else o_s, index_token, tokens)
    b_gate = _chunks.load_rows(p_gate, row * gate_sample + o_s * gate_token, m_s, D, CHUNKS, BLOCK)
    b_x_weight = _chunks.load_vector(p_x_weight, D, CHUNKS, BLOCK)
    x = _chunks.in_fp32(x, CHUNKS)
    if p_x_weight is not None:
        x = _norms.norm_rows(x, x_eps, D, CHUNKS, BLOCK, False)
    h = ()
    for c in tl.static_range(CHUNKS):
        added = x[c]
        if p_x_weight is not None:
            added *= b_x_weight[c].to(tl.float32)
        if p_gate is not None:
            gate = b_gate[c].to(tl.float32)
            added *= _tanh(gate) if TANH else gate
        h += ((b_residual[c].to(tl.float32) + added).to(p_h.dtype.element_ty),)
    o_out = sample * tokens + o_s
    _chunks.store_rows(p_h, o_out * D, h, m_s, D, CHUNKS, BLOCK)
    if p_y is not None or p_q is not None:
        # Loaded here, in their own dtype, so that these loads overlap with the row's reduction.
        b_scale = _chunks.load_rows(p_scale, row * scale_sample + o_s * scale_token, m_s, D, CHUNKS, BLOCK)
        b_shift = _chunks.load_rows(p_shift, row * shift_sample + o_s * shift_token, m_s, D, CHUNKS, BLOCK)
        b_weight = _chunks.load_vector(p_weight, D, CHUNKS, BLOCK)
        b_bias = _chunks.load_vector(p_bias, D, CHUNKS, BLOCK)
        y = _norms.norm_rows(_chunks.in_fp32(h, CHUNKS), eps, D, CHUNKS, BLOCK, LAYER)
        y = _norms.modulate_rows(y, b_weight, b_bias, b_scale, b_shift, CHUNKS)
        if p_y is not None:
            _chunks.store_rows(p_y, o_out * D, y, m_s, D, CHUNKS, BLOCK)
        if p_q is not None:
            _quantized.store_quantized(p_q, p_q_scale, o_out * D, o_out, y, m_s, D, CHUNKS, BLOCK)


def launch(
    residual, x, gate, scale, shift, index, gate_tanh, x_weight, x_eps, norm, weight, bias, eps, quantize, beside
):  # fmt: skip
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    B, S, D = residual.shape
    limits.whole_row("gate_residual_norm", residual, D, MAX_TRITON_CHANNELS)
    _quantized.check_device("gate_residual_norm", residual, quantize)
    h = residual.new_empty((B, S, D))
    y, q, q_scale = (None, None, None) if norm is None else _quantized.empty(residual, quantize, beside)
    if h.numel() == 0:
        return _with(h, _quantized.returned(y, q, None if q_scale is None else q_scale.zero_()))
    residual, x = _norms.rows(residual), _norms.rows(x)
    gate, scale, shift = (_norms.modulation_rows(t) for t in (gate, scale, shift))
    x_weight, weight, bias = (_norms.vector(t) for t in (x_weight, weight, bias))
    tile = 1 if limits.here(residual) else _tiles.tile("gate_residual_norm", residual, TILE)
    rows, chunks, block, num_warps = _chunks.cut(
        residual, S, tile, x, gate, scale, shift, x_weight, weight, bias
    )  # fmt: skip
    tiles = triton.cdiv(S, rows)
    with _samples.on_device_of(residual):
        gate_residual_norm_kernel[limits.grid(residual, B * tiles)](
            residual, x, gate, scale, shift, index, x_weight, weight, bias, h, y, q, q_scale, B, S,
            *_norms.strides(residual), *_norms.strides(x), *_norms.strides(gate), *_norms.strides(scale),
            *_norms.strides(shift), *_norms.strides(index), x_eps, eps, tiles,
            D=D, TANH=gate_tanh, LAYER=norm == "layer", ROWS=rows, CHUNKS=chunks, BLOCK=block,
            ONE=limits.here(residual), num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return _with(h, _quantized.returned(y, q, q_scale))


def fake(
    residual, x, gate, scale, shift, index, gate_tanh, x_weight, x_eps, norm, weight, bias, eps, quantize, beside
):  # fmt: skip
    """The outputs' shapes and dtypes."""
    made = None if norm is None else _quantized.returned(*_quantized.empty(residual, quantize, beside))
    return _with(residual.new_empty(residual.shape), made)


on_npu = partial(reference, normed=_norms.normed_on_npu)
_op = define(gate_residual_norm, reference, launch, fake=fake, npu=on_npu)
