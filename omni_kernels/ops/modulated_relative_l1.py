"""modulated_relative_l1: a block's normalised, modulated input and its difference to an earlier step's, in one pass.

    m       = norm(h) · weight · (1 + scale) + shift        norm: LayerNorm or RMSNorm over the last dimension
    sums[b] = [Σ|m[b] − m_prev[b]|, Σ|m_prev[b]|]           h, m_prev: [B, S, D]      sums: fp32 [B, 2]

This is TeaCache's signal (Liu et al. 2024, arXiv:2411.19108): the modulated input of block 0. The sums use the returned
m, rounded to its dtype. Moves the bytes of its inputs and of m once.
"""

from __future__ import annotations

from functools import partial

import torch

from omni_kernels.ascend import limits
from omni_kernels.ops import _chunks, _norms, _samples
from omni_kernels.ops._checks import alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

# Elements per tile, at least one row: on sm_90, 79 registers and 36 KB of loads in flight per multiprocessor.
TILE = 4096
# Longer rows, with all inputs in fp32, do not fit in a program's registers.
MAX_TRITON_CHANNELS = 8192


def modulated_relative_l1(
    h: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    m_prev: torch.Tensor | None,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The modulated input m = norm(h)·weight·(1 + scale) + shift, and the sums per sample of |m − m_prev| and |m_prev|.

    Args:
        h: [B, S, D], fp32, fp16 or bf16, any strides.
        scale: [B, D], [B, 1, D] or, per token, [B, S, D]; a batch size of 1 is broadcast. Its dtype may differ from
            h's.
        shift: like scale; None adds nothing.
        m_prev: [B, S, D], the earlier m. With None, the sums are zeros.
        norm: "layer" (subtract the mean, divide by the standard deviation) or "rms" (divide by the root mean square).
        weight: [D], the norm's weight, or None.
        eps: added to the variance or the mean square.

    Returns:
        m: contiguous, in h's shape and dtype.
        sums: fp32 [B, 2]: [Σ|m − m_prev|, Σ|m_prev|]. Infinities and NaN propagate to the sums of their sample.

    Raises:
        ValueError: a shape does not fit, devices differ, a dtype is not allowed, or the norm is unknown.
    """
    if h.dim() != 3:
        raise ValueError(f"modulated_relative_l1: h has shape {[*h.shape]}; it must be [B, S, D]")
    if not alike(h, m_prev):
        raise unlike("modulated_relative_l1", h=h, m_prev=m_prev)
    _norms.check_norm("modulated_relative_l1", norm)
    _norms.check_modulation("modulated_relative_l1", "h", h, None, scale=scale, shift=shift)
    _norms.check_vectors("modulated_relative_l1", "h", h, weight=weight)
    return _op(h, scale, shift, m_prev, norm, weight, eps)


def reference(h, scale, shift, m_prev, norm, weight, eps, *, normed=_norms.normed):
    """In plain torch. `normed` computes the norm."""
    m = normed(h.float(), norm, eps)
    gain = _norms.per_token(scale).float() + 1.0
    if weight is not None:
        gain = gain * weight
    m = m.mul_(gain) if shift is None else torch.addcmul(_norms.per_token(shift).float(), m, gain)
    m = m.to(h.dtype).contiguous()
    if m_prev is None:
        return m, h.new_zeros((h.shape[0], 2), dtype=torch.float32)
    return m, _samples.abs_sums(torch.sub(m.float(), m_prev), m_prev)


@triton.jit(do_not_specialize=["tokens", "tiles", "programs", "eps"])
def modulated_relative_l1_kernel(
    p_h, p_scale, p_shift, p_weight, p_prev, p_m, p_partials, tokens, h_sample, h_token, scale_sample, scale_token,
    shift_sample, shift_token, prev_sample, prev_token, eps, tiles, programs,
    D: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program processes `tiles` tiles of ROWS tokens of one sample. Writes partials [B, 2, programs] if p_prev."""
    pid = tl.program_id(0)
    sample = (pid // programs).to(tl.int64)
    part = pid % programs
    p_h += sample * h_sample
    p_scale += sample * scale_sample
    p_m += sample * tokens * D
    if p_shift is not None:
        p_shift += sample * shift_sample
    if p_prev is not None:
        p_prev += sample * prev_sample
    difference = 0.0
    magnitude = 0.0
    for tile in range(tiles):
        o_s = (part.to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        m_s = o_s < tokens
        x = _chunks.load_rows(p_h, o_s * h_token, m_s, D, CHUNKS, BLOCK)
        # Loaded here, so that the load overlaps with the row's reduction.
        b_prev = _chunks.load_rows(p_prev, o_s * prev_token, m_s, D, CHUNKS, BLOCK)
        x = _norms.norm_rows(_chunks.in_fp32(x, CHUNKS), eps, D, CHUNKS, BLOCK, LAYER)
        for c in tl.static_range(CHUNKS):
            o_d = _chunks.columns(c, BLOCK)
            m = m_s & (o_d < D)
            # Scale and shift either are a few KB for all tokens of a sample and stay in the cache, or are read once.
            gain = 1.0 + tl.load(p_scale + o_s * scale_token + o_d, mask=m, other=0.0).to(tl.float32)
            if p_weight is not None:
                gain *= tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            y = x[c] * gain
            if p_shift is not None:
                y += tl.load(p_shift + o_s * shift_token + o_d, mask=m, other=0.0).to(tl.float32)
            b_m = y.to(p_m.dtype.element_ty)
            tl.store(p_m + o_s * D + o_d, b_m, mask=m)
            if p_prev is not None:
                previous = b_prev[c].to(tl.float32)
                # With eps = 0 the lanes outside hold 0 · ∞.
                difference += tl.sum(tl.where(m, tl.abs(b_m.to(tl.float32) - previous), 0.0))
                magnitude += tl.sum(tl.abs(previous))
    if p_prev is not None:
        p_partials += sample * 2 * programs + part
        tl.store(p_partials, difference)
        tl.store(p_partials + programs, magnitude)


def launch(h, scale, shift, m_prev, norm, weight, eps):
    """With the Triton kernel. Rows that are too long for it use the plain-torch implementation."""
    B, S, D = h.shape
    limits.whole_row("modulated_relative_l1", h, D, MAX_TRITON_CHANNELS)
    m = h.new_empty((B, S, D))
    sums = h.new_empty((B, 2), dtype=torch.float32)
    if m_prev is None or m.numel() == 0:
        sums.zero_()
    if m.numel() == 0:
        return m, sums
    h, scale, shift = _norms.rows(h), _norms.rows(_norms.per_token(scale)), _norms.modulation_rows(shift)
    m_prev = None if m_prev is None else _norms.rows(m_prev)
    rows, chunks, block, num_warps = _chunks.cut(h, S, 1 if limits.here(h) else TILE, scale, shift, m_prev, weight)
    if D > _chunks.MIN_CHUNK and not limits.here(h) and _chunks.widest(h, scale, shift, m_prev, weight) > 2:
        num_warps = min(2 * num_warps, _samples.warps(1024))  # with 16 elements of five fp32 tensors, registers spill
    tiles, programs = _samples.cut(S, rows)
    partials = sums if m_prev is None else _samples.new_partials(sums, programs)
    with _samples.on_device_of(h):
        modulated_relative_l1_kernel[limits.grid(h, B * programs)](
            h, scale, shift, _norms.vector(weight), m_prev, m, partials, S, *_norms.strides(h), *_norms.strides(scale),
            *_norms.strides(shift), *_norms.strides(m_prev), eps, tiles, programs,
            D=D, LAYER=norm == "layer", ROWS=rows, CHUNKS=chunks, BLOCK=block, num_warps=num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        _samples.add_partials(partials, sums)
    return m, sums


def fake(h, *_):
    """The outputs' shapes and dtypes."""
    return h.new_empty(h.shape), h.new_empty((h.shape[0], 2), dtype=torch.float32)


on_npu = partial(reference, normed=_norms.normed_on_npu)
_op = define(modulated_relative_l1, reference, launch, fake=fake, npu=on_npu)
