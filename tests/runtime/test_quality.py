"""PSNR and SSIM against formulas written another way: numpy, explicit loops over pixels and windows."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from omni_runtime.quality import as_float, psnr, ssim


def picture(seed: int, height: int = 17, width: int = 23) -> np.ndarray:
    """uint8 H×W×3: a gradient with noise."""
    random = np.random.default_rng(seed)
    gradient = np.linspace(20, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    return (gradient + random.normal(0, 25, gradient.shape)).clip(0, 255).astype(np.uint8)


def psnr_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        total += (x / 255 - y / 255) ** 2
    return -10 * math.log10(total / a.size)


def ssim_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    """Every 11×11 window by itself, with a two-dimensional Gaussian and central moments."""
    y, x = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(x * x + y * y) / 4.5)
    weights /= weights.sum()
    a, b = a / 255, b / 255
    values = []
    for channel in range(a.shape[2]):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                p = a[top : top + 11, left : left + 11, channel]
                q = b[top : top + 11, left : left + 11, channel]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                values.append(((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(values))


def test_psnr_is_the_formula() -> None:
    a, b = picture(0), picture(1)
    assert float(psnr(a, b)) == pytest.approx(psnr_by_loops(a, b), abs=1e-9)


def test_ssim_is_the_formula() -> None:
    a, b = picture(0), picture(1)
    assert float(ssim(a, b)) == pytest.approx(ssim_by_loops(a, b), abs=1e-9)
    assert 0 < float(ssim(a, b)) < 0.9


def test_identical_images_are_infinitely_near() -> None:
    a = picture(0)
    assert float(psnr(a, a)) == math.inf
    assert float(ssim(a, a)) == pytest.approx(1.0, abs=1e-12)


def test_known_values() -> None:
    black, white = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)
    assert float(psnr(black, white)) == pytest.approx(0.0, abs=1e-12)
    assert float(psnr(black, black + 0.1)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(-white, white, data_range=2.0)) == pytest.approx(0.0, abs=1e-12)
    constant = (2 * 0 * 1 + 1e-4) / (0 + 1 + 1e-4)  # no variance: the luminance term alone
    assert float(ssim(black, white)) == pytest.approx(constant, abs=1e-12)


def test_uint8_images_do_not_wrap() -> None:
    """What subtraction in uint8 makes of them: black against white 48 dB, unrelated images 28."""

    def psnr_in_uint8(a: np.ndarray, b: np.ndarray) -> float:
        return float(20 * np.log10(255 / np.sqrt(((a - b) ** 2).mean())))

    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert psnr_in_uint8(black, white) == pytest.approx(48.1, abs=0.1)
    assert float(psnr(black, white)) == pytest.approx(0.0, abs=1e-9)

    random = np.random.default_rng(0)
    a, b = random.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert psnr_in_uint8(a, b) > 27
    assert float(psnr(a, b)) == pytest.approx(7.8, abs=0.2)


def test_every_kind_of_image_reads_the_same() -> None:
    a, b = picture(0), picture(1)
    expected = float(psnr(a, b))
    channels_first = [torch.from_numpy(image).permute(2, 0, 1) for image in (a, b)]
    assert float(psnr(*map(Image.fromarray, (a, b)))) == expected
    assert float(psnr(*channels_first)) == expected
    assert float(psnr(Image.fromarray(a), channels_first[1])) == expected
    assert float(psnr(a / 255, b / 255)) == pytest.approx(expected, abs=1e-9)


def test_a_batch_gives_one_value_per_image() -> None:
    batch_a, batch_b = [picture(seed) for seed in range(3)], [picture(seed + 3) for seed in range(3)]
    for measure in (psnr, ssim):
        values = measure([Image.fromarray(image) for image in batch_a], np.stack(batch_b))
        assert values.shape == (3,)
        for value, a, b in zip(values, batch_a, batch_b, strict=True):
            assert float(value) == pytest.approx(float(measure(a, b)), abs=1e-12)


def test_half_precision_is_compared_in_double() -> None:
    a = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert as_float(a).dtype == torch.float64
    assert float(psnr(a, a.float())) == math.inf


def test_grey_and_transparent_pictures_become_rgb() -> None:
    grey = Image.fromarray(picture(0)).convert("L")
    assert as_float(grey).shape == as_float(grey.convert("RGBA")).shape == (3, 17, 23)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 12, 12), torch.zeros(3, 12, 13)), ValueError, "different shapes"),
        ((torch.zeros(12, 12), torch.zeros(12, 12)), ValueError, "3 dimensions"),
        ((np.zeros((12, 12)), np.zeros((12, 12))), ValueError, "3 dimensions"),
        ((torch.zeros(3, 12, 12, dtype=torch.int32),) * 2, TypeError, "int32"),
        ((torch.zeros(3, 12, 12), torch.zeros(3, 12, 12), 0.0), ValueError, "data_range"),
    ],
)
def test_wrong_input_is_named(arguments: tuple, error: type[Exception], message: str) -> None:
    for measure in (psnr, ssim):
        with pytest.raises(error, match=message):
            measure(*arguments)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="11×11 pixels, got 10×64"):
        ssim(torch.zeros(3, 10, 64), torch.zeros(3, 10, 64))
