"""scaled_mm: the product of a linear layer in 8 bits, with scales, bias and activation in the same pass.

    y = f((q · weightᵀ) · scale · weight_scale + bias)        q: [..., K]      weight: [N, K]      y: [..., N]

f: identity, or GELU's tanh approximation. `scale` has one number for each token or, for the result of another such
product, one for each token and group of 128 channels. The result is rounded once: to a dtype of 16 or 32 bits, or to 8
bits with a scale for each group, so that a feed-forward's activation needs no pass of its own.

Per token and in fp8 with a bf16 result, the product is `torch._scaled_mm` on GPUs. In MXFP8 (`_quantized`) it is
`torch.nn.functional.scaled_mm` on the GPUs that multiply it. Moves q, the weights, the scales and y once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from omni_kernels.ascend import limits
from omni_kernels.device import has_mxfp8
from omni_kernels.ops import _activations, _quantized, _samples
from omni_kernels.ops._checks import DTYPES, unlike
from omni_kernels.ops._triton import tl, triton
from omni_kernels.registration import define

#: Channels that share a scale where there is more than one for each token.
GROUP = 128
# A program computes a tile of so many tokens and channels, in steps of DEPTH. On sm_90 its 8 warps hold the sums of
# 128 × 128 in 64 registers each, and three steps of both operands take 96 KB of shared memory, which every GPU from
# sm_80 on has. With few tokens (text), more and lower tiles.
ROWS, FEW_ROWS, BLOCK, DEPTH = 128, 64, 128, 128
FEW_TOKENS = 1024
# Programs that follow each other compute so many tiles of tokens with the same weights, which stay in the L2 cache.
TOGETHER = tl.constexpr(8)
#: The fewest rows and the divisor of the sizes that CUDA's product of int8 takes.
_ROWS, _MULTIPLE = 17, 8


def scaled_mm(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gelu: bool = False,
    quantize: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | Any:
    """f((q · weightᵀ) · scale · weight_scale + bias), accumulated in int32 or fp32.

    Args:
        q: [..., K], int8 or fp8, as from `omni_kernels.ops.quantize`. It and the weight are copied if not contiguous.
        scale: fp32 [...], or [..., K/128] for groups of channels. In MXFP8 as from `quantize`, or [..., K/32].
        weight: [N, K], in q's dtype.
        weight_scale: fp32 [N]; in MXFP8 like scale.
        bias: [N], or None.
        dtype: that of the result: fp32, fp16 or bf16.
        gelu: whether GELU's tanh approximation is applied.
        quantize: return the result in this 8-bit dtype, with a scale for each token and group of 128 channels.
        out: where to write, [..., N] in `dtype` with contiguous rows; None for a new tensor.

    Returns:
        `out`, or a new contiguous tensor [..., N]; with `quantize` (q, scale): [..., N], and fp32 [..., N/128].

    Raises:
        ValueError: a shape, dtype or device does not fit, or 128 does not divide the channels of groups.
    """
    _check(q, scale, weight, weight_scale, bias, dtype, quantize, out)
    return _op(q, scale, weight, weight_scale, bias, dtype, gelu, quantize, out)


def _check(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    quantize: torch.dtype | None,
    out: torch.Tensor | None,
) -> None:
    if q.dtype not in _quantized.LIMITS or q.dim() < 2:
        raise ValueError(f"scaled_mm: q is {str(q.dtype)[6:]} {[*q.shape]}; it must be int8 or fp8 [..., K]")
    (*tokens, K), N = q.shape, weight.shape[0]
    if weight.shape != (N, K) or weight.dtype != q.dtype or weight.device != q.device:
        raise ValueError(
            f"scaled_mm: weight is {str(weight.dtype)[6:]} {[*weight.shape]} on {weight.device}; it must be "
            f"{str(q.dtype)[6:]} [N, {K}] on {q.device}"
        )
    mx = _quantized.MX in (scale.dtype, weight_scale.dtype)
    if mx:
        _check_mx(q, scale, weight, weight_scale)
    elif scale.shape != q.shape[:-1] and (K % GROUP or scale.shape != (*tokens, K // GROUP)):
        raise ValueError(
            f"scaled_mm: scale has shape {[*scale.shape]}; it must be {tokens} or, with a multiple of 128 channels, "
            f"{[*tokens, 'K/128']}"
        )
    for name, t, shape in () if mx else (("scale", scale, scale.shape), ("weight_scale", weight_scale, (N,))):
        if t.shape != shape or t.dtype != torch.float32 or t.device != q.device:
            raise ValueError(f"scaled_mm: {name} must be float32 {[*shape]} on {q.device}")
    if bias is not None and (bias.shape != (N,) or bias.dtype not in DTYPES or bias.device != q.device):
        raise unlike("scaled_mm", weight_scale=weight_scale, bias=bias)
    if dtype not in DTYPES:
        raise ValueError(f"scaled_mm: dtype is {str(dtype)[6:]}; allowed are float32, float16, bfloat16")
    _quantized.check("scaled_mm", q, quantize, False, out)
    if quantize is not None and (mx or quantize == _quantized.MX):
        raise ValueError("scaled_mm: quantize does not go with MXFP8")
    if quantize is not None and N % GROUP:
        raise ValueError(f"scaled_mm: quantize needs a multiple of 128 channels, not {N}")
    if out is not None and 0 in out.stride() and out.numel():
        raise ValueError("scaled_mm: out is expanded; several of its elements are one in memory")
    if out is not None and (
        out.shape != (*tokens, N) or out.dtype != dtype or out.stride(-1) != 1 or out.device != q.device
    ):
        raise ValueError(
            f"scaled_mm: out is {str(out.dtype)[6:]} {[*out.shape]} on {out.device}; it must be {str(dtype)[6:]} "
            f"{[*tokens, N]} on {q.device} with contiguous rows"
        )


def _check_mx(q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    if q.dtype != torch.float8_e4m3fn or q.shape[-1] % _quantized.BLOCK32:
        raise ValueError(f"scaled_mm: q is {str(q.dtype)[6:]} {[*q.shape]}; MXFP8 is float8_e4m3fn, and 32 divides K")
    for name, t, of in (("scale", scale, q), ("weight_scale", weight_scale, weight)):
        plain = (*of.shape[:-1], of.shape[-1] // _quantized.BLOCK32)
        shapes = plain, _quantized.in_tiles_shape(of.shape)
        if t.dtype != _quantized.MX or t.device != q.device or t.shape not in shapes:
            raise ValueError(
                f"scaled_mm: {name} is {str(t.dtype)[6:]} {[*t.shape]} on {t.device}; in MXFP8 it must be "
                f"float8_e8m0fnu {[*plain]}, or {[*shapes[1]]} in tiles, on {q.device}"
            )


def reference(q, scale, weight, weight_scale, bias, dtype, gelu, quantize, out):
    """In plain torch."""
    if q.numel() == 0 and quantize is not None:
        return fake(q, scale, weight, weight_scale, bias, dtype, gelu, quantize)
    rows, weight = q.contiguous().flatten(0, -2), weight.contiguous()
    if scale.dim() == q.dim() and not len(rows):
        scale = scale[..., 0]
    if scale.dtype == _quantized.MX:
        y = _quantized.expanded(q, scale).flatten(0, -2) @ _quantized.expanded(weight, weight_scale).t()
    elif scale.dim() == q.dim():
        grouped = rows.float().unflatten(1, (q.shape[-1] // GROUP, GROUP)) * scale.reshape(len(rows), -1, 1)
        y = grouped.flatten(1) @ weight.float().t()
    else:
        y = _products(rows, weight).float() * scale.reshape(-1, 1)
    if scale.dtype != _quantized.MX:
        y = y * weight_scale
    if bias is not None:
        y = y + bias
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if quantize is not None:
        values, scales = _quantized.in_8_bits(y.unflatten(1, (-1, GROUP)), quantize)
        return values.view(*q.shape[:-1], -1), scales.view(*q.shape[:-1], -1)
    y = y.view(*q.shape[:-1], len(weight))
    return y.to(dtype) if out is None else out.copy_(y)


def _products(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """q · weightᵀ of [M, K] and [N, K], in int32, or in fp32 on devices that multiply it faster."""
    if q.dtype == torch.int8 and q.is_cuda and q.shape[1] % _MULTIPLE == weight.shape[0] % _MULTIPLE == 0:
        missing = max(0, _ROWS - q.shape[0])
        padded = F.pad(q, (0, 0, 0, missing)) if missing else q
        return torch._int_mm(padded, weight.t())[: q.shape[0]]
    if q.dtype == torch.int8 and q.is_cpu and _has_vnni():
        return torch._int_mm(q, weight.t())
    return q.float() @ weight.float().t()


@functools.cache
def _has_vnni() -> bool:
    """Whether the CPU has instructions for products of int8. Without them, torch's are 30 times slower than fp32."""
    return bool(torch.cpu._is_vnni_supported())


@triton.jit(do_not_specialize=["M"])
def scaled_mm_kernel(
    p_left, p_scale, p_right, p_weight_scale, p_bias, p_out, p_out_scale, M, out_row, N: tl.constexpr,
    K: tl.constexpr, GROUPED: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of ROWS tokens and BLOCK channels. With p_out_scale, in 8 bits: BLOCK is a group."""
    pid = tl.program_id(0).to(tl.int64)
    COLUMNS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    first = pid // (TOGETHER * COLUMNS) * TOGETHER
    height = tl.minimum((M + ROWS - 1) // ROWS - first, TOGETHER)
    place = pid % (TOGETHER * COLUMNS)
    o_m = (first + place % height) * ROWS + tl.arange(0, ROWS)
    column = place // height
    o_n = column * BLOCK + tl.arange(0, BLOCK)
    m_m, m_n = o_m < M, o_n < N
    # Tokens and channels outside read others' numbers, so that loads need no mask.
    left = p_left + (o_m % M)[:, None] * K
    right = p_right + (o_n % N)[None, :] * K
    INT8: tl.constexpr = p_left.dtype.element_ty == tl.int8
    total = tl.zeros((ROWS, BLOCK), tl.int32 if INT8 and not GROUPED else tl.float32)
    for start in range(0, K, DEPTH):
        o_k = start + tl.arange(0, DEPTH)
        if K % DEPTH == 0:
            a = tl.load(left + o_k[None, :])
            b = tl.load(right + o_k[:, None])
        else:
            a = tl.load(left + o_k[None, :], mask=o_k[None, :] < K, other=0.0)
            b = tl.load(right + o_k[:, None], mask=o_k[:, None] < K, other=0.0)
        if GROUPED:
            scale = tl.load(p_scale + (o_m % M) * (K // DEPTH) + start // DEPTH)
            total += tl.dot(a, b, out_dtype=tl.int32 if INT8 else tl.float32).to(tl.float32) * scale[:, None]
        elif INT8:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        else:
            # Hopper's products of fp8 keep 14 bits of their sums. So they are added in fp32 after every step.
            total = tl.dot(a, b, total, max_num_imprecise_acc=DEPTH)
    y = total.to(tl.float32)
    if not GROUPED:
        y *= tl.load(p_scale + o_m, mask=m_m, other=0.0)[:, None]
    y *= tl.load(p_weight_scale + o_n, mask=m_n, other=0.0)[None, :]
    if p_bias is not None:
        y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = _activations.gelu_of(y)
    if p_out_scale is None:
        o_out = o_m[:, None] * out_row + o_n[None, :]
        tl.store(p_out + o_out, y.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
    else:
        o_out = o_m[:, None] * N + column * BLOCK
        o_scale = o_m[:, None] * COLUMNS + column
        _quantized.store_quantized(p_out, p_out_scale, o_out, o_scale, (y,), m_m[:, None], BLOCK, 1, BLOCK)


def launch(q, scale, weight, weight_scale, bias, dtype, gelu, quantize, out):
    """With the Triton kernel, or torch's product in fp8 where that does all that is asked."""
    if limits.here(q):
        raise limits.NotLaunchableError("scaled_mm: there is no kernel on Ascend")
    q, weight, weight_scale = q.contiguous(), weight.contiguous(), weight_scale.contiguous()
    if scale.dtype == _quantized.MX:
        return _in_mx(q, scale, weight, weight_scale, bias, dtype, gelu, out)
    rows, N, grouped = q.flatten(0, -2), weight.shape[0], scale.dim() == q.dim()
    plain = not (gelu or grouped or quantize is not None)
    if plain and q.is_cuda and q.dtype != torch.int8 and dtype == torch.bfloat16:
        return _by_torch(q, scale, weight, weight_scale, bias, out)
    made, made_scale = fake(q, scale, weight, weight_scale, bias, dtype, gelu, quantize) if quantize else (out, None)
    if made is None:
        made = q.new_empty((*q.shape[:-1], N), dtype=dtype)
    if made.numel() == 0 or q.shape[-1] == 0:
        return reference(q, scale, weight, weight_scale, bias, dtype, gelu, quantize, out)
    place = made.flatten(0, -2)
    # `place` is a copy if `out` could not be viewed as rows with one stride.
    target = place if place.data_ptr() == made.data_ptr() else torch.empty_like(place)
    height = ROWS if len(rows) > FEW_TOKENS else FEW_ROWS
    with _samples.on_device_of(q):
        scaled_mm_kernel[(triton.cdiv(len(rows), height) * triton.cdiv(N, BLOCK),)](
            rows, scale.contiguous(), weight, weight_scale, None if bias is None else bias.contiguous(), target,
            made_scale, len(rows), target.stride(0), N=N, K=q.shape[-1], GROUPED=grouped, GELU=gelu, ROWS=height,
            BLOCK=BLOCK, DEPTH=DEPTH, num_warps=_samples.warps(256), enable_fp_fusion=True,
        )  # fmt: skip
    if quantize is not None:
        return made, made_scale
    return made if target is place else made.copy_(target.view(made.shape))


def _in_mx(q, scale, weight, weight_scale, bias, dtype, gelu, out):
    """The product in MXFP8 by torch."""
    if not (q.is_cuda and q.numel() and has_mxfp8(q.device)):
        raise limits.NotLaunchableError("scaled_mm: this device does not multiply MXFP8")
    kind, swizzle = F.ScalingType.BlockWise1x32, F.SwizzleType
    tiles = swizzle.SWIZZLE_32_4_4 if _quantized.SWIZZLED else swizzle.NO_SWIZZLE
    scales = (_quantized.laid_out(s, t.shape) for s, t in ((scale, q), (weight_scale, weight)))
    left, right = (s if s.dim() == 1 else s.flatten(0, -2) for s in scales)
    # The bias of torch's product has its dtype, and fp16 is not its result on AMD.
    inside = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    within = bias if bias is not None and bias.dtype == inside == torch.bfloat16 else None
    y = F.scaled_mm(q.flatten(0, -2), weight.t(), left, kind, right, kind, tiles, tiles, within, inside)
    if within is None and bias is not None:
        y = y + bias
    if gelu:
        y = F.gelu(y, approximate="tanh")
    y = y.to(dtype).view(*q.shape[:-1], -1)
    return y if out is None else out.copy_(y)


def _by_torch(q, scale, weight, weight_scale, bias, out):
    """The product in fp8 by torch, with a bf16 result."""
    scales = scale.reshape(-1, 1), weight_scale[None]
    bias = None if bias is None else bias.to(torch.bfloat16)
    rows, options = q.flatten(0, -2), {"bias": bias, "out_dtype": torch.bfloat16}
    if out is None or not out.flatten(0, -2).is_contiguous():
        made = torch._scaled_mm(rows, weight.t(), *scales, **options).view(*q.shape[:-1], -1)
        return made if out is None else out.copy_(made)
    torch._scaled_mm(rows, weight.t(), *scales, **options, out=out.view(len(rows), -1))
    return out


def fake(q, scale, weight, weight_scale, bias, dtype, gelu, quantize, out=None):
    """The outputs' shapes and dtypes."""
    shape = (*q.shape[:-1], weight.shape[0])
    if quantize is None:
        return q.new_empty(shape, dtype=dtype)
    scales = (*shape[:-1], shape[-1] // GROUP)
    return q.new_empty(shape, dtype=quantize), q.new_empty(scales, dtype=torch.float32)


_op = define(scaled_mm, reference, launch, fake=fake)
