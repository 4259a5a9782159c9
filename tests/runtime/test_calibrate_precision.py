"""`omni calibrate precision`: which layers bear 8 bits, found, written and taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

import omni_kernels
from omni_kernels.patching.quantised import Options, group_of
from omni_runtime import Omni, cli, embedded_pipeline
from omni_runtime.cache import calibration
from omni_runtime.cache.calibration import UselessFitError
from omni_runtime.calibrate import precision
from omni_runtime.calibrate.search import Tried
from omni_runtime.generation.loading import embedded_models

SHORT = ["--model", "emoji-qwen-image", "--steps", "4", "--prompts", "red apple", "--held-out", "a rocket"]
CALIBRATED = "left out by the model's calibration"
SHORT += ["--min-width", "64", "--seeds", "1", "--quiet"]


def test_the_layers_are_found_written_and_taken(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    out = tmp_path / "quantize_int8.json"
    assert cli.main(["calibrate", "precision", *SHORT, "--psnr", "44", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    document = json.loads(out.read_text())
    groups = document["groups"]
    assert 0 < len(document["exclude"]) < len(groups), "some are left as they are, and some are not"
    assert [one["psnr"] for one in groups] == sorted((one["psnr"] for one in groups), reverse=True)
    assert document["exclude"] == [one["layers"] for one in groups[len(groups) - len(document["exclude"]) :]]
    assert document["everything"]["mean"] < document["psnr"]["mean"]
    assert f"{groups[-1]['layers']} ({groups[-1]['count']}) left as it is" in told
    assert f"{len(groups) - len(document['exclude'])} of {len(groups)} groups" in told
    assert document["provenance"]["held_out"]["prompts"] == ["a rocket"]
    pipe = embedded_pipeline("emoji-qwen-image")
    monkeypatch.setattr(calibration, "own_file", lambda model, method: out if method == "quantize_int8" else None)
    how = {"dtype": "int8", "min_width": 64}
    with omni_kernels.patched(pipe, quantize=how, fuse=False) as handle:
        left = {name for name, why in handle.quantised.left_alone.items() if why == CALIBRATED}
        assert {group_of(name) for name in left} == set(document["exclude"])
        assert len(handle.quantised.replaced) == sum(one["count"] for one in groups) - len(left)
    with omni_kernels.patched(pipe, quantize=how | {"exclude": ["attn.to_q"]}, fuse=False) as handle:
        assert "left out by the model's calibration" not in handle.quantised.left_alone.values(), (
            "the user's come first"
        )
    with omni_kernels.patched(pipe, quantize={"dtype": "fp8", "min_width": 64}, fuse=False) as handle:
        assert CALIBRATED not in handle.quantised.left_alone.values(), "of another dtype"


@pytest.mark.parametrize(("model", "count"), [("emoji-qwen-image", 28), ("emoji-z-image", 20), ("emoji-wan", 42)])
def test_models_ship_what_was_found_for_fp8(model: str, count: int) -> None:
    document = json.loads((embedded_models()[model] / "quantize_fp8.json").read_text())
    assert document["psnr"]["mean"] >= 40.0 > document["everything"]["mean"]
    page = (Path(__file__).parents[2] / "docs" / "guides" / "quantise.md").read_text(encoding="utf-8")
    taken = f"{len(document['groups']) - len(document['exclude'])} of {len(document['groups'])}"
    figures = [f"{document[key]['mean']:.1f}, {document[key]['p5']:.1f}" for key in ("psnr", "everything")]
    assert f"| `{model}` | {taken} | {figures[0]} | {figures[1]} |" in page
    pipe = embedded_pipeline(model)
    with omni_kernels.patched(pipe, quantize={"dtype": "fp8", "min_width": 64}, fuse=False) as handle:
        left = {group_of(name) for name, why in handle.quantised.left_alone.items() if why == CALIBRATED}
        assert left == set(document["exclude"])
        assert len(handle.quantised.replaced) == count


class Measured:
    """In the place of images: each group of layers costs some dB, together what they cost one by one."""

    costs: ClassVar = {"attn.to_q": 1.0, "attn.to_k": 7.0, "attn.to_v": 2.0, "attn.to_out.0": 4.0}
    size = (64, 64)

    def __init__(self, pipe: Any, *_: Any) -> None:
        self.pipe = pipe

    def record(self) -> Any:
        return type("Run", (), {"describe_last": lambda self: {}})()

    def plain(self, steps: int) -> Tried:
        layers = self.pipe.transformer.transformer_blocks[0].named_modules()
        there = frozenset(name for name, layer in layers if type(layer).__name__ == "QuantizedLinear")
        return Tried((), (50.0 - sum(self.costs.get(name, 0.0) for name in there),))


@pytest.mark.parametrize(("wanted", "left"), [(36.0, set()), (42.0, {"to_k"}), (45.0, {"to_k", "to_out"})])
def test_as_many_layers_as_reach_the_aim(monkeypatch: Any, wanted: float, left: set[str]) -> None:
    monkeypatch.setattr(precision, "Images", Measured)
    options = Options("int8", min_width=0, exclude=("txt_mlp", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
    with Omni("emoji-qwen-image", cache_backend=None, device="cpu") as omni:
        requests = omni.prepare("red apple", num_inference_steps=4)
        groups, document = precision.find(omni, requests, requests, options, wanted)
        assert [one.layers.rpartition("attn.")[2] for one in groups] == ["to_q", "to_v", "to_out.0", "to_k"]
        assert {name.rpartition("attn.")[2].removesuffix(".0") for name in document["exclude"]} == left
        assert not any(type(one).__name__ == "QuantizedLinear" for one in omni.pipe.transformer.modules())


def test_an_aim_that_nothing_reaches_is_said(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(precision, "Images", Measured)
    with Omni("emoji-qwen-image", cache_backend=None, device="cpu") as omni:
        requests = omni.prepare("red apple", num_inference_steps=4)
        with pytest.raises(UselessFitError, match=r"no group of layers reaches 60 dB in fp8: the best, .* has 50\.0"):
            precision.find(omni, requests, requests, Options("fp8", min_width=0), 60.0)
    out = tmp_path / "none.json"
    assert cli.main(["calibrate", "precision", *SHORT, "--psnr", "60", "--out", str(out)]) != 0
    assert "no group of layers reaches 60 dB in int8" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["precision", "--budgets", "3"], "--budgets, --tries and --fresh are for a schedule"),
        (["tea_cache", "--psnr", "40"], "--quantize, --psnr and --min-width are for precision, not for tea_cache"),
        (["precision", "--model", "emoji-qwen-image", "--steps", "4"], "has nothing to do on this QwenImagePipeline"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], message: str, capsys: Any, tmp_path: Path) -> None:
    assert cli.main(["calibrate", *words, "--quiet", "--out", str(tmp_path / "none.json")]) != 0
    assert message in capsys.readouterr().err


def test_a_broken_file_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "quantize_int8.json"
    path.write_text(json.dumps({"method": "quantize_int8", "version": 1, "calibrated_for": {}, "exclude": [3]}))
    monkeypatch.setattr(calibration, "own_file", lambda model, method: path)
    pipe = embedded_pipeline("emoji-qwen-image")
    with pytest.raises(ValueError, match=r"quantize_int8\.json: exclude must be a list of layers' names"):
        omni_kernels.patch(pipe, quantize="int8")
    assert omni_kernels.patching.handle_of(pipe) is None
