"""The measures against formulas written another way: numpy, explicit loops over pixels and windows."""

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional.image as torchmetrics
from PIL import Image

from omni_runtime.compare import quality
from omni_runtime.compare.quality import (
    as_float,
    latents_psnr,
    lpips,
    lpips_missing,
    ms_ssim,
    ms_ssim_scales,
    psnr,
    ssim,
)


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


def ms_ssim_by_windows(a: np.ndarray, b: np.ndarray, weights: list[float]) -> float:
    """All 11×11 windows at once, with a two-dimensional Gaussian and central moments; halved by means of 2×2 pixels."""
    y, x = np.mgrid[-5:6, -5:6]
    gaussian = np.exp(-(x * x + y * y) / 4.5)
    gaussian /= gaussian.sum()
    a, b = a / 255, b / 255
    product = 1.0
    for number, weight in enumerate(weights, 1):
        p, q = (np.lib.stride_tricks.sliding_window_view(image, (11, 11), (0, 1)) for image in (a, b))
        mp, mq = ((gaussian * windows).sum((-2, -1), keepdims=True) for windows in (p, q))
        vp, vq, cov = (
            (gaussian * one * two).sum((-2, -1)) for one, two in ((p - mp,) * 2, (q - mq,) * 2, (p - mp, q - mq))
        )
        mp, mq = mp[..., 0, 0], mq[..., 0, 0]
        similarity = (2 * cov + 9e-4) / (vp + vq + 9e-4)
        if number == len(weights):
            similarity = similarity * (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
        product *= similarity.mean() ** weight
        height, width = (side // 2 * 2 for side in a.shape[:2])
        a, b = (
            (i[0:height:2, 0:width:2] + i[1:height:2, 0:width:2] + i[0:height:2, 1:width:2] + i[1:height:2, 1:width:2])
            / 4
            for i in (a, b)
        )
    return float(product)


def test_psnr_is_the_formula() -> None:
    a, b = picture(0), picture(1)
    assert float(psnr(a, b)) == pytest.approx(psnr_by_loops(a, b), abs=1e-9)


def test_ssim_is_the_formula() -> None:
    a, b = picture(0), picture(1)
    assert float(ssim(a, b)) == pytest.approx(ssim_by_loops(a, b), abs=1e-9)
    assert 0 < float(ssim(a, b)) < 0.9


@pytest.mark.parametrize(
    ("height", "width", "weights"),
    [
        (177, 190, [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]),
        (65, 64, [0.0448 / 0.6305, 0.2856 / 0.6305, 0.3001 / 0.6305]),
        (17, 23, [1.0]),
    ],
)
def test_ms_ssim_is_the_formula_over_as_many_scales_as_fit(height: int, width: int, weights: list[float]) -> None:
    a, b = picture(0, height, width), picture(1, height, width)
    assert ms_ssim_scales(height, width) == len(weights)
    assert float(ms_ssim(a, b)) == pytest.approx(ms_ssim_by_windows(a, b, weights), abs=1e-9)


def test_ms_ssim_weights_add_up_to_one_and_scales_end_at_the_window() -> None:
    assert sum(quality.SCALE_WEIGHTS) == pytest.approx(1.0, abs=1e-3), "as published"
    sides = {10: 0, 11: 1, 21: 1, 22: 2, 64: 3, 87: 3, 88: 4, 175: 4, 176: 5, 4096: 5}
    assert {side: ms_ssim_scales(side, 4096) for side in sides} == sides


def test_a_negative_of_a_picture_is_not_similar_at_all() -> None:
    """Negative correlations have no fractional power: the scale counts as 0, not as nan."""
    a = picture(0, 64, 64)
    assert float(ms_ssim(a, 255 - a)) == 0.0


def test_identical_images_are_infinitely_near() -> None:
    a = picture(0)
    assert float(psnr(a, a)) == math.inf
    assert float(ssim(a, a)) == pytest.approx(1.0, abs=1e-12)
    assert float(ms_ssim(a, a)) == pytest.approx(1.0, abs=1e-12)


# Latents


def test_latents_are_measured_in_the_range_of_the_reference() -> None:
    reference = torch.linspace(-3, 5, 100).reshape(1, 25, 4)
    assert float(latents_psnr(reference, reference + 0.8)) == pytest.approx(20.0, abs=1e-4)
    assert float(latents_psnr(reference.bfloat16(), reference.bfloat16())) == math.inf
    with pytest.raises(ValueError, match="different shapes"):
        latents_psnr(reference, reference[:, :24])


# LPIPS, whose package and weights are seldom there


def test_without_its_package_lpips_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    assert "pip install lpips" in (lpips_missing() or "")
    with pytest.raises(ModuleNotFoundError, match="needs the package lpips"):
        lpips(picture(0), picture(1))


@pytest.fixture
def lpips_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package of that name whose network is the mean difference; returns where the weights are looked for."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, version: str, verbose: bool) -> None:
            super().__init__()
            assert (net, version) == ("alex", "0.1")

        def forward(self, a: torch.Tensor, b: torch.Tensor, normalize: bool) -> torch.Tensor:
            assert normalize, "values are 0–1"
            assert a.dtype == torch.float32
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    module = types.ModuleType("lpips")
    vars(module).update(LPIPS=LPIPS, __spec__=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    quality._lpips_network.cache_clear()
    return tmp_path / "checkpoints" / quality.LPIPS_WEIGHTS


def test_without_its_weights_lpips_says_so_and_downloads_nothing(
    lpips_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download was tried"))
    assert str(lpips_package) in (lpips_missing() or "")
    with pytest.raises(FileNotFoundError, match="AlexNet's weights"):
        lpips(picture(0), picture(1))


def test_lpips_gives_one_distance_per_image(lpips_package: Path) -> None:
    lpips_package.parent.mkdir()
    lpips_package.touch()
    assert lpips_missing() is None
    a, b = picture(0), picture(1)
    expected = np.abs(a / 255 - b / 255).mean()
    assert float(lpips(a, b)) == pytest.approx(expected, abs=1e-6)
    assert lpips([a, a], [a, b]).tolist() == [0.0, pytest.approx(expected, abs=1e-6)]
    assert lpips(a, b).shape == ()


# Inputs


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
    for measure in (psnr, ssim, ms_ssim):
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
    for measure in (psnr, ssim, ms_ssim):
        with pytest.raises(error, match=message):
            measure(*arguments)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_images_smaller_than_the_window_are_refused(measure: Any) -> None:
    with pytest.raises(ValueError, match="11×11 pixels, got 10×64"):
        measure(torch.zeros(3, 10, 64), torch.zeros(3, 10, 64))


# Against torchmetrics


def torchmetrics_ssim(a: torch.Tensor, b: torch.Tensor, data_range: float) -> torch.Tensor:
    """Means over the windows that lie inside: torchmetrics' own mean is over a padded image, too."""
    how: dict[str, Any] = {"data_range": data_range, "reduction": "none", "return_full_image": True}
    _, everywhere = torchmetrics.structural_similarity_index_measure(a, b, **how)
    return everywhere[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))


@pytest.mark.parametrize("data_range", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 3, 33, 41), (1, 1, 11, 64), (2, 3, 192, 180)])
def test_measures_are_those_of_torchmetrics(shape: tuple[int, ...], data_range: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(shape, generator=generator, dtype=torch.float64) * data_range
    b = (a + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(0, data_range)
    theirs = torchmetrics.peak_signal_noise_ratio(b, a, data_range, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(a, b, data_range), theirs, rtol=1e-7, atol=0)  # its 10 / log(10) is in float32
    torch.testing.assert_close(ssim(a, b, data_range), torchmetrics_ssim(a, b, data_range), rtol=1e-9, atol=0)
    ours = ms_ssim(a, b, data_range)
    weights = quality.SCALE_WEIGHTS[: ms_ssim_scales(*shape[-2:])]
    total = 1.0 if len(weights) == 5 else sum(weights)  # all five are taken as they are
    product = torch.ones(shape[0], dtype=torch.float64)
    for weight in weights[:-1]:
        how: dict[str, Any] = {"data_range": data_range, "reduction": "none", "return_contrast_sensitivity": True}
        _, structure = torchmetrics.structural_similarity_index_measure(a, b, **how)
        product *= structure ** (weight / total)
        a, b = (torch.nn.functional.avg_pool2d(one, 2) for one in (a, b))
    product *= torchmetrics_ssim(a, b, data_range) ** (weights[-1] / total)
    torch.testing.assert_close(ours, product, rtol=1e-9, atol=0)
