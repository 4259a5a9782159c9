"""Videos: what is written can be read again, with its settings, and a comparison measures frames and motion."""

import base64
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from omni_runtime import Omni, cli
from omni_runtime.compare import cells, showing
from omni_runtime.compare import comparison as compare
from omni_runtime.compare.cells import Run
from omni_runtime.generation import video
from omni_runtime.generation.result import NotANumberError, OmniResult, Timings, read_settings

pytestmark = pytest.mark.usefixtures("no_environment")

SMALL = {"height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 4}
ENDINGS = [
    pytest.param(".mp4", marks=pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs av")),
    ".webp",
]


def frames(count: int = 6, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    """Different frames, except that the third and fourth are alike, and the last two."""
    shades = [40 * min(number - (number > 2), count - 3) for number in range(count)]
    return [Image.new("RGB", size, (shade, 90, 255 - shade)) for shade in shades]


def result(*videos: Any, images: Any = None, **settings: Any) -> OmniResult:
    return OmniResult(
        images, None, Timings(1.0, 0.0, [1.0], 0.0), settings={"seed": 0, **settings}, frames=list(videos) or None
    )


@pytest.fixture(scope="module")
def wan() -> Any:
    pipe = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Files


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fps", [16, 24, 7.5])
def test_a_video_is_read_as_it_was_written(ending: str, fps: float, tmp_path: Path) -> None:
    given = frames()
    (path,) = result(given, prompt='a "fox"; é #1').save(tmp_path / f"made{ending}", fps)
    assert read_settings(path) == {"seed": 0, "prompt": 'a "fox"; é #1', "fps": fps, "frames": 6}
    made = video.read_frames(path)
    assert len(made) == 6
    most = max(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() for a, b in zip(given, made, strict=True))
    assert most <= (0 if ending == ".webp" else 6)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_still_video_of_odd_sides_keeps_its_frames(ending: str, tmp_path: Path) -> None:
    (path,) = result(frames(4, (33, 31))[:1] * 4).save(tmp_path / f"made{ending}")
    made = video.read_frames(path)
    assert [frame.size for frame in made] == [(33, 31)] * 4


def test_webp_plays_at_its_speed(tmp_path: Path) -> None:
    (path,) = result(frames()[:3], frame_rate=30).save(tmp_path / "made.webp")
    with Image.open(path) as image:
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            durations.append(image.info["duration"])
        assert image.info["loop"] == 0
    assert durations == [33, 34, 33]


def test_several_videos_are_numbered(tmp_path: Path) -> None:
    paths = result(frames(), frames()).save(tmp_path / "made.webp")
    assert [path.name for path in paths] == ["made.webp", "made-2.webp"]


def test_a_wrong_ending_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"videos are \.mp4 or \.webp, not \.png"):
        result(frames()).save(tmp_path / "made.png")
    with pytest.raises(ValueError, match="these are pictures, not videos"):
        result(images=frames()[:1]).save(tmp_path / "made.mp4")
    with pytest.raises(ValueError, match="fps must be positive, not -1"):
        result(frames()).save(tmp_path / "made.webp", -1)
    with pytest.raises(TypeError, match="only PIL images can be saved"):
        result(np.zeros((2, 8, 8, 3))).save(tmp_path / "made.webp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="MP4 needs the package av: pip install av"):
        result(frames()).save(tmp_path / "made.mp4")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_video_is_an_error() -> None:
    with pytest.raises(NotANumberError):
        result(np.full((2, 8, 8, 3), np.nan))


# Omni and the command line


def test_omni_gives_frames_under_a_cache(wan: Any, tmp_path: Path) -> None:
    with Omni(wan, cache_backend="first_block_cache", cache_config={"threshold": 1e9}) as omni:
        assert omni.makes_video
        (made,) = omni.generate("a cat", seed=0, **SMALL)
    assert made.images is None
    assert made.cache is not None
    assert made.cache.forwards_saved > 0
    ((*clip,),) = made.frames
    assert [frame.size for frame in clip] == [(64, 64)] * 5
    (path,) = made.save(tmp_path / "cat.webp")
    assert read_settings(path) == made.settings | {"fps": video.FPS, "frames": 5}
    for read, given in zip(video.read_frames(path), clip, strict=True):
        assert read.tobytes() == given.tobytes()


def test_generate_writes_a_video(wan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wan.save_pretrained(tmp_path / "model")
    words = ["generate", "--model", str(tmp_path / "model"), "--prompt", "a cat", "--seed", "3", "--size", "64"]
    words += ["--steps", "2", "--set", "num_frames=5", "--set", "max_sequence_length=16", "--quiet", "--out"]
    assert cli.main([*words, str(tmp_path / "cat.webp"), "--fps", "8"]) == 0
    assert read_settings(tmp_path / "cat.webp")["fps"] == 8
    assert len(video.read_frames(tmp_path / "cat.webp")) == 5
    assert cli.main([*words, str(tmp_path / "made")]) == 0
    (path,) = (tmp_path / "made").iterdir()
    assert path.stem == "a-cat-seed3"
    assert path.suffix == (".webp" if importlib.util.find_spec("av") is None else ".mp4")
    capsys.readouterr()
    for out, message in (("cat.png", "videos are .mp4 or .webp, not .png"), ("cat.mov", "videos are .mp4 or .webp")):
        assert cli.main([*words, str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err


def test_a_calibration_of_a_model_of_videos_knows_their_size(wan: Any, tmp_path: Path) -> None:
    wan.save_pretrained(tmp_path / "model")
    words = ["calibrate", "mag_cache", "--model", str(tmp_path / "model"), "--prompts", "a cat", "--seeds", "0"]
    words += ["--steps", "4", "--size", "64", "--set", "num_frames=5", "--set", "max_sequence_length=16", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "ratios.json")]) == 0
    document = json.loads((tmp_path / "ratios.json").read_text())
    assert '"width": 64' in json.dumps(document)


def test_a_model_of_pictures_writes_no_video(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(saved["qwen_image"]), "--prompt", "a cat", "--out"]
    assert cli.main([*words, str(tmp_path / "cat.webp")]) == 2
    assert "the model makes pictures" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "cat.png"), "--fps", "8"]) == 2
    assert "--fps is for videos" in capsys.readouterr().err


# Comparing


def test_the_usual_runs_are_those_that_the_model_can_have(
    wan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wan.save_pretrained(tmp_path / "model")
    words = ["compare", "--model", str(tmp_path / "model"), "--prompt", "a cat", "--seeds", "0", "--size", "64"]
    words += ["--set", "num_frames=5", "--set", "max_sequence_length=16", "--steps", "8", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    runs = [run["name"] for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]]
    assert {"no cache", "4 steps", "velocity cache 2x", "DBCache", "first-block cache"} <= set(runs)
    for run in compare.make_runs("", [], 8, None):
        assert (run.name in runs) != (f"{run.name} is left out: " in err)


def test_a_video_is_compared_by_frames_and_motion_and_plays_in_the_report(wan: Any, tmp_path: Path) -> None:
    with Omni(wan, cache_backend=None) as omni:
        requests = omni.prepare(
            "a cat", seed=0, **{name: value for name, value in SMALL.items() if "steps" not in name}
        )
    runs = [Run("no cache", steps=4), Run("2 steps", steps=2), Run("cached", "velocity_cache", {"budget": 3}, 4)]
    results = compare.compare(runs, wan, requests, tmp_path)
    again = compare.compare(runs, wan, requests, tmp_path)
    assert [cell.made_now for one in (results, again) for run in one for cell in run.cells] == [True] * 3 + [False] * 3
    document = compare.evaluate(again, compare.about("tiny", wan, requests))
    assert document["frames"] == 5
    assert [run["nfe"]["mean"] for run in document["runs"]] == [8, 4, 6]

    reference, fewer = (
        torch.stack([torch.from_numpy(np.asarray(frame).copy()).double() / 255 for frame in run.cells[0].frames])
        for run in results[:2]
    )
    for name, a, b in (("psnr", reference, fewer), ("motion_psnr", reference.diff(dim=0), fewer.diff(dim=0))):
        by_frame = -10 * (a - b).square().mean((1, 2, 3)).log10()
        assert document["runs"][1][name]["mean"] == pytest.approx(float(by_frame[by_frame.isfinite()].mean()))

    written = showing.write(document, tmp_path)
    page = written[0].read_text(encoding="utf-8")
    clips = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    assert len(clips) == 3 + 2  # and the differences
    for clip in clips[:1]:
        with Image.open(io.BytesIO(base64.b64decode(clip))) as image:
            assert image.n_frames == len({frame.tobytes() for frame in cells.frames_of(results[0].cells[0].path)})
    assert "motion PSNR" in page
    assert "motion dB" in showing.table(json.loads((tmp_path / "results.json").read_text()))
