"""`omni compare`: which runs there are, what is made and kept, what is measured, and what is written."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from omni_kernels.patching import Patch
from omni_runtime import Omni, cli
from omni_runtime.cache import calibration
from omni_runtime.cache.methods import CACHE_DIT
from omni_runtime.cache.models import depth
from omni_runtime.compare import cells, contact_sheet, quality, showing
from omni_runtime.compare import comparison as compare
from omni_runtime.compare.cells import Run
from omni_runtime.compare.report_html import typical
from omni_runtime.files import DamagedFileWarning, WriteError
from omni_runtime.generation.result import read_settings
from omni_runtime.progress import Progress

pytestmark = pytest.mark.usefixtures("no_environment")

SKIP_ALL = '{"residual_diff_threshold": 1, "max_warmup_steps": 1, "max_continuous_cached_steps": -1}'


# Runs


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("tea_cache", Run("tea_cache", "tea_cache", None, 50)),
        ("none", Run("none")),
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
        assert runs[1:3] == [Run("25 steps", steps=25), Run("16 steps", steps=16)]
        assert {run.backend for run in runs[3:]} == {"velocity_cache", "tea_cache", "cache_dit", "first_block_cache"}
        assert any((run.config or {}).get("enable_taylorseer") for run in runs)


def test_fewer_steps_can_be_chosen() -> None:
    names = [run.name for run in compare.make_runs("x", ["tea_cache"], 50, [10, 20])]
    assert names == ["no cache", "10 steps", "20 steps", "tea_cache"]


@pytest.mark.parametrize(
    ("run", "method"),
    [
        (Run("25 steps", steps=25), "fewer steps"),
        (Run("a", "tea_cache", {"rel_l1_thresh": 0.4}), "tea_cache"),
        (Run("b", "tea_cache", {"forecaster": "newton", "rel_l1_thresh": 0.4}), "tea_cache + newton"),
        (Run("c", "cache_dit", {"enable_taylorseer": True, "taylorseer_order": 2}), "cache_dit + taylorseer"),
        (Run("d", "cache_dit", {"scm_steps_mask_policy": "fast"}), "cache_dit + mask"),
        (Run("e", "the other library", {"threshold": 1}, method="theirs"), "theirs"),
    ],
)
def test_runs_of_one_backend_and_forecaster_are_one_method(run: Run, method: str) -> None:
    assert compare.method_of(run) == method


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
    from omni_runtime.generation import loading

    (loading.EMBEDDED / embedded / "prompts.json").write_text(text)
    assert compare.prompts_of(embedded) == [(prompt, None) for prompt in prompts]
    assert compare.prompts_of("no such model") == []


def test_prompts_of_an_embedded_model_that_edits_have_pictures(embedded: str) -> None:
    from omni_runtime.generation import loading

    home = loading.EMBEDDED / embedded
    entries = [{"prompt": f"edit {i}", "image": f"references/{i}.png"} for i in range(8)]
    (home / "prompts.json").write_text(json.dumps(entries))
    assert compare.prompts_of(embedded, None)[7] == ("edit 7", home / "references" / "7.png")
    assert len(compare.prompts_of(embedded)) == 6


# Making the images


@pytest.fixture
def pipe(z_pipe: Any) -> Any:
    z_pipe.set_progress_bar_config(disable=True)
    return z_pipe


def requests_of(pipe: Any, seeds: tuple[int, ...] = (0, 1)) -> list[Any]:
    with Omni(pipe, cache_backend=None) as omni:
        return [request for seed in seeds for request in omni.prepare("a cat", seed=seed, height=64, width=64)]


SKIP = json.loads(SKIP_ALL)


def test_every_run_is_measured_against_the_same_seed_without_a_cache(pipe: Any, tmp_path: Path) -> None:
    runs = [*compare.make_runs("", [f"skip=cache_dit:{SKIP_ALL}", "again=none"], 6, [3])]
    order: list[tuple[str, int | None]] = []

    def listener(run: Run, request: Any, progress: Progress) -> Any:
        order.append((run.name, request.seed))
        assert (progress.number, progress.total) == (len(order), 6)
        assert (progress.seconds_left is None) == (len(order) == 1)
        return contextlib.nullcontext()

    results = compare.compare(runs, pipe, requests_of(pipe), tmp_path, listener)
    document = compare.evaluate(results)

    made = ["no cache", "3 steps", "skip"]  # "again" is "no cache" by another name
    assert order == [(name, seed) for seed in (0, 1) for name in made], "runs take turns on each request"
    reference, fewer, skip, _ = results
    for run, result in zip(document["runs"], results, strict=True):
        for values, cell, base in zip(run["cells"], result.cells, reference.cells, strict=True):
            expected = float(quality.psnr(base.image, cell.image))
            assert values["psnr"] == (pytest.approx(expected) if math.isfinite(expected) else None)
            assert values["ssim"] == pytest.approx(float(quality.ssim(base.image, cell.image)))
            assert values["ms_ssim"] == pytest.approx(float(quality.ms_ssim(base.image, cell.image)))
            assert values["speedup"] == base.record["seconds"] / cell.record["seconds"]
            if result in (fewer, skip):
                assert values["latents_psnr"] == float(quality.latents_psnr(base.latents, cell.latents))
                assert values["latents_psnr"] < 80
    by_name = {run["name"]: run for run in document["runs"]}
    assert {name: [cell["nfe"] for cell in run["cells"]] for name, run in by_name.items()} == {
        "no cache": [6, 6], "3 steps": [3, 3], "skip": [1, 1], "again": [6, 6],
    }  # fmt: skip
    assert [cell["blocks"] for cell in by_name["skip"]["cells"]] == [pytest.approx(100 * (6 * 1 + 3) / 24)] * 2
    assert by_name["3 steps"]["blocks"]["mean"] == pytest.approx(50)
    assert by_name["again"]["psnr"] == dict.fromkeys(("mean", "median", "min", "p5")) | {"std": 0.0, "identical": 2}
    assert by_name["skip"]["threshold"] == 1.0
    (branch,) = by_name["skip"]["cells"][0]["branches"].values()
    assert branch["computed"] == "100000"
    assert document["ms_ssim_scales"] == 3
    assert "lpips" not in document["measures"]
    assert "pip install" in document["lpips_missing"]


def test_a_comparison_leaves_the_pipeline_as_it_was(pipe: Any, tmp_path: Path) -> None:
    compare.compare([Run("a", steps=2), Run("b", "tea_cache", {}, 2)], pipe, requests_of(pipe, (0,)), tmp_path)
    assert not {name for name in vars(pipe) if name in ("progress_bar", "_omni_kernels_handle")}
    assert "step" not in vars(pipe.scheduler)
    assert not [module for module in pipe.transformer.modules() if module._forward_pre_hooks]


def test_final_latents_are_those_that_were_decoded(pipe: Any, tmp_path: Path) -> None:
    (result,) = compare.compare([Run("a", steps=3)], pipe, requests_of(pipe, (0,)), tmp_path)
    with Omni(pipe, cache_backend=None) as omni:
        arguments = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
        (latents,) = omni.generate("a cat", seed=0, **arguments)
    assert torch.equal(result.cells[0].latents, latents.images.float())


def test_pictures_hold_their_settings(pipe: Any, tmp_path: Path) -> None:
    run = Run("skip", "cache_dit", SKIP, 2)
    (result,) = compare.compare([run], pipe, requests_of(pipe, (5,)), tmp_path)
    settings = read_settings(result.cells[0].path)
    assert (settings["run"], settings["seed"], settings["num_inference_steps"]) == ("skip", 5, 2)
    assert settings["cache_config"]["residual_diff_threshold"] == 1
    assert not [name for name in settings if "callback" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seed": None}, "a seed each"), ({"arguments": {"num_images_per_prompt": 2}}, "single images")],
)
def test_requests_that_cannot_be_compared_are_refused(
    pipe: Any, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    (request,) = requests_of(pipe, (0,))
    with pytest.raises(ValueError, match=message):
        compare.compare([Run("a")], pipe, [dataclasses.replace(request, **arguments)], tmp_path)
    with pytest.raises(ValueError, match="two runs are called 'a'"):
        compare.compare([Run("a"), Run("a", "tea_cache")], pipe, [request], tmp_path)
    with pytest.raises(ValueError, match="a: a comparison makes each image by itself"):
        cells.complete_config(Run("a", "tea_cache", {"decision": "replay"}, 4), pipe)
    with pytest.raises(ValueError, match="steps_computation_mask has 2 entries"):
        compare.compare([Run("a", "cache_dit", {"steps_computation_mask": "10"}, 4)], pipe, [request], tmp_path)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare.compare([Run("a")], pipe, [], tmp_path)
    assert not list(tmp_path.iterdir())


# Going on after an interrupt


def without_times(value: Any) -> Any:
    """A document less what says when and how fast."""
    if isinstance(value, dict):
        times = ("seconds", "speedup", "reference_seconds", "sittings", "sitting")
        return {k: without_times(v) for k, v in value.items() if k not in times}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def test_an_interrupted_comparison_goes_on_and_ends_with_the_same_results(pipe: Any, tmp_path: Path) -> None:
    runs = [Run("no cache", steps=3), Run("2 steps", steps=2), Run("skip", "cache_dit", SKIP, 3)]
    requests = requests_of(pipe)
    whole = compare.evaluate(compare.compare(runs, pipe, requests, tmp_path / "whole"))
    made: list[str] = []

    @contextlib.contextmanager
    def stop_at_the_third(run: Run, request: Any, progress: Progress) -> Any:
        if progress.number == 3:
            raise KeyboardInterrupt
        yield None

    @contextlib.contextmanager
    def note(run: Run, request: Any, progress: Progress) -> Any:
        made.append(f"{run.name} {request.seed}")
        yield None

    with pytest.raises(KeyboardInterrupt):
        compare.compare(runs, pipe, requests, tmp_path / "parts", stop_at_the_third)
    assert len(list((tmp_path / "parts" / "cells").glob("*.json"))) == 2
    results = compare.compare(runs, pipe, requests, tmp_path / "parts", note)
    assert made == ["skip 0", "no cache 1", "2 steps 1", "skip 1"]
    assert [[cell.made_now for cell in result.cells] for result in results] == [[False, True]] * 2 + [[True, True]]
    document = compare.evaluate(results)
    assert without_times(document) == without_times(whole)
    again = compare.compare(runs, pipe, requests, tmp_path / "parts", note)
    assert len(made) == 4, "nothing was left to make"
    assert compare.evaluate(again) == document


def test_what_is_added_in_another_sitting_has_its_reference_timed_again(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [Run("no cache", steps=3), Run("2 steps", steps=2)]
    requests = requests_of(pipe)
    compare.compare(runs, pipe, requests, tmp_path)
    timed: list[float] = []
    seconds_of = cells.seconds_of

    def noted(run: Run, *rest: Any) -> float:
        assert run is runs[0]
        timed.append(seconds_of(run, *rest))
        return timed[-1]

    monkeypatch.setattr(cells, "seconds_of", noted)
    runs += [Run("skip", "cache_dit", SKIP, 3), Run("1 step", steps=1)]
    results = compare.compare(runs, pipe, requests, tmp_path)
    assert len(timed) == len(requests), "once for both that were added"
    document = compare.evaluate(results)
    for result, run in zip(results[1:], document["runs"][1:], strict=True):
        added = result.run in runs[2:]
        for cell, row, again, base in zip(result.cells, run["cells"], timed, results[0].cells, strict=True):
            seconds = again if added else base.record["seconds"]
            assert row["speedup"] == seconds / cell.record["seconds"]
            assert row["reference_seconds"] == (again if added else None)
    compare.compare(runs, pipe, requests, tmp_path)
    assert len(timed) == len(requests), "nothing was made, and so nothing timed"


def test_what_changes_an_image_makes_another_cell(pipe: Any, tmp_path: Path) -> None:
    (request,) = requests_of(pipe, (0,))
    run = Run("a", "tea_cache", {}, 4)

    def path(run: Run = run, request: Any = request, weights: str | None = None) -> Path:
        fingerprint = cells.fingerprint_of(pipe) if weights is None else weights
        config = cells.complete_config(run, pipe)
        return cells.path_of(tmp_path, cells.identity(run, config, pipe, request, fingerprint))

    def asked(**arguments: Any) -> Any:
        return dataclasses.replace(request, arguments=request.arguments | arguments)

    first = path()
    assert first == path(dataclasses.replace(run, name="another name"))
    assert first == path(Run("a", "tea_cache", {"rel_l1_thresh": 0.2}, 4)), "the default, given"
    assert first == path(request=asked(num_inference_steps=9)), "the run says how many steps"
    pictures = [tiny.reference_image(), tiny.reference_image(seed=1)]
    others = [
        path(dataclasses.replace(run, steps=5)),
        path(dataclasses.replace(run, config={"rel_l1_thresh": 0.3})),
        path(dataclasses.replace(run, backend=None, config=None)),
        path(dataclasses.replace(run, install=contextlib.nullcontext)),
        path(request=dataclasses.replace(request, seed=1)),
        path(request=dataclasses.replace(request, prompt="a dog")),
        path(request=asked(negative_prompt="fog")),
        path(request=asked(width=128)),
        path(request=asked(image=pictures[0])),
        path(request=asked(image=pictures[1])),
        path(weights="other weights"),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_another_engine_makes_the_cells_of_our_caches_anew(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (request,) = requests_of(pipe, (0,))
    runs = [Run("a", "tea_cache", {}, 4), Run("b", steps=4), Run("c", "theirs", {}, 4, install=contextlib.nullcontext)]
    before, after = [], []
    for paths in (before, after):
        paths += [cells.identity(run, run.config, pipe, request, "") for run in runs]
        monkeypatch.setattr(cells, "sources_digest", lambda: "changed")
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True]


def test_a_callers_own_callback_is_left_to_him(pipe: Any, tmp_path: Path) -> None:
    told: list[int] = []
    (request,) = requests_of(pipe, (0,))
    own = {"callback_on_step_end": lambda pipe, step, timestep, tensors: told.append(step) or {}}
    request = dataclasses.replace(request, arguments=request.arguments | own)
    (result,) = compare.compare([Run("a", steps=3)], pipe, [request], tmp_path)
    assert told == [0, 1, 0, 1, 2], "the warm-up, and the request"
    assert result.cells[0].latents is None
    assert (result.cells[0].record["forwards"], result.cells[0].record["branches"]) == (3, {})
    assert "latents_psnr" not in compare.evaluate([result])["measures"]


def test_another_calibration_in_the_models_directory_is_another_cell(saved: dict[str, Path], tmp_path: Path) -> None:
    """Nothing that the user gives has changed."""
    home = tmp_path / "model"
    shutil.copytree(saved["z_image"], home)
    calibrated = {
        "method": "tea_cache", "version": calibration.VERSION, "coefficients": [0, 0, 0, 1, 0], "range": [0, 1],
        "calibrated_for": {},
    }  # fmt: skip
    paths = []
    for slope in (1, 2):
        calibrated["coefficients"] = [0, 0, 0, slope, 0]
        (home / "tea_cache.json").write_text(json.dumps(calibrated))
        with Omni(str(home), cache_backend=None) as omni:
            pipe = omni.pipe
        run = Run("a", "tea_cache", None, 4)
        (request,) = requests_of(pipe, (0,))
        paths.append(cells.path_of(home, cells.identity(run, cells.complete_config(run, pipe), pipe, request, "")))
    assert paths[0] != paths[1]


def test_other_weights_configs_and_adapters_have_other_fingerprints(pipe: Any) -> None:
    prints = [cells.fingerprint_of(pipe)]
    assert prints == [cells.fingerprint_of(tiny.z_image())], "the same weights, built again"
    pipe.transformer.layers = pipe.transformer._modules.pop("layers")
    assert prints == [cells.fingerprint_of(pipe)], "the same weights, registered in another order"
    with torch.no_grad():
        pipe.transformer.layers[2].attention.to_q.weight.mul_(1.001)
    prints.append(cells.fingerprint_of(pipe))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=5.0)
    prints.append(cells.fingerprint_of(pipe))
    pipe.transformer.register_buffer("adapter", torch.zeros(2))
    prints.append(cells.fingerprint_of(pipe))
    assert len(set(prints)) == 4


@pytest.mark.parametrize("lost", [".png", ".npy", ".json"])
def test_a_cell_that_is_not_whole_is_made_again(pipe: Any, tmp_path: Path, lost: str) -> None:
    run, requests = Run("a", steps=2), requests_of(pipe, (0,))
    (result,) = compare.compare([run], pipe, requests, tmp_path)
    path = result.cells[0].path.with_suffix(lost)
    path.unlink()
    with told_of(path, "is missing; the picture is made again") if lost != ".json" else contextlib.nullcontext():
        (result,) = compare.compare([run], pipe, requests, tmp_path)
    assert result.cells[0].made_now
    assert len(list((tmp_path / "cells").iterdir())) == 3, "and no half-written file is left"
    (result,) = compare.compare([run], pipe, requests, tmp_path, fresh=True)
    assert result.cells[0].made_now


def told_of(path: Path, words: str) -> Any:
    return pytest.warns(DamagedFileWarning, match=f"^{re.escape(str(path))}.*{re.escape(words)}$")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "of the user").touch()


def record(**changes: Any) -> Callable[[Path], Any]:
    """A record with other entries; those that are `...` are taken out."""

    def change(path: Path) -> None:
        parsed = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in parsed.items() if value is not ...}))

    return change


def text(content: str | bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGES: list[tuple[str, Callable[[Path], Any]]] = [
    *((suffix, damage) for suffix in (".png", ".npy") for damage in (text(""), half, last_bit, text("GIF89a"))),
    *((".json", damage) for damage in (text(""), half, text(b"\0\xff"), text("null"), text("[" * 10**5), text("{}"))),
    *((suffix, directory) for suffix in (".png", ".npy", ".json")),
    (".json", record(prompt=5)),
    (".json", record(seed=None)),
    (".json", record(seconds=0)),
    (".json", record(seconds=math.nan)),
    (".json", record(seconds=10**400)),
    (".json", record(forwards=-1)),
    (".json", record(blocks="many")),
    (".json", record(branches=...)),
    (".json", record(branches={"0": {"computed": "11", "measured": [None]}})),
    (".json", record(branches={"0": {"computed": "1", "measured": ["far"]}})),
    (".json", record(notes=[None])),
    (".json", record(sitting=None)),
    (".json", record(reference_seconds=-1.0)),
    (".json", record(sha256={".npy": "?"})),
    (".json", record(sha256={".png": "?", "/../../etc/passwd": "?"})),
    (".json", record(sha256=...)),
]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> cells.Cell:
    """A cell on disk; whoever damages it takes a copy."""
    pipe = tiny.z_image()
    pipe.set_progress_bar_config(disable=True)
    directory = tmp_path_factory.mktemp("cell")
    return compare.compare([Run("a", steps=2)], pipe, requests_of(pipe, (0,)), directory)[0].cells[0]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_every_damage_of_a_cell_is_seen_and_told(cell: cells.Cell, tmp_path: Path, number: int) -> None:
    suffix, damage = DAMAGES[number]
    for file in cell.path.parent.iterdir():
        shutil.copy(file, tmp_path)
    path = tmp_path / cell.path.name
    assert cells.find(path) == dataclasses.replace(cell, path=path, made_now=False)
    damage(path.with_suffix(suffix))
    with told_of(path.with_suffix(suffix), "the picture is made again"):
        assert cells.find(path) is None
    aside = path.with_suffix(f"{suffix}.damaged")
    assert aside.is_dir() == (damage is directory)
    assert damage is not directory or (aside / "of the user").exists(), "nothing is lost"


def test_a_damaged_cell_is_made_again_alone(pipe: Any, tmp_path: Path) -> None:
    runs, requests = [Run("a", steps=2), Run("b", steps=3)], requests_of(pipe, (0,))
    first = compare.evaluate(compare.compare(runs, pipe, requests, tmp_path))
    path = next((tmp_path / "cells").glob("*-3-steps-*.png"))
    half(path)
    with told_of(path, "is damaged; the picture is made again"):
        results = compare.compare(runs, pipe, requests, tmp_path)
    assert [result.cells[0].made_now for result in results] == [False, True]
    assert without_times(compare.evaluate(results)) == without_times(first)


def test_a_full_disk_says_how_many_pictures_are_kept_and_the_same_call_goes_on(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, requests = [Run("a", steps=2), Run("b", steps=3)], requests_of(pipe, (0,))
    synced: list[int] = []

    def fsync(number: int) -> None:
        synced.append(number)
        if len(synced) > 4:  # three files of the first cell, and one of the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        message = rf"cannot write .*\.npy: No space left on device; 1 of 2 pictures are kept in {tmp_path}: the same"
        with pytest.raises(WriteError, match=message):
            compare.compare(runs, pipe, requests, tmp_path)
    results = compare.compare(runs, pipe, requests, tmp_path)
    assert [result.cells[0].made_now for result in results] == [False, True]


def test_latents_that_are_no_numbers_make_no_cell(pipe: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"a: the final latents are not finite numbers|the picture contains NaN"):
        compare.compare([Run("a", steps=2)], pipe, requests_of(pipe, (0,)), tmp_path)
    assert list((tmp_path / "cells").iterdir()) == []


# Caches of others


def test_a_cache_of_another_library_is_counted_at_the_model(qwen_pipe: Any, tmp_path: Path) -> None:
    """diffusers' first-block cache: its hooks call every block, and only some of them compute."""
    qwen_pipe.set_progress_bar_config(disable=True)
    always = diffusers.FirstBlockCacheConfig(threshold=1e9)

    @contextlib.contextmanager
    def theirs(pipe: Any) -> Any:
        pipe.transformer.enable_cache(always)
        yield
        pipe.transformer.disable_cache()

    with Omni(qwen_pipe, cache_backend=None) as omni:
        requests = omni.prepare("a cat", negative_prompt=" ", seed=0, height=64, width=64)
    config = {"library": "diffusers", "threshold": 1e9}
    runs = [Run("no cache", steps=4), Run("theirs", "first-block cache", config, 4, install=theirs)]
    plain, foreign = compare.evaluate(compare.compare(runs, qwen_pipe, requests, tmp_path))["runs"]
    (cell,) = foreign["cells"]
    assert plain["nfe"]["mean"] == 8
    assert cell["nfe"] == 2
    assert cell["blocks"] == pytest.approx(100 * (2 * 4 + 6 * 1) / (8 * 4))
    assert {name: branch["computed"] for name, branch in cell["branches"].items()} == {"0": "1000", "1": "1000"}
    assert cell["psnr"] < 80
    assert (foreign["method"], foreign["cache_config"], foreign["threshold"]) == ("first-block cache", config, None)
    assert read_settings(tmp_path / cell["image"])["cache_config"] == config


def test_a_cache_within_the_blocks_is_counted_by_what_they_compute(qwen_pipe: Any, tmp_path: Path) -> None:
    """diffusers' TaylorSeer calls every block and its attention, and forecasts what the attention would give."""
    qwen_pipe.set_progress_bar_config(disable=True)
    config = diffusers.TaylorSeerCacheConfig(cache_interval=3, max_order=1, taylor_factors_dtype=torch.float32)

    @contextlib.contextmanager
    def theirs(pipe: Any) -> Any:
        pipe.transformer.enable_cache(config)
        yield
        pipe.transformer.disable_cache()

    with Omni(qwen_pipe, cache_backend=None) as omni:
        requests = omni.prepare("a cat", negative_prompt=" ", seed=0, height=64, width=64)
    runs = [Run("no cache", steps=8), Run("theirs", "TaylorSeer", {}, 8, install=theirs)]
    _, foreign = compare.evaluate(compare.compare(runs, qwen_pipe, requests, tmp_path))["runs"]
    (cell,) = foreign["cells"]
    mask = "".join("1" if step < 3 or (step - 4) % 3 == 0 else "0" for step in range(8))
    assert {name: branch["computed"] for name, branch in cell["branches"].items()} == {"0": mask, "1": mask}
    assert cell["nfe"] == 2 * mask.count("1") == 10
    assert cell["blocks"] == pytest.approx(100 * 10 / 16)


@pytest.mark.parametrize("make", [tiny.qwen_image, tiny.z_image, tiny.flux, tiny.qwen_image_edit])
def test_every_block_of_a_known_model_can_be_counted(make: Any) -> None:
    transformer = make().transformer
    assert len(cells.projections(transformer)) == depth(transformer) > 0


def test_what_is_counted_at_the_model_is_what_our_caches_report(pipe: Any, tmp_path: Path) -> None:
    config = {"residual_diff_threshold": 0.3, "max_warmup_steps": 1}

    @contextlib.contextmanager
    def ours(pipe: Any) -> Any:
        patch = Patch()
        session = CACHE_DIT.install(pipe, CACHE_DIT.check(config), patch)
        yield
        patch.undo()
        session.close()

    runs = [Run("reported", "cache_dit", config, 8), Run("counted", "cache_dit", config, 8, install=ours)]
    reported, counted = compare.evaluate(compare.compare(runs, pipe, requests_of(pipe), tmp_path))["runs"]
    for one, other in zip(reported["cells"], counted["cells"], strict=True):
        assert (one["nfe"], one["blocks"]) == (other["nfe"], other["blocks"])
        masks = [[branch["computed"] for branch in cell["branches"].values()] for cell in (one, other)]
        assert masks[0] == masks[1]
        assert "0" in masks[0][0]
        assert other["psnr"] is None, "the same image"


# Numbers and their table


def document_of(psnrs: list[float], seconds: list[float]) -> dict[str, Any]:
    """Two runs, the second of which has these values."""
    measures = {name: dataclasses.asdict(compare.MEASURES[name]) for name in ("nfe", "seconds", "speedup", "psnr")}
    base = dict.fromkeys(measures, compare.statistics_of([1.0])) | {"psnr": compare.statistics_of([math.inf])}
    other = {
        "nfe": compare.statistics_of([10.0, 11.0, 12.0]),
        "seconds": compare.statistics_of(seconds),
        "speedup": compare.statistics_of([2 / one for one in seconds]),
        "psnr": compare.statistics_of(psnrs),
    }
    return {"measures": measures, "runs": [{"name": "no cache", **base}, {"name": "cached", **other}]}


def test_one_disturbed_image_does_not_move_the_speedup() -> None:
    assert typical(compare.statistics_of([1.4, 1.5, 52.0])) == 1.5
    assert typical({"mean": 1.4, "std": 0.1}) == 1.4, "from results without medians"


def test_statistics_are_mean_sample_deviation_smallest_and_percentile() -> None:
    values = [30.0, 32.0, 37.0]
    assert compare.statistics_of(values) == {
        "mean": pytest.approx(33.0),
        "median": 32.0,
        "std": pytest.approx(np.std(values, ddof=1)),
        "min": 30.0,
        "p5": pytest.approx(np.percentile(values, 5)),
    }
    text = showing.table(document_of(values, [1.0, 1.0, 2.0]))
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


def test_identical_images_are_left_out_of_the_mean_and_counted() -> None:
    found = compare.statistics_of([math.inf, 30.0, 40.0])
    assert (found["mean"], found["min"], found["identical"]) == (35.0, 30.0, 1)
    assert "identical" in showing.table(document_of([math.inf] * 3, [1.0] * 3))
    assert json.loads(showing.to_json(document_of([math.inf] * 3, [1.0] * 3)))["runs"][1]["psnr"]["mean"] is None


def test_json_keeps_lists_of_numbers_on_one_line() -> None:
    document = {"a": [1, -2.5e-07, None], "b": [{"c": []}], "text": "[1, 2]"}
    text = showing.to_json(document)
    assert json.loads(text) == document
    assert "[1, -2.5e-07, null]" in text.replace("[ ", "[").replace(" ]", "]")


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


def test_compare_writes_a_report_and_numbers_and_prints_a_table(
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
    assert table[4:] == [str(tmp_path / "out" / name) for name in ("report.html", "contact_sheet.png", "results.json")]
    assert err.count("skip all: a cat") == 2
    assert "12 of 12, under a minute left" in err
    assert "[█░░░░░]" in err

    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["prompts"] == ["a cat", "a dog"]
    assert document["settings"]["num_inference_steps"] == 6
    skip = document["runs"][2]
    assert skip["nfe"] == {"mean": 2.0, "median": 2.0, "std": 0.0, "min": 2, "p5": 2}, "one step, two guidance branches"
    assert len(skip["cells"]) == 4
    assert 10 < skip["psnr"]["min"] <= skip["psnr"]["p5"] <= skip["psnr"]["mean"]
    assert 0 < skip["ms_ssim"]["mean"] <= 1
    assert skip["seconds"]["mean"] > 0
    assert all(Image.open(tmp_path / "out" / cell["image"]).size == (64, 64) for cell in skip["cells"])
    assert "skip all" in (tmp_path / "out" / "report.html").read_text()
    sheet = tmp_path / "out" / "contact_sheet.png"
    assert Image.open(sheet).height > 4 * 192
    assert read_settings(sheet)["runs"][2]["cache_backend"] == "cache_dit"

    assert cli.main([*arguments, "--run", "more=tea_cache"]) == 0
    out, err = capsys.readouterr()
    assert "12 images already existed" in err
    assert err.count("more: ") == 4
    assert "no cache: " not in err


def test_an_interrupted_command_says_how_to_go_on(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = cells.make

    def interrupted(run: Run, *arguments: Any) -> Any:
        if run.backend is not None:
            raise KeyboardInterrupt
        return make(run, *arguments)

    monkeypatch.setattr(cells, "make", interrupted)
    arguments = ["compare", "--model", str(saved["z_image"]), "--prompt", "a cat", "--seeds", "0", "--steps", "4"]
    assert cli.main([*arguments, "--size", "64", "--run", "tea_cache", "--out", str(tmp_path)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"omni: error: interrupted; 2 images were made, and are kept in {tmp_path}; run the same command to continue"
    )


def test_sets_of_prompts_are_asked_for_by_name(
    embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--model", embedded, "--seeds", "0", "--steps", "4", "--fewer-steps", "2", "--quiet"]
    arguments += ["--run", "again=none", "--out", str(tmp_path), "--prompts"]
    assert cli.main([*arguments, "@model", "--prompts", "a fish"]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["prompts"] == ["a cat", "a dog", "a bird", "a fish"]
    assert cli.main([*arguments, "@all"]) == 2
    assert "there is no prompt set '@all'; the sets are @model, @general, @edit" in capsys.readouterr().err


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
