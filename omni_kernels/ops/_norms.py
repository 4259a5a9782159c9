"""Shared by the ops that normalise tokens: the norms, the forms of a modulation, their rows.

    layer: (x − mean(x)) / √(var(x) + eps)        rms: x / √(mean(x²) + eps)        over D channels, in fp32

A modulation (scale, shift or gate) is [B, D], [B, 1, D] or, per token, [B, S, D], where B may be 1; under an `index`
[B, S] it is [2B, D], and token (b, s) takes row b where index is 0 and row B + b elsewhere. Modulations are read in
place, also as chunks of one projection; only their rows must be contiguous.

A program holds whole rows in registers. So x is read once, and the variance is computed from centred values.
"""

from __future__ import annotations

import torch

from omni_kernels.ascend.rms_norm import rms_norm
from omni_kernels.ops import _chunks
from omni_kernels.ops._checks import DTYPES, unlike
from omni_kernels.ops._triton import tl, triton

NORMS = ("layer", "rms")
INDEX_DTYPES = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})

# Longer rows do not fit in a program's registers. Ops that hold more than one or two rows have lower limits.
MAX_TRITON_CHANNELS = 16384


def check_norm(op: str, norm: str | None, allowed: tuple[str | None, ...] = NORMS) -> None:
    """Raise ValueError if `norm` is not one of `allowed`."""
    if norm not in allowed:
        *most, last = (repr(one) for one in allowed)
        raise ValueError(f"{op}: norm is {norm!r}; allowed are {', '.join(most)} and {last}")


def check_modulation(
    op: str, like: str, h: torch.Tensor, index: torch.Tensor | None, **given: torch.Tensor | None
) -> None:
    """Raise ValueError if a tensor is not a valid modulation of h [B, S, D], or the index does not fit h.

    Args:
        like: the name of the argument h in messages.
    """
    B, S, D = h.shape
    if index is not None:
        if index.shape != (B, S):
            raise ValueError(f"{op}: index has shape {[*index.shape]}; it must be [B, S] = {[B, S]}")
        if index.dtype not in INDEX_DTYPES:
            raise ValueError(
                f"{op}: index has dtype {str(index.dtype)[6:]}; it must be bool or an integer of 8 to 64 bits"
            )
        if index.device != h.device:
            raise ValueError(f"{op}: index is on {index.device}; it must be on {h.device}, as {like} is")
    for name, t in given.items():
        if t is None:
            continue
        shape = t.shape
        if index is not None:
            if shape != (2 * B, D):
                raise ValueError(f"{op}: {name} has shape {[*shape]}; with an index it must be [2B, D] = {[2 * B, D]}")
        elif (
            len(shape) not in (2, 3)
            or shape[-1] != D
            or shape[0] not in (1, B)
            or (len(shape) == 3 and shape[1] not in (1, S))
        ):
            raise ValueError(
                f"{op}: {name} has shape {[*shape]}; allowed are "
                f"[B, D], [B, 1, D] and [B, S, D] with B = {B} or 1, S = {S}, D = {D}"
            )
        if t.device != h.device or t.dtype not in DTYPES:
            raise unlike(op, **{like: h, name: t})


def check_vectors(op: str, like: str, h: torch.Tensor, **given: torch.Tensor | None) -> None:
    """Raise ValueError if a tensor is not [D], for h [..., D]. `like` is the name of h in messages."""
    for name, t in given.items():
        if t is not None and (t.shape != h.shape[-1:] or t.device != h.device or t.dtype not in DTYPES):
            raise unlike(op, **{f"one row of {like}": h.new_empty(h.shape[-1]), name: t})


def per_token(t: torch.Tensor) -> torch.Tensor:
    """A modulation as [B, 1, D] or [B, S, D]."""
    return t.unsqueeze(1) if t.dim() == 2 else t


def selected(t: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The modulation rows of the tokens, [B, 1, D] or [B, S, D]."""
    if index is None:
        return t.unsqueeze(1) if t.dim() == 2 else t
    first, second = t.unsqueeze(1).chunk(2)
    return torch.where(index.unsqueeze(-1) == 0, first, second)


def normed(
    x: torch.Tensor,
    norm: str,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """norm(x) · weight + bias for fp32 x, as a new tensor, in plain torch."""
    if norm == "layer":
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    if weight is not None:
        y.mul_(weight)
    return y if bias is None else y.add_(bias)


def normed_on_npu(
    x: torch.Tensor,
    norm: str,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Like `normed`, but uses torch_npu's RMSNorm operator if it exists.

    RMSNorm without a bias also takes an x of another dtype than fp32, with a weight of the same dtype.
    """
    y = rms_norm(x, eps, weight) if norm == "rms" else None
    if y is None:
        return normed(x.float(), norm, eps, weight, bias)
    return y if bias is None else y.add_(bias)


def modulate(
    y: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, index: torch.Tensor | None
) -> torch.Tensor:
    """y · (1 + scale) + shift for fp32 y, in plain torch. May overwrite y."""
    if scale is None:
        return y if shift is None else y.add_(selected(shift, index))
    gain = selected(scale, index).float() + 1.0
    return y.mul_(gain) if shift is None else torch.addcmul(selected(shift, index).float(), y, gain)


@triton.jit
def norm_rows(x, eps, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, LAYER: tl.constexpr):
    """Normalise the rows of x, fp32 chunks [ROWS, BLOCK], over their D channels. x is 0 in the others."""
    if LAYER:
        mean = _chunks.sum_rows(x, CHUNKS) / D
        centred = ()
        for c in tl.static_range(CHUNKS):
            centred += (tl.where(_chunks.columns(c, BLOCK) < D, x[c] - mean, 0.0),)
        x = centred
    inverse = tl.rsqrt(_chunks.sum_squares(x, CHUNKS) / D + eps)
    normed = ()
    for c in tl.static_range(CHUNKS):
        normed += (x[c] * inverse,)
    return normed


@triton.jit
def modulate_rows(rows, b_weight, b_bias, b_scale, b_shift, CHUNKS: tl.constexpr):
    """(x · weight + bias) · (1 + scale) + shift for x in chunks. Each of the four may be None."""
    modulated = ()
    for c in tl.static_range(CHUNKS):
        x = rows[c]
        if b_weight is not None:
            x *= b_weight[c].to(tl.float32)
        if b_bias is not None:
            x += b_bias[c].to(tl.float32)
        if b_scale is not None:
            x *= 1.0 + b_scale[c].to(tl.float32)
        if b_shift is not None:
            x += b_shift[c].to(tl.float32)
        modulated += (x,)
    return modulated


@triton.jit
def row_of(p_index, sample, samples, index_sample, o_s, index_token, tokens):
    """The modulation row for tokens o_s of a sample."""
    row = sample
    if p_index is not None:
        second = tl.load(p_index + sample * index_sample + o_s * index_token, mask=o_s < tokens, other=0) != 0
        row = sample + tl.where(second, samples, 0).to(tl.int64)
    return row


def rows(t: torch.Tensor) -> torch.Tensor:
    """`t` with contiguous rows. Views with gaps between channels, or transposed ones, are copied."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def modulation_rows(t: torch.Tensor | None) -> torch.Tensor | None:
    """A modulation in the form for a kernel: [B, 1, D] or [B, S, D] with contiguous rows."""
    return None if t is None else rows(per_token(t))


def vector(t: torch.Tensor | None) -> torch.Tensor | None:
    """A norm's weight or bias in the form for a kernel: contiguous."""
    return None if t is None else t.contiguous()


def strides(t: torch.Tensor | None) -> tuple[int, int]:
    """Strides of samples and tokens in elements, 0 for a dimension of size 1. Triton then knows it divides by 16."""
    if t is None:
        return 0, 0
    return 0 if t.shape[0] == 1 else t.stride(0), 0 if t.shape[1] == 1 else t.stride(1)
