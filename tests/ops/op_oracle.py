"""The ops in fp64, written from their formulas and sharing nothing with the implementations."""

from collections.abc import Sequence

import torch


def sums(difference: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Per sample, Σ|difference| and Σ|magnitude|."""
    rows = [[d.double().abs().sum(), m.double().abs().sum()] for d, m in zip(difference, magnitude, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def relative_l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return sums(x.double() - y.double(), y)


def tokens(t: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
    """A modulation as every token takes it."""
    if index is not None:
        B = len(t) // 2
        return torch.stack([torch.stack([t[b + B * (i != 0)] for i in row]) for b, row in enumerate(index.tolist())])
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
    """m, and the magnitude of the terms that it is the sum of."""
    x = h.double()
    mean = x.mean(-1, keepdim=True) if norm == "layer" else torch.zeros(())
    centred = x - mean
    deviation = torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    m, terms = centred / deviation, (x.abs() + mean.abs()) / deviation
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
    """h, and the magnitude of the terms that it is the sum of."""
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
    """The forecast, and the magnitude of the terms that it is the sum of."""
    # The weights are fp32 numbers.
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
    """q or k [B, S, H, Dh], normed and rotated, and the magnitude of the terms that it is the sum of."""
    x = x.double()
    B, S, H, D = x.shape
    if weight is not None:
        mean = (x * x).sum((2, 3) if across_heads else 3, keepdim=True) / (H * D if across_heads else D)
        x = x / torch.sqrt(mean + eps) * weight.double().view(H if across_heads else 1, D)
    if freqs is None:
        return x, x.abs()
    turned, terms = torch.empty_like(x), torch.empty_like(x)
    angles = freqs.double().expand(B, S, D // 2, 2)
    for i in range(D // 2):
        one, other = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + D // 2)
        cos, sin = angles[:, :, i, 0, None], angles[:, :, i, 1, None]
        turned[..., one] = x[..., one] * cos - x[..., other] * sin
        turned[..., other] = x[..., one] * sin + x[..., other] * cos
        terms[..., one] = (x[..., one] * cos).abs() + (x[..., other] * sin).abs()
        terms[..., other] = (x[..., one] * sin).abs() + (x[..., other] * cos).abs()
    return turned, terms


def gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation, and the magnitude of the terms that it is the sum of."""
    x = x.double()
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))), x.abs()


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.double() / (1 + torch.exp(-gate.double())) * up.double()


def cfg_combine(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, rescale: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The combination, and the magnitude of the terms that it is the sum of."""
    c, u = cond.double(), uncond.double()
    out = u + scale * (c - u)
    terms = u.abs() + abs(scale) * (c.abs() + u.abs())
    if rescale == "token":
        size = (out * out).sum(-1, keepdim=True).sqrt()
        factor = (c * c).sum(-1, keepdim=True).sqrt() / size
        # What is lost on the terms shows in the norm as well.
        terms = factor * (terms + out.abs() * (terms * terms).sum(-1, keepdim=True).sqrt() / size)
        out = out * factor
    return out, terms
