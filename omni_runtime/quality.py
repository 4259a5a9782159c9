"""How near two images are: PSNR and SSIM, in float arithmetic.

PSNR = 10·log₁₀(range² / mean((a − b)²)) in decibels; identical images give inf.

SSIM = mean over positions and channels of ((2μₐμ_b + C₁)(2σ_ab + C₂)) / ((μₐ² + μ_b² + C₁)(σₐ² + σ_b² + C₂)), with
means, variances and covariance under an 11×11 Gaussian window of σ = 1.5, C₁ = (0.01·range)², C₂ = (0.03·range)², and
only windows that lie wholly inside the image. Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error
visibility to structural similarity", 2004.

8-bit images become float64 before anything is subtracted: a difference of uint8 arrays wraps modulo 256, and unrelated
images then read 28 dB instead of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

    Images: TypeAlias = torch.Tensor | np.ndarray | Image.Image | Sequence[Any]

__all__ = ["as_float", "psnr", "ssim"]

WINDOW = 11
WINDOW_SIGMA = 1.5
K1, K2 = 0.01, 0.03


def as_float(images: Images) -> torch.Tensor:
    """Images as a float64 tensor [..., C, H, W].

    Takes a torch tensor [..., C, H, W], a numpy array [..., H, W, C], a PIL image (as RGB), or a sequence of these,
    which are stacked. uint8 becomes 0–1; floating-point values stay as they are. Any other dtype raises TypeError,
    fewer than three dimensions ValueError.
    """
    if isinstance(images, torch.Tensor):
        tensor = images.detach()
    elif isinstance(images, np.ndarray):
        if images.ndim < 3:
            raise ValueError(f"an image array needs at least 3 dimensions [H, W, C], got shape {images.shape}")
        tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))
    elif hasattr(images, "convert"):
        return as_float(np.asarray(images.convert("RGB")))
    else:
        return torch.stack([as_float(image) for image in images])
    if tensor.ndim < 3:
        raise ValueError(f"an image tensor needs at least 3 dimensions [C, H, W], got shape {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        return tensor.double() / 255
    if not tensor.is_floating_point():
        raise TypeError(f"images are uint8 or floating point, got {tensor.dtype}")
    return tensor.double()


def psnr(a: Images, b: Images, data_range: float = 1.0) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, one float64 value per image: shape [...] for images [..., C, H, W].

    `data_range` is the distance from black to white: 1 for images in 0–1 (and for uint8, which is scaled to that),
    2 for −1–1. Inputs as for `as_float`; different shapes raise ValueError. Identical images give inf.
    """
    a, b = _pair(a, b, data_range)
    error = (a - b).square().mean(dim=(-3, -2, -1))
    return 10 * torch.log10(data_range**2 / error)


def ssim(a: Images, b: Images, data_range: float = 1.0) -> torch.Tensor:
    """Structural similarity, −1 to 1, one float64 value per image: shape [...] for images [..., C, H, W].

    Inputs as for `as_float`, at least 11×11 pixels; different shapes or smaller images raise ValueError.
    """
    a, b = _pair(a, b, data_range)
    height, width = a.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}×{WINDOW} pixels, got {height}×{width}")
    planes = torch.stack([a, b, a * a, b * b, a * b])
    mean_a, mean_b, square_a, square_b, product = _window_mean(planes)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    variances = (square_a - mean_a**2) + (square_b - mean_b**2)
    structure = (2 * (product - mean_a * mean_b) + c2) / (variances + c2)
    return (luminance * structure).mean(dim=(-3, -2, -1))


def _pair(a: Images, b: Images, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    if not data_range > 0:
        raise ValueError(f"data_range is the distance from black to white, above 0; got {data_range}")
    first, second = as_float(a), as_float(b)
    if first.shape != second.shape:
        raise ValueError(f"images of different shapes: {tuple(first.shape)} and {tuple(second.shape)}")
    return first, second.to(first.device)


def _window_mean(planes: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted mean of each 11×11 window, [..., H, W] to [..., H−10, W−10]; separable: two passes of 11."""
    offsets = torch.arange(WINDOW, dtype=planes.dtype, device=planes.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    weights = weights / weights.sum()
    return planes.unfold(-2, WINDOW, 1).matmul(weights).unfold(-1, WINDOW, 1).matmul(weights)
