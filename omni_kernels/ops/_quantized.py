"""Shared by the ops that return hidden states in 8 bits, symmetric and dynamic: with a scale for each token, or MXFP8.

    scale = max|x| / limit          q = round(x / scale)          x, q: [..., D]      scale: [...]

Each token's own largest magnitude becomes the largest 8-bit value, `limit`, which is 127 for int8, 448 for
float8_e4m3fn and 240 for float8_e4m3fnuz. Rounds half to even, once: from fp32.

MXFP8 (OCP Microscaling Formats 1.0) is float8_e4m3fn with a scale for each 32 channels, which is a power of two in
float8_e8m0fnu. It is the smallest one with which no value is larger than 448; so none is cut off, as would be with the
power of two that the standard suggests. The scales of a tensor with M tokens lie as the GPU's product reads them:

- on NVIDIA in tiles of 128 tokens and 4 scales, one after the other, with scale (m, c) of a tile at place
  16 (m mod 32) + 4 (m div 32) + c; a vector, padded to whole tiles (cuBLAS, "1D block scaling factors layout");
- on AMD as they are: [..., D/32].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from omni_kernels.ascend import limits
from omni_kernels.ops import _chunks
from omni_kernels.ops._triton import tl, triton

#: 8-bit dtype → the largest value that is used. −128 is not, so that int8 is symmetric.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
#: Stands for MXFP8 where a dtype says how to quantise: the dtype of its scales.
MX = torch.float8_e8m0fnu
#: What `quantize` may be.
FORMS = (*LIMITS, MX)
#: Channels that share a scale in MXFP8; tokens and scales of a tile.
BLOCK32, TILE_TOKENS, TILE_SCALES = 32, 128, 4
#: Whether the scales of MXFP8 lie in tiles.
SWIZZLED = torch.version.hip is None
#: Tokens whose largest magnitude is smaller become zeros with scale 0: the quotient would overflow.
TINY = 2.0**-100
_TINY = tl.constexpr(TINY)
# x + ROUND − ROUND rounds x to an integer, half to even, if |x| < 2²².
ROUND = tl.constexpr(1.5 * 2.0**23)


def check(op: str, x: torch.Tensor, dtype: torch.dtype | None, beside: bool, out: torch.Tensor | None = None) -> None:
    """Raise ValueError if an op cannot return this 8-bit form of a result like x."""
    if dtype is None:
        if beside:
            raise ValueError(f"{op}: beside is given without quantize")
        return
    check_form(op, "quantize", x, dtype)
    if out is not None:
        raise ValueError(f"{op}: out and quantize cannot be given together")


def check_form(op: str, name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if the argument `name` of an op is no 8-bit form, or not one for x."""
    if dtype not in FORMS:
        allowed = ", ".join(str(one)[6:] for one in FORMS)
        raise ValueError(f"{op}: {name} is {str(dtype).removeprefix('torch.')}; allowed are {allowed}")
    if dtype == MX and (x.dim() < 2 or x.shape[-1] % BLOCK32):
        raise ValueError(f"{op}: MXFP8 has a scale for each 32 channels of a token: {[*x.shape]} has none, or others")


def check_device(op: str, x: torch.Tensor, dtype: torch.dtype | None) -> None:
    """Raise NotLaunchableError if the kernel of another op cannot write 8 bits on x's device: Ascend's cannot."""
    if dtype is not None and limits.here(x):
        raise limits.NotLaunchableError(f"{op}: on Ascend, its kernel does not quantize")


def in_8_bits(y: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 y [..., D] as q and scale, in plain torch."""
    if dtype == MX:
        return _in_mx(y)
    limit = LIMITS[dtype]
    largest = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros((*y.shape[:-1], 1))
    unused = ((largest >= TINY) & (largest < float("inf"))).logical_not()
    scale = (largest / limit).masked_fill_(largest < TINY, 0.0)
    y = y.mul(limit / largest).masked_fill_(unused, 0.0)
    return (y.round_() if dtype == torch.int8 else y).to(dtype).contiguous(), scale.squeeze(-1).contiguous()


def _in_mx(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not y.numel():
        return y.to(torch.float8_e4m3fn), torch.empty(scale_shape(y.shape), dtype=MX, device=y.device)
    blocks = y.unflatten(-1, (-1, BLOCK32))
    largest = blocks.abs().amax(-1)
    bits = largest.view(torch.int32)
    # 448 is 1.75 · 2⁸: one more where the mantissa is above 1.75. Below 2⁻¹²⁷ there are no scales.
    exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()).clamp_min(0)
    unused = (largest < float("inf")).logical_not()
    scale = exponent.masked_fill(unused, 255).to(torch.uint8).view(MX)
    inverse = ((254 - exponent) << 23).view(torch.float32).unsqueeze(-1)
    q = blocks.mul(inverse).masked_fill(unused.unsqueeze(-1), 0.0).to(torch.float8_e4m3fn).view(y.shape)
    return q, in_tiles(scale) if SWIZZLED else scale


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a tensor [..., D] in MXFP8."""
    return in_tiles_shape(shape) if SWIZZLED else (*shape[:-1], shape[-1] // BLOCK32)


def in_tiles_shape(shape: Sequence[int]) -> tuple[int]:
    """The shape of the scales of a tensor [..., D] in MXFP8, in tiles."""
    *tokens, D = shape
    columns = D // BLOCK32
    return (-(-math.prod(tokens) // TILE_TOKENS) * TILE_TOKENS * -(-columns // TILE_SCALES) * TILE_SCALES,)


def in_tiles(scale: torch.Tensor) -> torch.Tensor:
    """Scales [..., D/32] of MXFP8, in tiles. The places behind the last token and scale hold 2⁻¹²⁷."""
    rows = scale.view(torch.uint8).flatten(0, -2)
    M, C = rows.shape
    padded = F.pad(rows, (0, -C % TILE_SCALES, 0, -M % TILE_TOKENS))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // TILE_SCALES, TILE_SCALES)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(MX)


def out_of_tiles(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Scales [..., D/32] of a tensor [..., D] in MXFP8, which lie in tiles."""
    *tokens, D = shape
    M, C = math.prod(tokens), D // BLOCK32
    columns = -(-C // TILE_SCALES)
    tiles = scale.view(torch.uint8).view(-1, columns, 32, 4, TILE_SCALES)
    rows = tiles.permute(0, 3, 2, 1, 4).reshape(-1, columns * TILE_SCALES)
    return rows[:M, :C].contiguous().view(MX).view(*tokens, C)


def laid_out(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Scales of a tensor [..., D] in MXFP8, as this torch's product reads them."""
    lie_in_tiles = scale.dim() != len(shape)
    if lie_in_tiles == SWIZZLED:
        return scale
    return in_tiles(scale) if SWIZZLED else out_of_tiles(scale, shape)


def expanded(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The numbers that q [..., D] and its scale stand for, in fp32."""
    if scale.dtype != MX:
        return q.float() * scale.unsqueeze(-1)
    scale = out_of_tiles(scale, q.shape) if scale.dim() != q.dim() else scale
    return (q.float().unflatten(-1, (-1, BLOCK32)) * scale.float().unsqueeze(-1)).view(q.shape)


def finished(y: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None, beside: bool) -> Any:
    """An op's result from fp32 y, in plain torch: y in `like`'s dtype or, with a `dtype`, as `returned`."""
    if dtype is None:
        return y.to(like.dtype).contiguous()
    return returned(y.to(like.dtype).contiguous() if beside else None, *in_8_bits(y, dtype))


def returned(y: torch.Tensor | None, q: torch.Tensor | None, scale: torch.Tensor | None) -> Any:
    """What an op returns of these: y, (q, scale), or (q, scale, y)."""
    if q is None:
        return y
    if scale is not None and scale.element_size() == 1:
        scale = scale.view(MX)
    return (q, scale) if y is None else (q, scale, y)


def empty(like: torch.Tensor, dtype: torch.dtype | None, beside: bool) -> tuple[Any, Any, Any]:
    """y, q and scale for an op to write, in `like`'s shape; None for what it does not return."""
    y = like.new_empty(like.shape) if dtype is None or beside else None
    if dtype is None:
        return y, None, None
    if dtype == MX:
        # Triton has no pointer to e8m0. The dtype tells the kernel whether the scales lie in tiles.
        shape, kind = scale_shape(like.shape), torch.uint8 if SWIZZLED else torch.int8
        padded = SWIZZLED and like.shape[-1] % (BLOCK32 * TILE_SCALES)
        scale = like.new_zeros(shape, dtype=kind) if padded else like.new_empty(shape, dtype=kind)
        return y, like.new_empty(like.shape, dtype=torch.float8_e4m3fn), scale
    return y, like.new_empty(like.shape, dtype=dtype), like.new_empty(like.shape[:-1], dtype=torch.float32)


@triton.jit
def store_quantized(p_q, p_scale, o_row, o_token, x, m_row, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows x, fp32 chunks [ROWS, BLOCK], in p_q's dtype at o_row, and the scales of the tokens o_token [ROWS, 1].

    MXFP8 where the scales have 8 bits.
    """
    if p_scale.dtype.element_ty == tl.float32:
        _store_with_scale(p_q, p_scale, o_row, o_token, x, m_row, D, CHUNKS, BLOCK)
    else:
        _store_mx(p_q, p_scale, o_row, o_token, x, m_row, D, CHUNKS, BLOCK)


@triton.jit
def _store_with_scale(
    p_q, p_scale, o_row, o_token, x, m_row, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    INT8: tl.constexpr = p_q.dtype.element_ty == tl.int8
    LIMIT: tl.constexpr = 127.0 if INT8 else 448.0 if p_q.dtype.element_ty == tl.float8e4nv else 240.0
    magnitude = tl.zeros_like(x[0])
    # A row with NaN gets the scale NaN, whatever a maximum makes of it.
    nan = tl.zeros_like(x[0]).to(tl.int32)
    for c in tl.static_range(CHUNKS):
        # Where eps is 0, the lanes outside may hold 0 · ∞.
        one = tl.where(_chunks.columns(c, BLOCK) < D, x[c], 0.0) if (c + 1) * BLOCK > D else x[c]
        magnitude = tl.maximum(magnitude, tl.abs(one))
        nan |= (one != one).to(tl.int32)
    largest = tl.max(magnitude, axis=1, keep_dims=True)
    spoilt = tl.max(nan, axis=1, keep_dims=True) > 0
    used = (largest >= _TINY) & (largest < float("inf")) & (spoilt == 0)
    inverse = LIMIT / tl.where(used, largest, LIMIT)
    for c in tl.static_range(CHUNKS):
        o_d = _chunks.columns(c, BLOCK)
        y = tl.where(used, x[c], 0.0) * inverse
        if INT8:
            y = (y + ROUND) - ROUND
        tl.store(p_q + o_row + o_d, y.to(p_q.dtype.element_ty), mask=m_row & (o_d < D))
    scale = tl.where(largest < _TINY, 0.0, largest / LIMIT)
    tl.store(p_scale + o_token, tl.where(spoilt, float("nan"), scale), mask=m_row)


@triton.jit
def _store_mx(p_q, p_scale, o_row, o_token, x, m_row, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    ROWS: tl.constexpr = x[0].shape[0]
    GROUPS: tl.constexpr = BLOCK // 32
    COLUMNS: tl.constexpr = D // 32
    for c in tl.static_range(CHUNKS):
        blocks = tl.reshape(x[c], (ROWS, GROUPS, 32))
        largest = tl.max(tl.abs(blocks), axis=2)
        # A block with NaN gets the scale NaN, whatever a maximum makes of it.
        spoilt = tl.max((blocks != blocks).to(tl.int32), axis=2) > 0
        bits = largest.to(tl.int32, bitcast=True)
        spoilt = spoilt | (bits >= 0x7F800000)
        exponent = tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 0)
        inverse = ((254 - tl.where(spoilt, 127, exponent)) << 23).to(tl.float32, bitcast=True)
        y = tl.where(spoilt[:, :, None], 0.0, blocks) * inverse[:, :, None]
        o_d = _chunks.columns(c, BLOCK)
        tl.store(p_q + o_row + o_d, tl.reshape(y, (ROWS, BLOCK)).to(p_q.dtype.element_ty), mask=m_row & (o_d < D))
        o_b = c * GROUPS + tl.arange(0, GROUPS)[None, :]
        if p_scale.dtype.element_ty == tl.uint8:  # in tiles
            o_scale = (o_token // 128 * ((COLUMNS + 3) // 4) + o_b // 4) * 512
            o_scale += o_token % 32 * 16 + o_token % 128 // 32 * 4 + o_b % 4
        else:
            o_scale = o_token * COLUMNS + o_b
        exponent = tl.where(spoilt, 255, exponent).to(p_scale.dtype.element_ty)
        tl.store(p_scale + o_scale, exponent, mask=m_row & (o_b < COLUMNS))
