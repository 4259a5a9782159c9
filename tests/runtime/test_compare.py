"""`omni compare`: which runs there are, what is measured, and what is written."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from omni_runtime import Omni, cli, compare, contact_sheet
from omni_runtime.compare import Run, RunResult, Sample
from omni_runtime.quality import psnr, ssim
from omni_runtime.result import read_settings

pytestmark = pytest.mark.usefixtures("no_environment")

SKIP_ALL = '{"residual_diff_threshold": 1, "max_warmup_steps": 1, "max_continuous_cached_steps": -1}'


# Runs


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("tea_cache", Run("tea_cache", "tea_cache", None, 50)),
        ("none", Run("none", None, None, 50)),
        ("loose=tea_cache", Run("loose", "tea_cache", None, 50)),
        ('tea_cache:{"rel_l1_thresh": 0.4}', Run("tea_cache", "tea_cache", {"rel_l1_thresh": 0.4}, 50)),
        ('two words=cache_dit:{"a": "b=c:d"}', Run("two words", "cache_dit", {"a": "b=c:d"}, 50)),
    ],
)
def test_a_run_is_name_backend_and_json(text: str, run: Run) -> None:
    assert compare.parse_run(text, 50) == run


def test_without_a_choice_all_methods_and_fewer_steps_run_against_no_cache() -> None:
    for model in ("emoji-qwen-image", "some/directory"):
        runs = compare.make_runs(model, [], 50, None)
        assert runs[0] == Run("no cache", None, None, 50)
        assert runs[1:3] == [Run("25 steps", None, None, 25), Run("16 steps", None, None, 16)]
        assert {run.backend for run in runs[3:]} == {"tea_cache", "cache_dit", "first_block_cache"}
        assert any((run.config or {}).get("enable_taylorseer") for run in runs)


def test_fewer_steps_can_be_chosen_and_left_out() -> None:
    names = [run.name for run in compare.make_runs("x", ["tea_cache"], 50, [10, 20])]
    assert names == ["no cache", "10 steps", "20 steps", "tea_cache"]
    assert [run.name for run in compare.make_runs("x", ["tea_cache"], 50, [0])] == ["no cache", "tea_cache"]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('{"contact_sheet": ["a", "b", "c"]}', ["a", "b", "c"]),
        ('["a", "b"]', ["a", "b"]),
        ('{"contact_sheet": [{"prompt": "a"}, {"prompt": "b"}]}', ["a", "b"]),
        (json.dumps({"contact_sheet": [str(i) for i in range(12)]}), ["0", "2", "4", "6", "8", "10"]),
        ("{}", []),
    ],
)
def test_prompts_of_an_embedded_model(embedded: str, text: str, prompts: list[str]) -> None:
    from omni_runtime import loading

    (loading.EMBEDDED / embedded / "prompts.json").write_text(text)
    assert compare.embedded_prompts(embedded) == prompts
    assert compare.embedded_prompts("no such model") == []


# Measuring


def test_every_run_is_measured_against_the_same_seed_without_a_cache(z_pipe: Any) -> None:
    z_pipe.set_progress_bar_config(disable=True)
    runs = compare.make_runs("", [f"skip=cache_dit:{SKIP_ALL}", "again=none"], 6, [3])
    with Omni(z_pipe) as omni:
        requests = [r for seed in (0, 1) for r in omni.prepare("a cat", seed=seed, height=64, width=64)]
    order: list[tuple[str, int | None]] = []
    real_listener = compare.contextlib.nullcontext

    def listener(run: Run, request: Any) -> Any:
        order.append((run.name, request.seed))
        return real_listener()

    results = compare.compare(runs, z_pipe, requests, listener)

    names = ["no cache", "3 steps", "skip", "again"]
    assert order == [(name, seed) for seed in (0, 1) for name in names], "runs take turns on each request"
    reference, fewer, skip, again = results
    for one in again.samples:
        assert (one.psnr, one.ssim) == (math.inf, pytest.approx(1.0))
    for one, base in zip(skip.samples, reference.samples, strict=True):
        assert one.psnr == float(psnr(base.image, one.image)) < math.inf
        assert one.ssim == float(ssim(base.image, one.image))
    assert [one.forwards for one in reference.samples + fewer.samples + skip.samples] == [6, 6, 3, 3, 1, 1]
    assert [one.blocks for one in skip.samples] == [pytest.approx((6 * 1 + 3) / 24)] * 2
    assert compare.summarise(results)[1].blocks == pytest.approx(0.5)
    assert not [name for name in vars(z_pipe) if name in ("progress_bar", "_omni_kernels_handle")]


def samples(psnrs: list[float], seconds: list[float]) -> list[Sample]:
    picture = Image.new("RGB", (64, 64), "navy")
    return [
        Sample("a cat", seed, picture, second, 10 + seed, 0.5, value, 0.9)
        for seed, (value, second) in enumerate(zip(psnrs, seconds, strict=True))
    ]


def test_summary_is_mean_and_sample_deviation() -> None:
    reference = RunResult(Run("no cache", None, None, 50), samples([math.inf] * 3, [2.0, 2.0, 4.0]))
    cached = RunResult(Run("cached", "tea_cache", None, 50), samples([30.0, 32.0, 37.0], [1.0, 1.0, 2.0]))
    one, other = compare.summarise([reference, cached])
    assert other.psnr == (pytest.approx(33.0), pytest.approx(np.std([30, 32, 37], ddof=1)))
    assert other.forwards == (11.0, 1.0)
    assert (other.speedup, other.worst_psnr, other.blocks) == (2.0, 30.0, 0.5)
    assert one.speedup == 1.0
    text = compare.table([one, other])
    heading, first, second = text.splitlines()
    assert heading.split()[:2] == ["run", "NFE"]
    assert "–" in first
    assert "33.0 ± 3.6" in second
    assert "2.00×" in second
    assert len({len(line) for line in text.splitlines()}) == 1, "columns are aligned"


def test_percentile_interpolates() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    for percent in (0, 5, 50, 90, 100):
        assert compare.percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert compare.percentile([math.inf, math.inf], 5) == math.inf


def test_identical_images_are_null_in_json_and_said_in_the_table() -> None:
    reference = RunResult(Run("no cache", None, None, 50), samples([math.inf], [2.0]))
    same = RunResult(Run("same", "tea_cache", None, 50), samples([math.inf], [1.0]))
    document = json.loads(json.dumps(compare.to_json([reference, same], {}), allow_nan=False))
    assert document["runs"][1]["psnr"] == {"mean": None, "std": 0.0, "min": None, "p5": None}
    assert "identical" in compare.table(compare.summarise([reference, same]))


# The contact sheet


def test_contact_sheet_shows_every_image_in_its_cell() -> None:
    colours = [["red", "lime"], ["blue", "white"]]
    images = [[Image.new("RGB", (64, 64), colour) for colour in row] for row in colours]
    images[1][1] = Image.new("RGB", (640, 320), "black")
    long = "a very long prompt that goes on and on about a cat on a windowsill " * 6
    sheet = contact_sheet.draw(images, [["a", "b"], ["c", "d"]], ["first", long], [["one", "x"], [long, "y"]])
    found = {colour for _, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)} <= found
    assert sheet.width < 1000


def test_contact_sheet_refuses_a_ragged_grid() -> None:
    with pytest.raises(ValueError, match="the grid is not 1 rows of 2 columns"):
        contact_sheet.draw([[Image.new("RGB", (8, 8))]], [["", ""]], ["row"], [["a"], ["b"]])


# The command


def test_compare_writes_a_sheet_and_numbers_and_prints_a_table(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    arguments = ["compare", "--model", str(saved["qwen_image"]), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--steps", "6", "--fewer-steps", "3", "--seeds", "0,1", "--size", "64", "--negative-prompt", " "]
    arguments += ["--run", f"skip all=cache_dit:{SKIP_ALL}", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    table = out.splitlines()
    assert [line.split("  ")[0].strip() for line in table[:4]] == ["run", "no cache", "3 steps", "skip all"]
    assert table[4:] == [str(tmp_path / "out" / name) for name in ("contact_sheet.png", "results.json")]
    assert err.count("skip all: a cat") == 2
    assert "[█░░░░░]" in err

    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["prompts"] == ["a cat", "a dog"]
    assert document["settings"]["num_inference_steps"] == 6
    skip = document["runs"][2]
    assert skip["nfe"] == {"mean": 2.0, "std": 0.0}, "one step, two guidance branches"
    assert len(skip["images"]) == 4
    assert 10 < skip["psnr"]["min"] <= skip["psnr"]["p5"] <= skip["psnr"]["mean"]
    assert 0 < skip["ssim"]["mean"] <= 1
    assert skip["seconds"]["mean"] > 0
    sheet = tmp_path / "out" / "contact_sheet.png"
    assert Image.open(sheet).height > 4 * 192
    assert read_settings(sheet)["runs"][2]["backend"] == "cache_dit"


def test_compare_prints_json_alone_when_asked(
    embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--model", embedded, "--seeds", "0", "--steps", "4", "--run", "tea_cache", "--json"]
    assert cli.main([*arguments, "--quiet", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["prompts"] == ["a cat", "a dog", "a bird"], "the embedded model's own"
    assert [run["name"] for run in document["runs"]] == ["no cache", "2 steps", "tea_cache"]
    assert err == ""


@pytest.mark.usefixtures("small_references")
def test_compare_edits_a_picture(saved: dict[str, Path], tmp_path: Path) -> None:
    tiny.reference_image().save(tmp_path / "reference.png")
    arguments = ["compare", "--model", str(saved["qwen_image_edit"]), "--prompt", "a cat", "--seeds", "0"]
    arguments += ["--image", str(tmp_path / "reference.png"), "--steps", "4", "--size", "64", "--run", "tea_cache"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0


def test_the_default_runs_suit_every_method(saved: dict[str, Path]) -> None:
    """Each configuration is one that its backend takes, for the embedded model's 6 blocks and for others."""
    from omni_kernels.patching import backends
    from omni_runtime.cache.models import TransformerFacts

    for runs in compare.RUNS.values():
        for _, backend, config in runs:
            backends.get(backend).check(config, TransformerFacts("QwenImageTransformer2DModel", 6))
