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

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _norms, _samples, _tiles
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# Elements per tile, at least one row: on sm_90, 48 registers, or 63 with Z-Image's RMSNorm and tanh.
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
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

    Returns:
        h: contiguous, in residual's shape and dtype.
        y: like h, computed from the rounded h; None without a norm. Infinities and NaN affect only their own token.

    Raises:
        ValueError: a shape does not fit, devices differ, a dtype is not allowed, the norm is unknown, or a scale,
            shift, weight or bias is given without a norm.
    """
    op = "gate_residual_norm"
    if residual.dim() != 3:
        raise ValueError(f"{op}: residual has shape {[*residual.shape]}; it must be [B, S, D]")
    if not alike(residual, x):
        raise unlike(op, residual=residual, x=x)
    _norms.check_norm(op, norm, (*_norms.NORMS, None))
    if norm is None:
        for name, t in (("scale", scale), ("shift", shift), ("weight", weight), ("bias", bias)):
            if t is not None:
                raise ValueError(
                    f"{op}: {name} is given, and norm is None; without a norm there is nothing to apply it to"
                )
    _norms.check_modulation(op, "residual", residual, index, gate=gate, scale=scale, shift=shift)
    _norms.check_vectors(op, "residual", residual, x_weight=x_weight, weight=weight, bias=bias)
    return _op(residual, x, gate, scale, shift, index, gate_tanh, x_weight, x_eps, norm, weight, bias, eps)


def reference(
    residual, x, gate, scale, shift, index, gate_tanh, x_weight, x_eps, norm, weight, bias, eps,
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
    return h, y.to(h.dtype).contiguous()


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
    p_residual, p_x, p_gate, p_scale, p_shift, p_index, p_x_weight, p_weight, p_bias, p_h, p_y, samples, tokens,
    residual_sample, residual_token, x_sample, x_token, gate_sample, gate_token, scale_sample, scale_token,
    shift_sample, shift_token, index_sample, index_token, x_eps, eps, tiles,
    D: tl.constexpr, TANH: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """A program processes one tile of ROWS tokens of one sample. Without p_y it writes only h."""
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    first = (pid % tiles).to(tl.int64) * ROWS
    o_s = first + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, BLOCK)[None, :]
    m_d = o_d < D
    m = (o_s < tokens) & m_d
    x = tl.load(p_x + sample * x_sample + o_s * x_token + o_d, mask=m, other=0.0).to(tl.float32)
    b_residual = tl.load(p_residual + sample * residual_sample + o_s * residual_token + o_d, mask=m, other=0.0)
    row = _norms.row_of(p_index, sample, samples, index_sample, first if ONE else o_s, index_token, tokens)
    if p_gate is not None:
        b_gate = tl.load(p_gate + row * gate_sample + o_s * gate_token + o_d, mask=m, other=0.0)
    if p_x_weight is not None:
        b_x_weight = tl.load(p_x_weight + o_d, mask=m_d, other=0.0)
    if p_x_weight is not None:
        x = _norms.norm_rows(x, m_d, x_eps, D, False) * b_x_weight.to(tl.float32)
    if p_gate is not None:
        gate = b_gate.to(tl.float32)
        x *= _tanh(gate) if TANH else gate
    b_h = (b_residual.to(tl.float32) + x).to(p_h.dtype.element_ty)
    o_out = (sample * tokens + o_s) * D + o_d
    tl.store(p_h + o_out, b_h, mask=m)
    if p_y is not None:
        # Loaded here, in their own dtype, so that these loads overlap with the row's reduction.
        b_scale, b_shift, b_weight, b_bias = None, None, None, None
        if p_scale is not None:
            b_scale = tl.load(p_scale + row * scale_sample + o_s * scale_token + o_d, mask=m, other=0.0)
        if p_shift is not None:
            b_shift = tl.load(p_shift + row * shift_sample + o_s * shift_token + o_d, mask=m, other=0.0)
        if p_weight is not None:
            b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
        if p_bias is not None:
            b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
        y = _norms.norm_rows(b_h.to(tl.float32), m_d, eps, D, LAYER)
        y = _norms.modulate_rows(y, b_weight, b_bias, b_scale, b_shift)
        tl.store(p_y + o_out, y.to(p_y.dtype.element_ty), mask=m)


def launch(residual, x, gate, scale, shift, index, gate_tanh, x_weight, x_eps, norm, weight, bias, eps):
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    B, S, D = residual.shape
    limits.whole_row("gate_residual_norm", residual, D, MAX_TRITON_CHANNELS)
    h = residual.new_empty((B, S, D))
    y = None if norm is None else residual.new_empty((B, S, D))
    if h.numel() == 0:
        return h, y
    residual, x = _norms.rows(residual), _norms.rows(x)
    gate, scale, shift = (_norms.modulation_rows(t) for t in (gate, scale, shift))
    x_weight, weight, bias = (_norms.vector(t) for t in (x_weight, weight, bias))
    tile = 1 if limits.here(residual) else _tiles.tile("gate_residual_norm", residual, TILE)
    rows, block, num_warps = _norms.cut(S, D, tile)
    tiles = triton.cdiv(S, rows)
    with _samples.on_device_of(residual):
        gate_residual_norm_kernel[limits.grid(residual, B * tiles)](
            residual, x, gate, scale, shift, index, x_weight, weight, bias, h, y, B, S, *_norms.strides(residual),
            *_norms.strides(x), *_norms.strides(gate), *_norms.strides(scale), *_norms.strides(shift),
            *_norms.strides(index), x_eps, eps, tiles,
            D=D, TANH=gate_tanh, LAYER=norm == "layer", ROWS=rows, BLOCK=block, ONE=limits.here(residual),
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return h, y


def fake(residual, x, gate, scale, shift, index, gate_tanh, x_weight, x_eps, norm, weight, bias, eps):
    """The outputs' shapes and dtypes."""
    return residual.new_empty(residual.shape), None if norm is None else residual.new_empty(residual.shape)


on_npu = partial(reference, normed=_norms.normed_on_npu)
_op = define(gate_residual_norm, reference, launch, fake=fake, npu=on_npu)
