"""The ops in fp64, written from their formulas. They share no code with the implementations.

`expected` returns the correct results of an op. The functions compute on their inputs' device, which must support fp64:
the CPU or a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def sums(difference: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Per sample, Σ|difference| and Σ|magnitude|."""
    rows = (t.double().abs().reshape(len(t), -1 if t.numel() else 0) for t in (difference, magnitude))
    return torch.stack([t.sum(1) for t in rows], 1)


def relative_l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Per sample, Σ|x − y| and Σ|y|."""
    return sums(x.double() - y.double(), y)


def tokens(t: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
    """A modulation, selected or broadcastable for every token."""
    if index is not None:
        B = len(t) // 2
        return t.double()[torch.arange(B, device=t.device)[:, None] + B * (index != 0)]
    return (t[:, None, :] if t.dim() == 2 else t).double()


def modulated(
    h: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """m, and the summed magnitude of its terms."""
    x = h.double()
    mean = x.mean(-1, keepdim=True) if norm == "layer" else x.new_zeros(())
    centred = x - mean
    deviation = torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    # The mean is also a sum. Near zero its error is up to one unit of the summed terms, an eighth of what is allowed
    # for arithmetic.
    lost = x.abs().mean(-1, keepdim=True) / 8 if norm == "layer" else mean
    m, terms = centred / deviation, (x.abs() + mean.abs() + lost) / deviation
    if weight is not None:
        m, terms = m * weight.double(), terms * weight.double().abs()
    if bias is not None:
        m, terms = m + bias.double(), terms + bias.double().abs()
    if scale is not None:
        gain = tokens(scale, index).double()
        m, terms = m * (1 + gain), terms * (1 + gain.abs())
    if shift is not None:
        m, terms = m + tokens(shift, index), terms + tokens(shift, index).abs()
    return m, terms


def gated_residual(
    residual: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    index: torch.Tensor | None = None,
    gate_tanh: bool = False,
    x_weight: torch.Tensor | None = None,
    x_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h, and the summed magnitude of its terms."""
    added = x.double()
    if x_weight is not None:
        added = added / torch.sqrt((added * added).mean(-1, keepdim=True) + x_eps) * x_weight.double()
    if gate is not None:
        g = tokens(gate, index).double()
        added = added * (torch.tanh(g) if gate_tanh else g)
    return residual.double() + added, residual.double().abs() + added.abs()


def linear_forecast(
    base: torch.Tensor | None, history: Sequence[torch.Tensor], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forecast, and the summed magnitude of its terms."""
    # The op rounds its weights to fp32.
    terms = [float(torch.tensor(w, dtype=torch.float32)) * t.double() for w, t in zip(weights, history, strict=True)]
    if base is not None:
        terms.insert(0, base.double())
    return sum(terms[1:], terms[0]), sum((t.abs() for t in terms[1:]), terms[0].abs())


def rotated(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    freqs: torch.Tensor | None = None,
    layout: str = "interleaved",
    across_heads: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q or k [B, S, H, Dh], normalised and rotated, and the summed magnitude of its terms.

    freqs are as the op takes them, or for each head: [B or 1, S, H, Dh/2, 2].
    """
    x = x.double()
    B, S, H, D = x.shape
    if weight is not None:
        mean = (x * x).sum((2, 3) if across_heads else 3, keepdim=True) / (H * D if across_heads else D)
        x = x / torch.sqrt(mean + eps) * weight.double().view(H if across_heads else 1, D)
    if freqs is None:
        return x, x.abs()
    turned, terms = torch.empty_like(x), torch.empty_like(x)
    angles = (freqs if freqs.dim() == 5 else freqs.unsqueeze(-3)).double()
    one = torch.arange(D // 2, device=x.device) * (2 if layout == "interleaved" else 1)
    other = one + (1 if layout == "interleaved" else D // 2)
    a, b = x[..., one], x[..., other]
    cos, sin = angles.expand(B, S, -1, D // 2, 2).unbind(-1)
    turned[..., one], turned[..., other] = a * cos - b * sin, a * sin + b * cos
    terms[..., one], terms[..., other] = (a * cos).abs() + (b * sin).abs(), (a * sin).abs() + (b * cos).abs()
    return turned, terms


def gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation, and the summed magnitude of its terms."""
    x = x.double()
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))), x.abs()


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The activation of the gate, times up."""
    return gate.double() / (1 + torch.exp(-gate.double())) * up.double()


#: The largest magnitude of 8-bit values that is used, by dtype.
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e4m3fnuz: 240}


#: The name of a result, its correct value, and the summed magnitude of its terms (None: that of the value itself).
Expected = tuple[str, torch.Tensor, torch.Tensor | None]


def _relative_l1(got: Sequence[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> list[Expected]:
    return [("sums", relative_l1(x, y), None)]


def _sums_of(new: torch.Tensor, previous: torch.Tensor | None) -> Expected:
    """The sums for a rounded tensor and the one before."""
    if previous is None:
        return "sums", new.new_zeros((new.shape[0], 2)), None
    return "sums", sums(new.double() - previous.double(), previous), None


def _residual_relative_l1(
    got: Sequence[torch.Tensor], h_out: torch.Tensor, h_in: torch.Tensor, r_prev: torch.Tensor | None
) -> list[Expected]:
    return [("residual", h_out.double() - h_in.double(), None), _sums_of(got[0], r_prev)]


def _modulated_relative_l1(
    got: Sequence[torch.Tensor],
    h: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    m_prev: torch.Tensor | None,
    **options: Any,
) -> list[Expected]:
    return [("m", *modulated(h, scale, shift, **options)), _sums_of(got[0], m_prev)]


def _linear_forecast(
    got: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    history: Sequence[torch.Tensor],
    weights: Sequence[float] | torch.Tensor,
    out: torch.Tensor | None = None,
) -> list[Expected]:
    numbers = weights.tolist() if isinstance(weights, torch.Tensor) else weights
    return [("out", *linear_forecast(base, history, numbers))]


def _ada_layer_norm(
    got: Sequence[torch.Tensor],
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None = None,
    **options: Any,
) -> list[Expected]:
    return [("y", *modulated(x, scale, shift, **options))]


def _gate_residual_norm(
    got: Sequence[torch.Tensor],
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
    **options: Any,
) -> list[Expected]:
    h: Expected = ("h", *gated_residual(residual, x, gate, index, gate_tanh, x_weight, x_eps))
    if norm is None:
        return [h]
    # y is computed from the rounded h.
    return [h, ("y", *modulated(got[0], scale, shift, norm, index=index, **options))]


def _rms_norm(
    got: Sequence[torch.Tensor], x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-6
) -> list[Expected]:
    return [("y", *modulated(x, None, None, "rms", weight, eps))]


def _qk_norm_rope(
    got: Sequence[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    *places: torch.Tensor | None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    **options: Any,
) -> list[Expected]:
    if cos is not None and sin is not None:
        # Both elements of a pair have the same angle.
        D = q.shape[-1]
        first = slice(0, None, 2) if options.get("layout", "interleaved") == "interleaved" else slice(0, D // 2)
        options["freqs"] = torch.stack((cos[..., first].double(), sin[..., first].double()), -1)
    found: list[Expected] = [
        ("q_out", *rotated(q, q_weight, **options)),
        ("k_out", *rotated(k, k_weight, **options)),
    ]
    return found if v is None else [*found, ("v_out", v.double(), None)]


def _gelu(got: Sequence[torch.Tensor], x: torch.Tensor, out: torch.Tensor | None = None) -> list[Expected]:
    return [("out", *gelu(x))]


def _swiglu(
    got: Sequence[torch.Tensor], gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None
) -> list[Expected]:
    return [("out", swiglu(gate, up), None)]


def _quantize(got: Sequence[torch.Tensor], x: torch.Tensor, dtype: torch.dtype = torch.int8) -> list[Expected]:
    return _in_8_bits(got[1], dtype, x.double(), None)


def _in_8_bits(scale: torch.Tensor, dtype: torch.dtype, y: torch.Tensor, terms: torch.Tensor | None) -> list[Expected]:
    """y in 8 bits, by the actual, rounded scale, and its correct scale. `terms` is as in `Expected`."""
    terms = y.abs() if terms is None else terms
    shape = y.shape
    if dtype == torch.float8_e8m0fnu:
        return _in_mx(scale, y, terms)
    if scale.dim() == y.dim():  # for each group of channels
        y, terms = (t.unflatten(-1, (scale.shape[-1], -1)) for t in (y, terms))
    used = scale.double().unsqueeze(-1)
    valid = used.isfinite() & (used > 0)
    q, steps = (torch.where(valid, t / used, 0.0).view(shape) for t in (y, terms))
    largest, of_terms = (t.abs().amax(-1) / LARGEST[dtype] for t in (y, terms))
    return [("q", q, steps), ("scale", largest, of_terms)]


def _place_in_tiles(tokens: int, columns: int) -> torch.Tensor:
    """Where scale (m, c) of MXFP8 lies in tiles, [tokens, columns]."""
    m, c = torch.arange(tokens)[:, None], torch.arange(columns)[None]
    return ((m // 128) * ((columns + 3) // 4) + c // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + c % 4


def _out_of_mx(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The numbers that q [..., D] in MXFP8 stands for."""
    blocks = q.double().unflatten(-1, (-1, 32))
    if scale.dim() != q.dim():
        scale = scale[_place_in_tiles(blocks[..., 0, 0].numel(), blocks.shape[-2]).to(scale.device)]
    return (blocks * scale.double().view(blocks.shape[:-1]).unsqueeze(-1)).view(q.shape)


def _in_mx(scale: torch.Tensor, y: torch.Tensor, terms: torch.Tensor) -> list[Expected]:
    """y in MXFP8, by the actual scales, and the correct scales where they lie. Padding is as it is.

    A scale is the smallest power of two with which no value is above 448. Where rounding decides, both are correct.
    """
    blocks, of_terms = (t.unflatten(-1, (-1, 32)) for t in (y, terms))
    rows = blocks.flatten(0, -3)
    largest = rows.abs().amax(-1) if rows.numel() else rows.new_zeros(rows.shape[:-1])
    place = None
    if scale.dim() != y.dim():
        place = _place_in_tiles(*rows.shape[:2]).to(scale.device)
    actual = scale.double().flatten() if place is None else scale.double()[place]
    actual = actual.view(largest.shape)
    room = 1 + 2.0**-10
    near = (actual <= 2 * room * largest / 448) & (actual >= largest / 448 / room)
    correct = torch.exp2(torch.ceil(torch.log2(largest / 448)).clamp_min(-127))
    correct = torch.where(largest.isfinite(), torch.where(near, actual, correct), torch.nan)
    used = torch.where(correct.isfinite(), correct, torch.inf).view(blocks.shape[:-1]).unsqueeze(-1)
    q, steps = (torch.where(used.isfinite(), t / used, 0.0).view(y.shape) for t in (blocks, of_terms))
    told = scale.double().clone()
    if place is None:
        told = correct.view(scale.shape)
    else:
        told[place] = correct
    return [("q", q, steps), ("scale", told, None)]


def _scaled_mm(
    got: Sequence[torch.Tensor],
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gelu: bool = False,
    out: torch.Tensor | None = None,
) -> list[Expected]:
    if scale.dtype == torch.float8_e8m0fnu:
        x, w = _out_of_mx(q, scale), _out_of_mx(weight, weight_scale)
    else:
        x, w = q.double(), weight.double() * weight_scale.double()[:, None]
        x = x.unflatten(-1, (-1, x.shape[-1] // scale.shape[-1])) if scale.dim() == q.dim() else x
        x = (x * scale.double().unsqueeze(-1)).view(q.shape)
    y, terms = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        y, terms = y + bias.double(), terms + bias.double().abs()
    if q.dtype != torch.int8:
        # NVIDIA's products of fp8 keep 14 bits of their sums (DeepSeek-V3, arXiv:2412.19437, 3.3.2).
        terms = terms * 64
    return [("y", 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))) if gelu else y, terms)]


ORACLES: dict[str, Callable[..., list[Expected]]] = {
    "relative_l1": _relative_l1,
    "residual_relative_l1": _residual_relative_l1,
    "modulated_relative_l1": _modulated_relative_l1,
    "linear_forecast": _linear_forecast,
    "ada_layer_norm": _ada_layer_norm,
    "gate_residual_norm": _gate_residual_norm,
    "rms_norm": _rms_norm,
    "qk_norm_rope": _qk_norm_rope,
    "gelu": _gelu,
    "swiglu": _swiglu,
    "quantize": _quantize,
    "scaled_mm": _scaled_mm,
}


def expected(
    op: str,
    got: Sequence[torch.Tensor],
    *args: Any,
    quantize: torch.dtype | None = None,
    beside: bool = False,
    **kwargs: Any,
) -> list[Expected]:
    """The correct results of `op` for `args` and `kwargs`.

    Args:
        op: key of `omni_kernels.ops.OPS`.
        got: its actual results. If the op computes one result from another, rounded one, the oracle uses it too.
        quantize: the 8-bit dtype of the last result, if the op was asked for one.
        beside: whether it was also asked for the unrounded result.
    """
    exact = ORACLES[op](got, *args, **kwargs)
    if quantize is None:
        return exact
    *others, (name, y, terms) = exact
    made = _in_8_bits(got[len(others) + 1], quantize, y, terms)
    return [*others, *made, *([(name, y, terms)] if beside else [])]
