"""How similar two images are: PSNR, SSIM, MS-SSIM and LPIPS, and the PSNR of the latents they were decoded from.

PSNR = 10·log₁₀(range² / mean((a − b)²)) in decibels; identical images give inf.

SSIM = mean over positions and channels of l·cs, with l = (2μₐμ_b + C₁) / (μₐ² + μ_b² + C₁) and
cs = (2σ_ab + C₂) / (σₐ² + σ_b² + C₂): means, variances and covariance under an 11×11 Gaussian window of σ = 1.5,
C₁ = (0.01·range)², C₂ = (0.03·range)², and only windows that lie wholly inside the image. Wang, Bovik, Sheikh,
Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004.

MS-SSIM = Π cs_j^w_j · (l·cs)_M^w_M over M scales, each half the size of the last (2×2 means), with the mean over
positions and channels taken at each scale, and w = 0.0448, 0.2856, 0.3001, 0.2363, 0.1333. Wang, Simoncelli, Bovik,
"Multi-scale structural similarity for image quality assessment", 2003. The coarsest scale must hold a window: all five
need 176 pixels on the shorter side. Smaller images use as many of the first scales as fit, with the weights divided by
their sum. 64×64 pixels have three scales; such values are not comparable with those of five scales.

LPIPS is a distance between the features of a network (AlexNet): Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable
effectiveness of deep features as a perceptual metric", 2018. It needs the package `lpips` and the network's weights.
This module downloads neither; `lpips_missing` says what is missing.

8-bit images are converted to float64 before any subtraction. A difference of uint8 arrays wraps modulo 256: unrelated
images would get 28 dB instead of 8.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

    Images: TypeAlias = torch.Tensor | np.ndarray | Image.Image | Sequence[Any]

__all__ = ["as_float", "latents_psnr", "lpips", "lpips_missing", "ms_ssim", "ms_ssim_scales", "psnr", "ssim"]

WINDOW = 11
WINDOW_SIGMA = 1.5
K1, K2 = 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

#: File name of the backbone's weights in torch.hub's directory of checkpoints, as torchvision saves them.
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"


def as_float(images: Images) -> torch.Tensor:
    """Convert images to a float64 tensor [..., C, H, W].

    Takes a torch tensor [..., C, H, W], a numpy array [..., H, W, C], a PIL image (as RGB), or a sequence of these,
    which are stacked. uint8 is scaled to 0–1; floating-point values stay as they are.

    Raises:
        TypeError: the dtype is neither uint8 nor floating point.
        ValueError: there are fewer than three dimensions.
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
    2 for −1–1. Inputs are as for `as_float`. Different shapes raise ValueError. Identical images give inf.
    """
    a, b = _pair(a, b, data_range)
    error = (a - b).square().mean(dim=(-3, -2, -1))
    return 10 * torch.log10(data_range**2 / error)


def latents_psnr(reference: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of latents against a reference's, one float64 value for the whole tensor.

    Latents have no black and white, so the range is the reference's largest − smallest value. Different shapes raise
    ValueError. Identical latents give inf.
    """
    if reference.shape != latents.shape:
        raise ValueError(f"latents of different shapes: {tuple(reference.shape)} and {tuple(latents.shape)}")
    reference = reference.detach().double()
    error = (reference - latents.detach().to(reference.device).double()).square().mean()
    return 10 * torch.log10((reference.max() - reference.min()).square() / error)


def ssim(a: Images, b: Images, data_range: float = 1.0) -> torch.Tensor:
    """Structural similarity, −1 to 1, one float64 value per image: shape [...] for images [..., C, H, W].

    Inputs as for `as_float`, at least 11×11 pixels; different shapes or smaller images raise ValueError.
    """
    a, b = _pair(a, b, data_range)
    _scales_of(a, "SSIM")
    luminance, structure = _ssim_maps(a, b, data_range)
    return (luminance * structure).mean(dim=(-3, -2, -1))


def ms_ssim(a: Images, b: Images, data_range: float = 1.0) -> torch.Tensor:
    """Multi-scale structural similarity, 0 to 1, one float64 value per image: shape [...] for images [..., C, H, W].

    Inputs: as for `as_float`, at least 11×11 pixels. Different shapes or smaller images raise ValueError. Images with
    a side below 176 pixels have fewer than five scales (`ms_ssim_scales`), whose weights are divided by their sum. A
    scale with a negative mean counts as 0.
    """
    a, b = _pair(a, b, data_range)
    weights = SCALE_WEIGHTS[: _scales_of(a, "MS-SSIM")]
    if len(weights) < len(SCALE_WEIGHTS):
        weights = tuple(weight / sum(weights) for weight in weights)
    product = torch.ones((), dtype=torch.float64, device=a.device)
    for number, weight in enumerate(weights, 1):
        luminance, structure = _ssim_maps(a, b, data_range)
        similarity = luminance * structure if number == len(weights) else structure
        product = product * similarity.mean(dim=(-3, -2, -1)).clamp(min=0) ** weight
        a, b = _halved(a), _halved(b)
    return product


def ms_ssim_scales(height: int, width: int) -> int:
    """Return how many of its five scales MS-SSIM uses for images of this size; 0 if not even one window fits."""
    return sum(min(height, width) >> scale >= WINDOW for scale in range(len(SCALE_WEIGHTS)))


def lpips(a: Images, b: Images, data_range: float = 1.0) -> torch.Tensor:
    """LPIPS distance (AlexNet, version 0.1), 0 for identical images: shape [...] for RGB images [..., 3, H, W].

    The images' values are from 0 to `data_range`.

    Raises:
        ModuleNotFoundError: the package `lpips` is missing; the message is that of `lpips_missing`.
        FileNotFoundError: the weights are missing; the message is that of `lpips_missing`.
        ValueError: the shapes differ.
    """
    missing = lpips_missing()
    if missing is not None:
        raise (ModuleNotFoundError if importlib.util.find_spec("lpips") is None else FileNotFoundError)(missing)
    a, b = _pair(a, b, data_range)
    first, second = (images.flatten(0, -4) if images.ndim > 3 else images[None] for images in (a, b))
    with torch.no_grad():
        distances = _lpips_network()(first.float() / data_range, second.float() / data_range, normalize=True)
    return distances.double().reshape(a.shape[:-3])


def lpips_missing() -> str | None:
    """Return what LPIPS needs and does not find, and how to get it; None if nothing is missing. Downloads nothing."""
    if importlib.util.find_spec("lpips") is None:
        return "LPIPS needs the package lpips: pip install lpips"
    path = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
    if not path.is_file():
        return (
            f"LPIPS needs AlexNet's weights in {path}: where there is a network, "
            """python -c "import torchvision; torchvision.models.alexnet(weights='DEFAULT')" puts them there"""
        )
    return None


@functools.cache
def _lpips_network() -> Any:
    from lpips import LPIPS

    return LPIPS(net="alex", version="0.1", verbose=False).eval()


def _pair(a: Images, b: Images, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    if not data_range > 0:
        raise ValueError(f"data_range is the distance from black to white, above 0; got {data_range}")
    first, second = as_float(a), as_float(b)
    if first.shape != second.shape:
        raise ValueError(f"images of different shapes: {tuple(first.shape)} and {tuple(second.shape)}")
    return first, second.to(first.device)


def _scales_of(images: torch.Tensor, name: str) -> int:
    height, width = images.shape[-2:]
    scales = ms_ssim_scales(height, width)
    if scales == 0:
        raise ValueError(f"{name} needs images of at least {WINDOW}×{WINDOW} pixels, got {height}×{width}")
    return scales


def _ssim_maps(a: torch.Tensor, b: torch.Tensor, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return l and cs at every position of the window, each [..., C, H−10, W−10]."""
    mean_a, mean_b, square_a, square_b, product = _window_mean(torch.stack([a, b, a * a, b * b, a * b]))
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    variances = (square_a - mean_a**2) + (square_b - mean_b**2)
    return luminance, (2 * (product - mean_a * mean_b) + c2) / (variances + c2)


def _halved(images: torch.Tensor) -> torch.Tensor:
    """Return the means of 2×2 pixels. An odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in images.shape[-2:])
    images = images[..., :height, :width].unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return images.mean(dim=(-3, -1))


def _window_mean(planes: torch.Tensor) -> torch.Tensor:
    """Return the Gaussian-weighted mean of each 11×11 window: [..., H, W] to [..., H−10, W−10], in two passes of 11."""
    offsets = torch.arange(WINDOW, dtype=planes.dtype) - WINDOW // 2
    gaussian = torch.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    weights: list[float] = (gaussian / gaussian.sum()).tolist()
    for side in (-2, -1):  # sums of shifted planes: unfolded windows would take 11 times the memory
        length = planes.shape[side] - WINDOW + 1
        mean = planes.narrow(side, 0, length) * weights[0]
        for start in range(1, WINDOW):
            mean.add_(planes.narrow(side, start, length), alpha=weights[start])
        planes = mean
    return planes
