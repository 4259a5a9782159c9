"""Results: pictures are written whole, and what is not a number is no picture."""

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni_runtime.files import WriteError
from omni_runtime.generation.result import NotANumberError, OmniResult, Timings, not_a_number, read_settings


def result(images: Any) -> OmniResult:
    return OmniResult(images, None, Timings(1.0, 0.0, [1.0], 0.0), settings={"seed": 0})


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (place, 0, 0)) for place in range(count)]


def test_a_full_disk_leaves_no_half_picture_and_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cat-3.png").write_bytes(b"before")
    written = iter([None, None])

    def fsync(number: int) -> None:
        if next(written, "full") == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    message = r"cannot write .*cat-3\.png: No space left on device; 2 of 4 pictures were kept"
    with pytest.raises(WriteError, match=message):
        result(pictures(4)).save(tmp_path / "cat.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat-2.png", "cat-3.png", "cat.png"]
    assert (tmp_path / "cat-3.png").read_bytes() == b"before"
    for place, name in enumerate(["cat.png", "cat-2.png"]):
        assert read_settings(tmp_path / name) == {"seed": 0}
        assert Image.open(tmp_path / name).getpixel((0, 0)) == (place, 0, 0)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/file/in"):
        result(pictures(1)).save(tmp_path / "file" / "in" / "cat.png")


def to_uint8(array: np.ndarray) -> np.ndarray:
    return (array * 255).round().astype("uint8")  # as diffusers' image processor has it


def test_nan_in_a_picture_is_an_error_within() -> None:
    from diffusers.image_processor import VaeImageProcessor

    decoded = torch.zeros(1, 3, 8, 8)
    decoded[0, 1, 2, 3] = torch.nan
    with not_a_number():
        VaeImageProcessor().postprocess(torch.zeros(1, 3, 8, 8))
    with pytest.raises(NotANumberError, match=r"^the picture contains NaN:"), not_a_number():
        VaeImageProcessor().postprocess(decoded)


def test_numpys_other_warnings_stay_warnings() -> None:
    with pytest.warns(RuntimeWarning, match="invalid value encountered in log"), not_a_number():
        np.log(np.array([-1.0]))
    with warnings.catch_warnings(), not_a_number():
        warnings.simplefilter("error")
        np.array([1e-300]) * 1e-300
        to_uint8(np.array([0.0, 0.5, 1.0]))
    with pytest.warns(RuntimeWarning, match="in cast"):
        to_uint8(np.array([np.nan]))  # outside, it is as ever


@pytest.mark.parametrize(
    "images", [torch.tensor([0.0, torch.nan]), np.array([np.nan]), [torch.zeros(1), torch.tensor(torch.nan)]]
)
def test_a_result_of_nan_is_an_error(images: Any) -> None:
    with pytest.raises(NotANumberError):
        result(images)


@pytest.mark.parametrize("images", [torch.tensor([0, 1]), torch.tensor([torch.inf]), np.array([1]), pictures(1), ["x"]])
def test_any_other_result_is_none(images: Any) -> None:
    assert result(images).images is images
