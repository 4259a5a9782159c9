"""qk_norm_rope: norm and rotation of q and k, written where attention reads them, in one pass.

    q_out = rotate(rms(q)·q_weight)        rms(x) = x / √(mean(x²) + eps)        q, k, v, *_out: [B, S, H, Dh]
    k_out = rotate(rms(k)·k_weight)        over a head, or over all heads of a token
    v_out = v
    rotate: (a, b) ← (a·cos − b·sin, a·sin + b·cos)        (cos, sin): freqs[s, i], fp32 [S, Dh/2, 2], or two tables

The pairs (a, b) are elements 2i and 2i + 1 of a head ("interleaved") or i and i + Dh/2 ("half"). RMSNorm: Zhang and
Sennrich 2019, arXiv:1910.07467; rotary embedding: Su et al. 2021, arXiv:2104.09864.

The attention processors of diffusers compute the same for Qwen-Image, Z-Image, FLUX, Wan and LTX (Wan and LTX normalise
over all heads, and in LTX every head has its own angles). There every step rounds to the tensors' dtype; here only the
result is rounded. The outputs are written into given buffers. So text and image, with one call each, can share one
sequence without concatenation. v is omitted if it is already in place. Moves the bytes of q, k, v and of the outputs
once, plus those of freqs and the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial

import torch
from torch.compiler import is_dynamo_compiling

from omni_kernels.ascend import limits
from omni_kernels.ascend.qk_norm_rope import rotate as rotate_real
from omni_kernels.ascend.qk_norm_rope import tables
from omni_kernels.ops import _norms, _samples, _tiles
from omni_kernels.ops._checks import DTYPES, alike, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

LAYOUTS = ("interleaved", "half")
MAX_HEAD_SIZE = 256

# Elements of q per chunk, in whole heads. A thread processes 16 bytes of each tensor; with "half", where the elements
# of a pair are apart, 16 of each half.
TILE = 1024
# A program processes all heads of a token, up to so many chunks of them, so that it loads the angles once: in fp32, the
# angles of a head have as many bytes as its q and k in bf16. Across heads, all chunks are in registers at once. With
# "half", a chunk has twice the elements.
MAX_CHUNKS = {"interleaved": 6, "half": 4}
MAX_CHUNKS_ACROSS = {"interleaved": 6, "half": 2}
# The longest token for a norm over all heads.
MAX_TRITON_TOKEN = 8192


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    freqs: torch.Tensor | None = None,
    layout: str = "interleaved",
    across_heads: bool = False,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """Normalise and rotate q and k, copy v, and write all three into given buffers. Computed in fp32, rounded once.

    Args:
        q: [B, S, H, Dh] with an even Dh up to 256, fp32, fp16 or bf16. The last dimension must be contiguous; other
            strides are free, as in a view of a projection [B, S, H·Dh] or of a third of [B, S, 3·H·Dh].
        k: like q; the dtype may differ.
        v: like k. None if it is already where attention reads it.
        q_out: where to write, like k. Usually a slice of a longer sequence, buffer[:, start : start + S].
        k_out: like q_out.
        v_out: like q_out; None if v is None.
        q_weight: the norm's weight, [Dh] or, across heads, [H·Dh]. None: q is not normalised.
        k_weight: like q_weight, for k.
        eps: added to the mean square.
        freqs: fp32 [S, Dh/2, 2] or [B or 1, S, Dh/2, 2], the cosine and sine of every angle: `torch.view_as_real` of a
            complex table. None: cos and sin are used, or nothing is rotated.
        layout: "interleaved" rotates elements 2i and 2i + 1 of a head, "half" elements i and i + Dh/2.
        across_heads: whether the mean square is over a whole token instead of a head.
        cos: alternative to freqs, together with sin: [S, Dh] or, with angles for each head, [B or 1, S, H, Dh], fp32,
            fp16 or bf16, the cosine of each element's angle. Both elements of a pair have the same value, as in the
            tables of FLUX, Wan and LTX in diffusers.
        sin: like cos.

    Raises:
        ValueError: a shape, stride, device or dtype does not fit, the layout is unknown, only one of v and v_out or of
            cos and sin is given, freqs is given as well as cos and sin, or an output overlaps an input or another
            output. Interleaved views count as overlapping.
    """
    if q.dim() != 4 or q.shape[3] % 2 or q.shape[3] > MAX_HEAD_SIZE:
        raise ValueError(
            f"qk_norm_rope: q has shape {[*q.shape]}; it must be [B, S, H, Dh] with an even Dh up to {MAX_HEAD_SIZE}"
        )
    if not alike(q, k, v, q_out, k_out, v_out):
        raise unlike("qk_norm_rope", q=q, k=k, v=v, q_out=q_out, k_out=k_out, v_out=v_out)
    if (v is None) is not (v_out is None):
        raise ValueError("qk_norm_rope: v and v_out must be given together")
    if layout not in LAYOUTS:
        raise ValueError(f"qk_norm_rope: layout is {layout!r}; allowed are 'interleaved' and 'half'")
    for name, t in (("q", q), ("k", k), ("v", v), ("q_out", q_out), ("k_out", k_out), ("v_out", v_out)):
        if t is not None and t.stride(3) != 1:
            raise ValueError(f"qk_norm_rope: {name} has strides {[*t.stride()]}; the last one must be 1")
    channels = q.shape[3] * (q.shape[2] if across_heads else 1)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (
            weight.shape != (channels,) or weight.device != q.device or weight.dtype not in DTYPES
        ):
            like = "all heads of q" if across_heads else "a head of q"
            raise unlike("qk_norm_rope", **{like: q.new_empty(channels), name: weight})
    if freqs is not None:
        _check_freqs(freqs, q)
    if cos is not None or sin is not None:
        _check_tables(cos, sin, freqs, q)
    if type(q) is torch.Tensor and not q.is_meta and not is_dynamo_compiling():
        _check_memory({"q": q, "k": k, "v": v}, {"q_out": q_out, "k_out": k_out, "v_out": v_out})
    _op(q, k, v, q_out, k_out, v_out, q_weight, k_weight, eps, freqs, layout, across_heads, cos, sin)


def _check_freqs(freqs: torch.Tensor, q: torch.Tensor) -> None:
    B, S, _, Dh = q.shape
    if freqs.dtype != torch.float32:
        complex_ = "; torch.view_as_real converts it" if freqs.dtype == torch.complex64 else ""
        raise ValueError(f"qk_norm_rope: freqs has dtype {str(freqs.dtype)[6:]}; it must be float32{complex_}")
    # Not `in`, which Dynamo takes for false where a size is symbolic on one side only.
    angles = (S, Dh // 2, 2)
    if freqs.shape != angles and freqs.shape != (B, *angles) and freqs.shape != (1, *angles):
        raise ValueError(
            f"qk_norm_rope: freqs has shape {[*freqs.shape]}; allowed are "
            f"[S, Dh/2, 2] and [B, S, Dh/2, 2] with B = {B} or 1, S = {S}, Dh/2 = {Dh // 2}"
        )
    if freqs.device != q.device:
        raise ValueError(f"qk_norm_rope: freqs is on {freqs.device}; it must be on {q.device}, as q is")


def _check_tables(
    cos: torch.Tensor | None, sin: torch.Tensor | None, freqs: torch.Tensor | None, q: torch.Tensor
) -> None:
    if cos is None or sin is None or freqs is not None:
        raise ValueError("qk_norm_rope: cos and sin must be given together, and without freqs")
    B, S, H, Dh = q.shape
    # Not `in`, which Dynamo takes for false where a size is symbolic on one side only.
    if cos.shape != (S, Dh) and cos.shape != (B, S, H, Dh) and cos.shape != (1, S, H, Dh):
        raise ValueError(
            f"qk_norm_rope: cos has shape {[*cos.shape]}; it must be [S, Dh] = {[S, Dh]}, "
            f"or [B, S, H, Dh] with B = {B} or 1, H = {H}"
        )
    if not alike(cos, sin) or cos.device != q.device:
        raise unlike("qk_norm_rope", **{"a token's head": q.new_empty(cos.shape), "cos": cos, "sin": sin})


def _check_memory(read: dict[str, torch.Tensor | None], written: dict[str, torch.Tensor | None]) -> None:
    others = {name: _stretch(t) for name, t in read.items() if t is not None}
    for name, t in written.items():
        if t is None:
            continue
        first, end = stretch = _stretch(t)
        for other, (start, stop) in others.items():
            if first < stop and start < end:
                raise ValueError(f"qk_norm_rope: {name} overlaps {other} in memory")
        if 0 in t.stride() and end > first and any(n > 1 and not s for n, s in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"qk_norm_rope: {name} is expanded; several of its elements are one in memory")
        others[name] = stretch


def _stretch(t: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first element and of the end of the last one."""
    first, (B, S, H, Dh), strides = t.data_ptr(), t.shape, t.stride()
    if not (B and S and H and Dh):
        return first, first
    last = (B - 1) * strides[0] + (S - 1) * strides[1] + (H - 1) * strides[2] + Dh
    return first, first + last * t.element_size()


def _complex(t: torch.Tensor) -> torch.Tensor:
    """The pairs [..., 2] as complex numbers [...]: a view, or a copy if torch cannot make a view."""
    seen = _complex_view(t)
    return torch.view_as_complex(t.clone(memory_format=torch.contiguous_format)) if seen is None else seen


def _complex_view(t: torch.Tensor) -> torch.Tensor | None:
    try:
        return torch.view_as_complex(t)
    except RuntimeError:  # a pair starts at an odd element, or is not fp32
        return None


def _rms_normed(y: torch.Tensor, eps: float, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(weights) == 1:
        return torch.rms_norm(y, weights[0].shape, weights[0].float(), eps)
    y = torch.rms_norm(y, weights[0].shape, None, eps)
    for one, weight in zip(y.unbind(), weights, strict=True):
        one.mul_(weight)
    return y


#: A tensor to normalise and rotate, the weights of its norm (empty without a norm), and where to write it.
_Part = tuple[torch.Tensor, Sequence[torch.Tensor], torch.Tensor]


def _apart(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> Sequence[_Part]:
    return (q, () if q_weight is None else (q_weight,), q_out), (k, () if k_weight is None else (k_weight,), k_out)


def _together(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> Sequence[_Part]:
    """q and k as one tensor, if both are views of one. This halves the operator calls, which dominate small tensors."""
    both, out = _stacked(q, k), _stacked(q_out, k_out)
    if both is None or out is None or (q_weight is None) is not (k_weight is None):
        return _apart(q, k, q_weight, k_weight, q_out, k_out)
    return ((both, () if q_weight is None or k_weight is None else (q_weight, k_weight), out),)


def _stacked(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """A view [2, ...] of a and b, if they are views of one tensor with equal strides and dtype; else None."""
    base, strides = a._base, a.stride()
    if base is None or base is not b._base or strides != b.stride() or a.dtype != b.dtype:
        return None
    first, second = a.storage_offset(), b.storage_offset()
    return a.as_strided((2, *a.shape), (second - first, *strides), first) if second > first else None


def _pairs(
    freqs: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, layout: str
) -> torch.Tensor | None:
    """The cosine and sine of every angle [..., S, H or 1, Dh/2, 2], or as complex numbers [..., Dh/2] if interleaved.

    Like the kernel, it reads the cosine from the first element of a pair and the sine from the second.
    """
    if cos is not None and sin is not None:
        apart, pair = ((-1, 2), -1) if layout == "interleaved" else ((2, -1), -2)
        first, other = cos.unflatten(-1, apart).select(pair, 0), sin.unflatten(-1, apart).select(pair, 1)
        freqs = torch.stack((first, other), -1).float()
    if freqs is not None and (cos is None or cos.dim() == 2):
        freqs = freqs.unsqueeze(-3)
    return _complex(freqs) if freqs is not None and layout == "interleaved" else freqs


def _rotate(y: torch.Tensor, freqs: torch.Tensor, layout: str, out: torch.Tensor) -> None:
    if layout == "interleaved":
        # Two operators instead of six in real arithmetic: for 16 tokens with 4 heads of 48, 45 µs against 112 in all.
        numbers = _complex(y.unflatten(-1, (-1, 2)))
        place = _complex_view(out.unflatten(-1, (-1, 2))) if out.dtype == torch.float32 else None
        if place is None:
            out.copy_(torch.view_as_real(numbers * freqs).flatten(-2))
        else:
            # Written directly to `out`. This and `_pairs` save a tenth of the host time of 60 tiny blocks.
            torch.mul(numbers, freqs, out=place)
        return
    cos, sin = freqs.unbind(-1)
    a, b = y.unflatten(-1, (2, -1)).unbind(-2)
    a_out, b_out = out.unflatten(-1, (2, -1)).unbind(-2)
    a_out.copy_((a * cos).addcmul_(b, sin, value=-1))
    b_out.copy_((a * sin).addcmul_(b, cos))


def _rms_normed_on_npu(y: torch.Tensor, eps: float, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return _norms.normed_on_npu(y, "rms", eps, *weights)


def reference(
    q, k, v, q_out, k_out, v_out, q_weight, k_weight, eps, freqs, layout, across_heads, cos, sin,
    *, parts=_together, normed=_rms_normed, prepared=_pairs, rotate=_rotate,
):  # fmt: skip
    """In plain torch. `normed` computes the norm, `rotate` the rotation."""
    rotation = prepared(freqs, cos, sin, layout)
    for x, weights, out in parts(q, k, q_weight, k_weight, q_out, k_out):
        y = x.float()
        if weights:
            y = normed(y.flatten(-2) if across_heads else y, eps, weights).view(x.shape)
        if rotation is None:
            out.copy_(y)
        else:
            rotate(y, rotation, layout, out)
    if v is not None:
        v_out.copy_(v)


@triton.jit
def load_pairs(p, o_row, m_row, D: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The two elements of every pair of ROWS rows of D, each [ROWS, BLOCK / 2], in their dtype."""
    if INTERLEAVED:
        # Loaded contiguously, then split. Loads with a stride of 2 would be 16-bit loads.
        o_d = tl.arange(0, BLOCK)[None, :]
        x = tl.load(p + o_row + o_d, mask=m_row & (o_d < D), other=0.0)
        a, b = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    else:
        o_d = tl.arange(0, BLOCK // 2)[None, :]
        m = m_row & (o_d < D // 2)
        a = tl.load(p + o_row + o_d, mask=m, other=0.0)
        b = tl.load(p + o_row + D // 2 + o_d, mask=m, other=0.0)
    return a, b


@triton.jit
def store_pairs(
    p, a, b, o_row, m_row, D: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The inverse of `load_pairs`."""
    if INTERLEAVED:
        o_d = tl.arange(0, BLOCK)[None, :]
        x = tl.reshape(tl.join(a, b), (ROWS, BLOCK))
        tl.store(p + o_row + o_d, x.to(p.dtype.element_ty), mask=m_row & (o_d < D))
    else:
        o_d = tl.arange(0, BLOCK // 2)[None, :]
        m = m_row & (o_d < D // 2)
        tl.store(p + o_row + o_d, a.to(p.dtype.element_ty), mask=m)
        tl.store(p + o_row + D // 2 + o_d, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def heads(first, chunk: tl.constexpr, ROWS: tl.constexpr):
    """The heads [ROWS, 1] of a chunk."""
    return first + chunk * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def load_heads(
    p, first, strides, H: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pairs of a token's heads, one chunk of ROWS heads after the other. `p` points to the token."""
    pairs = ()
    for c in tl.static_range(CHUNKS):
        o_h = heads(first, c, ROWS)
        pairs += (load_pairs(p, o_h * strides[2], o_h < H, D, INTERLEAVED, ROWS, BLOCK),)
    return pairs


@triton.jit
def reciprocal_rms(a, b, eps, N: tl.constexpr):
    """1 / √(mean square + eps) of every row of N elements."""
    return tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / N + eps)


@triton.jit
def reciprocal_rms_of_all(pairs, eps, N: tl.constexpr, CHUNKS: tl.constexpr):
    """1 / √(mean square + eps) of all rows of all chunks, N elements."""
    a, b = pairs[0][0].to(tl.float32), pairs[0][1].to(tl.float32)
    squares = a * a + b * b
    for c in tl.static_range(1, CHUNKS):
        a, b = pairs[c][0].to(tl.float32), pairs[c][1].to(tl.float32)
        squares += a * a + b * b
    return tl.rsqrt(tl.sum(tl.sum(squares, axis=1, keep_dims=True), axis=0, keep_dims=True) / N + eps)


@triton.jit
def finish_heads(
    pairs, p_out, p_weight, angles, eps, first, strides, H: tl.constexpr, D: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise, rotate and store the heads that `load_heads` has loaded. `p_out` points to the token."""
    if p_weight is not None:
        if ACROSS:
            inverse = reciprocal_rms_of_all(pairs, eps, H * D, CHUNKS)
        else:
            w_a, w_b = load_pairs(p_weight, 0, tl.full((1, 1), True, tl.int1), D, INTERLEAVED, 1, BLOCK)
    for c in tl.static_range(CHUNKS):
        o_h = heads(first, c, ROWS)
        m = o_h < H
        a, b = pairs[c][0].to(tl.float32), pairs[c][1].to(tl.float32)
        if p_weight is not None:
            if ACROSS:
                w_a, w_b = load_pairs(p_weight, o_h * D, m, D, INTERLEAVED, ROWS, BLOCK)
            else:
                inverse = reciprocal_rms(a, b, eps, D)
            a *= inverse * w_a.to(tl.float32)
            b *= inverse * w_b.to(tl.float32)
        if angles is not None:
            cos, sin = angles[c]
            cos, sin = cos.to(tl.float32), sin.to(tl.float32)
            a, b = a * cos - b * sin, a * sin + b * cos
        store_pairs(p_out, a, b, o_h * strides[2], m, D, INTERLEAVED, ROWS, BLOCK)


@triton.jit
def load_angles(
    p_freqs, p_sin, sample, token, first, freqs_strides, sin_strides, H: tl.constexpr, D: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cosines and sines of each chunk of heads. If all heads share them, they are loaded once."""
    p_freqs += sample * freqs_strides[0] + token * freqs_strides[1]
    all_heads = tl.full((1, 1), True, tl.int1)
    angles = ()
    if p_sin is None:
        shared = load_pairs(p_freqs, 0, all_heads, D, True, 1, BLOCK)
        for _ in tl.static_range(CHUNKS):
            angles += (shared,)
    elif len(freqs_strides) == 2:
        cos, _ = load_pairs(p_freqs, 0, all_heads, D, INTERLEAVED, 1, BLOCK)
        _, sin = load_pairs(p_sin + token * sin_strides[1], 0, all_heads, D, INTERLEAVED, 1, BLOCK)
        for _ in tl.static_range(CHUNKS):
            angles += ((cos, sin),)
    else:
        p_sin += sample * sin_strides[0] + token * sin_strides[1]
        for c in tl.static_range(CHUNKS):
            o_h = heads(first, c, ROWS)
            cos, _ = load_pairs(p_freqs, o_h * freqs_strides[2], o_h < H, D, INTERLEAVED, ROWS, BLOCK)
            _, sin = load_pairs(p_sin, o_h * sin_strides[2], o_h < H, D, INTERLEAVED, ROWS, BLOCK)
            angles += ((cos, sin),)
    return angles


@triton.jit(do_not_specialize=["programs", "eps"])
def qk_norm_rope_kernel(
    p_q, p_k, p_v, p_q_out, p_k_out, p_v_out, p_q_weight, p_k_weight, p_freqs, p_sin, programs, eps, q_strides,
    k_strides, v_strides, q_out_strides, k_out_strides, v_out_strides, freqs_strides, sin_strides,
    H: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program processes CHUNKS chunks of ROWS heads of a token: all of its heads, or one of several groups.

    With p_sin, p_freqs holds the cosines. Strides: sample, token, head.
    """
    GROUPS: tl.constexpr = (H + ROWS * CHUNKS - 1) // (ROWS * CHUNKS)
    pid = tl.program_id(0)
    sample = (pid // programs).to(tl.int64)
    part = pid % programs
    token = (part // GROUPS).to(tl.int64)
    first = (part % GROUPS).to(tl.int64) * (CHUNKS * ROWS)
    p_q += sample * q_strides[0] + token * q_strides[1]
    p_k += sample * k_strides[0] + token * k_strides[1]
    q = load_heads(p_q, first, q_strides, H, D, INTERLEAVED, ROWS, CHUNKS, BLOCK)
    k = load_heads(p_k, first, k_strides, H, D, INTERLEAVED, ROWS, CHUNKS, BLOCK)
    angles = None
    if p_freqs is not None:
        angles = load_angles(
            p_freqs, p_sin, sample, token, first, freqs_strides, sin_strides, H, D, INTERLEAVED, ROWS, CHUNKS, BLOCK
        )
    # q is finished before k begins. Both at a time would need more registers.
    p_q_out += sample * q_out_strides[0] + token * q_out_strides[1]
    finish_heads(
        q, p_q_out, p_q_weight, angles, eps, first, q_out_strides, H, D, INTERLEAVED, ACROSS, ROWS, CHUNKS, BLOCK
    )
    p_k_out += sample * k_out_strides[0] + token * k_out_strides[1]
    finish_heads(
        k, p_k_out, p_k_weight, angles, eps, first, k_out_strides, H, D, INTERLEAVED, ACROSS, ROWS, CHUNKS, BLOCK
    )
    if p_v is not None:
        p_v += sample * v_strides[0] + token * v_strides[1]
        p_v_out += sample * v_out_strides[0] + token * v_out_strides[1]
        o_d = tl.arange(0, BLOCK)[None, :]
        for c in tl.static_range(CHUNKS):
            o_h = heads(first, c, ROWS)
            m = (o_h < H) & (o_d < D)
            v = tl.load(p_v + o_h * v_strides[2] + o_d, mask=m, other=0.0)
            tl.store(p_v_out + o_h * v_out_strides[2] + o_d, v.to(p_v_out.dtype.element_ty), mask=m)


def _strides(t: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of samples, tokens and heads, 0 for a dimension of size 1 or without a tensor.

    Triton knows that 0 is divisible by 16.
    """
    if t is None:
        return 0, 0, 0
    return tuple(0 if n == 1 else s for n, s in zip(t.shape[:3], t.stride(), strict=False))


@functools.lru_cache(maxsize=256)
def cut(H: int, block: int, tile: int, most: int, across: bool) -> tuple[int, int]:
    """Heads of a chunk, and chunks of a program.

    Args:
        block: elements of a head, a power of two.
        tile: elements of a chunk.
        most: the most chunks of a program.
        across: whether a program must have all heads of a token.
    """
    rows = min(triton.next_power_of_2(H), max(1, tile // block))
    # No more than an eighth of the lanes may be idle, as long as a chunk fills a warp.
    while rows * block > 256 and -(-H // rows) * rows - H > H // 8:
        rows //= 2
    count = -(-H // rows)
    if across:
        while count > most:
            rows *= 2
            count = -(-H // rows)
        return rows, count
    return rows, -(-count // -(-count // most))


def launch(q, k, v, q_out, k_out, v_out, q_weight, k_weight, eps, freqs, layout, across_heads, cos, sin):
    """With the Triton kernel. Tokens too long for a norm across heads use the plain-torch implementation."""
    B, S, H, Dh = q.shape
    if q.numel() == 0:
        return
    across = across_heads and not (q_weight is None and k_weight is None)
    block = max(_samples.MIN_WIDTH, triton.next_power_of_2(Dh))
    token = triton.next_power_of_2(H) * block
    on_ascend = limits.here(q)
    if on_ascend and cos is not None and cos.dim() == 4:
        raise limits.NotLaunchableError("qk_norm_rope: the kernel has no rotation by head on Ascend")
    if across:
        limits.whole_row("qk_norm_rope", q, token, MAX_TRITON_TOKEN)
    interleaved = layout == "interleaved"
    if on_ascend:
        rows, chunks = max(1, min(limits.TILES["qk_norm_rope"], token) // block), 1
        num_warps = _samples.warps()
    else:
        tile = _tiles.tile("qk_norm_rope", q, TILE) * (1 if interleaved else 2)
        rows, chunks = cut(H, block, tile, (MAX_CHUNKS_ACROSS if across else MAX_CHUNKS)[layout], across)
        widest = max(t.dtype.itemsize for t in (q, k, q_out))
        num_warps = _samples.warps(rows * block * widest // (16 if interleaved else 32))
    groups = -(-H // (rows * chunks))
    if freqs is not None and freqs.stride()[-2:] != (2, 1):
        freqs = freqs.contiguous()
    of_freqs: tuple[int, ...] = (0, 0)
    of_sin = of_freqs
    if cos is not None and sin is not None:
        freqs, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
        of_freqs, of_sin = (_strides(t) if t.dim() == 4 else (0, t.stride(0)) for t in (freqs, sin))
    elif freqs is not None:
        of_freqs = (0 if freqs.dim() == 3 or freqs.shape[0] == 1 else freqs.stride(0), freqs.stride(-3))
    q_weight, k_weight = (None if weight is None else weight.contiguous() for weight in (q_weight, k_weight))
    with _samples.on_device_of(q):
        qk_norm_rope_kernel[limits.grid(q, B * S * groups)](
            q, k, v, q_out, k_out, v_out, q_weight, k_weight, freqs, sin, S * groups, eps, _strides(q),
            _strides(k), _strides(v), _strides(q_out), _strides(k_out), _strides(v_out), of_freqs, of_sin,
            H=H, D=Dh, INTERLEAVED=interleaved, ACROSS=across, ROWS=rows, CHUNKS=chunks, BLOCK=block,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip


on_npu = partial(reference, parts=_apart, normed=_rms_normed_on_npu, prepared=tables, rotate=rotate_real)
_op = define(qk_norm_rope, reference, launch, npu=on_npu, mutates=("q_out", "k_out", "v_out"))
