"""The ops in fp64, written from their formulas and sharing nothing with the implementations."""

from collections.abc import Sequence

import torch


def sums(difference: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Per sample, Σ|difference| and Σ|magnitude|."""
    rows = [[d.double().abs().sum(), m.double().abs().sum()] for d, m in zip(difference, magnitude, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def relative_l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return sums(x.double() - y.double(), y)


def modulated(
    h: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """m, and the magnitude of the terms that it is the sum of."""

    def tokens(t: torch.Tensor) -> torch.Tensor:
        return (t[:, None, :] if t.dim() == 2 else t).double()

    x = h.double()
    mean = x.mean(-1, keepdim=True) if norm == "layer" else torch.zeros(())
    centred = x - mean
    deviation = torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    gain = 1 + tokens(scale)
    terms = (x.abs() + mean.abs()) / deviation
    if weight is not None:
        gain = gain * weight.double()
    m = centred / deviation * gain
    terms = terms * (1 + tokens(scale).abs()) * (1 if weight is None else weight.double().abs())
    return (m, terms) if shift is None else (m + tokens(shift), terms + tokens(shift).abs())


def linear_forecast(
    base: torch.Tensor | None, history: Sequence[torch.Tensor], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forecast, and the magnitude of the terms that it is the sum of."""
    # The weights are fp32 numbers.
    terms = [float(torch.tensor(w, dtype=torch.float32)) * t.double() for w, t in zip(weights, history, strict=True)]
    if base is not None:
        terms.insert(0, base.double())
    return sum(terms[1:], terms[0]), sum((t.abs() for t in terms[1:]), terms[0].abs())
