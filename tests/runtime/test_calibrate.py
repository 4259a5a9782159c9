"""Calibration: what is recorded of full runs, against the definition written out; what is left behind; the command."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from calibrated import CALIBRATED
from PIL import Image

import omni_kernels
from omni_runtime import Omni, cli
from omni_runtime.cache import calibration, models, polynomial
from omni_runtime.calibrate import fitting as calibrate
from omni_runtime.calibrate.fitting import DistancePassage
from omni_runtime.generation import loading

pytestmark = pytest.mark.usefixtures("no_environment")


# The definition


def relative_l1(now: torch.Tensor, then: torch.Tensor) -> float:
    now, then = now.double(), then.double()
    return float((now - then).abs().mean() / (then.abs().mean() + 1e-8))


def qwen_modulated(block: Any, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    if block.zero_cond_t:
        temb = temb.chunk(2)[0]
    shift, scale, _ = block.img_mod(temb).chunk(2, dim=-1)[0].chunk(3, dim=-1)
    return block.img_norm1(hidden) * (1 + scale[:, None]) + shift[:, None]


class Watched:
    """The modulated input and the residual of every forward, by torch hooks on the first and the last block."""

    def __init__(self, transformer: Any, tokens: int | None = None) -> None:
        self.modulated: list[torch.Tensor] = []
        self.residuals: list[torch.Tensor] = []
        blocks = transformer.transformer_blocks

        def entered(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.hidden = kwargs["hidden_states"][:, :tokens].clone()
            self.modulated.append(qwen_modulated(block, self.hidden, kwargs["temb"]))

        def left(block: Any, args: Any, output: Any) -> None:
            self.residuals.append(output[1][:, :tokens] - self.hidden)

        blocks[0].register_forward_pre_hook(entered, with_kwargs=True)
        blocks[-1].register_forward_hook(left)

    def points(self, branches: int, sample: int = 0) -> list[list[tuple[float, float]]]:
        """(x, y) of every step but the first, for each branch, whose forwards take turns."""
        found = []
        for branch in range(branches):
            pairs = [
                zip(*(itertools.pairwise([one[sample] for one in values[branch::branches]]),), strict=True)
                for values in (self.modulated, self.residuals)
            ]
            found.append(
                [(relative_l1(x[1], x[0]), relative_l1(y[1], y[0])) for (x,), (y,) in zip(*pairs, strict=True)]
            )
        return found


def recorded(points: list[calibrate.Point], branch: str, image: int = 0) -> list[tuple[float, float]]:
    return [(p.input, p.output) for p in points if (p.branch, p.image) == (branch, image)]


def assert_close(ours: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    torch.testing.assert_close(
        torch.tensor(ours, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7
    )


def test_points_are_the_distances_of_modulated_input_and_residual_per_branch() -> None:
    pipe = tiny.qwen_image()
    watched = Watched(pipe.transformer)
    with calibrate.recording(pipe) as session:
        tiny.generate(pipe, negative_prompt="a very long red sofa")
    cond, uncond = watched.points(2)
    assert len(cond) == 7
    assert_close(recorded(session.points, "cond"), cond)
    assert_close(recorded(session.points, "uncond"), uncond)
    assert [p.step for p in session.points if p.branch == "cond"] == list(range(1, 8))
    assert len(session.points) == 14


def test_each_image_of_a_batch_has_its_points() -> None:
    pipe = tiny.qwen_image()
    watched = Watched(pipe.transformer)
    with calibrate.recording(pipe) as session:
        tiny.generate(pipe, prompt=["a cat", "a dog"], negative_prompt=None)
    for sample in (0, 1):
        assert_close(recorded(session.points, "cond", sample), watched.points(1, sample)[0])


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_points_of_an_edit_are_of_the_noise_alone(zero_cond_t: bool) -> None:
    pipe = tiny.qwen_image_edit(zero_cond_t=zero_cond_t)
    watched = Watched(pipe.transformer, tokens=16)
    with calibrate.recording(pipe) as session:
        tiny.generate(pipe, negative_prompt=None)
    assert len(watched.residuals) == 8
    assert_close(recorded(session.points, "cond"), watched.points(1)[0])


def test_the_gate_of_a_cache_that_never_skips_sees_the_recorded_distances(any_pipe: Any) -> None:
    with calibrate.recording(any_pipe) as session:
        tiny.generate(any_pipe)
    with omni_kernels.patched(
        any_pipe, "tea_cache", {"rel_l1_thresh": 1e-9, "coefficients": [0, 0, 0, 1, 0]}
    ) as handle:
        tiny.generate(any_pipe)
        report = handle.report
    for name, branch in report.branches.items():
        points = [p for p in session.points if p.branch == name]
        worst = [max(p.input for p in points if p.step == step) for step in range(1, 8)]
        assert [d.distance for d in branch.decisions[1:]] == worst


def test_recording_changes_no_bit() -> None:
    pipe = tiny.qwen_image()
    before = tiny.generate(pipe)
    with calibrate.recording(pipe) as session:
        assert torch.equal(tiny.generate(pipe), before)
    assert session.report is not None
    assert session.report.forwards_saved == 0


def test_a_request_adds_no_point_between_itself_and_the_one_before() -> None:
    pipe = tiny.qwen_image()
    with calibrate.recording(pipe) as session:
        tiny.generate(pipe, negative_prompt=None)
        first = list(session.points)
        tiny.generate(pipe, negative_prompt=None, height=96)
        tiny.generate(pipe, negative_prompt=None)
    assert session.points[:7] == session.points[14:] == first


# What is left behind


def everything(pipe: Any) -> list[dict[str, Any]]:
    return [dict(vars(owner)) for owner in (pipe, pipe.transformer, pipe.scheduler)] + [dict(pipe.transformer._modules)]


class StopError(Exception):
    """Of a test."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_an_interruption_leaves_the_pipeline_as_it_was_and_holds_nothing(error: type[BaseException]) -> None:
    import gc

    pipe = tiny.qwen_image()
    tiny.generate(pipe, num_inference_steps=2)  # pipelines keep some of their last arguments
    before = everything(pipe)
    # By other tests; kept, so that no id is used again.
    held = [one for one in gc.get_objects() if type(one) is DistancePassage]
    others = set(map(id, held))

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(error), calibrate.recording(pipe):  # noqa: PT012 -- leaving the block is what is tested
        tiny.generate(pipe, num_inference_steps=3)
        during = everything(pipe)
        hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fail)
        try:
            tiny.generate(pipe, num_inference_steps=3)
        finally:
            hook.remove()
    assert during != before
    after = everything(pipe)
    assert [set(one) for one in after] == [set(one) for one in before]
    assert after[-1] == before[-1]
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is DistancePassage and id(one) not in others]


def test_nothing_is_held_between_requests() -> None:
    pipe = tiny.qwen_image()
    with calibrate.recording(pipe) as session:
        tiny.generate(pipe)
        assert session.held_tensors() == []


def test_a_cached_pipeline_is_not_recorded() -> None:
    pipe = tiny.qwen_image()
    with omni_kernels.patched(pipe, "tea_cache"):
        before = everything(pipe)
        with pytest.raises(omni_kernels.PatchConflictError, match="cached already"), calibrate.recording(pipe):
            pass
        assert everything(pipe) == before


# From runs to a file


def omni_of(pipe: Any) -> Omni:
    pipe.set_progress_bar_config(disable=True)
    return Omni(pipe, cache_backend=None)


def test_calibrated_coefficients_serve_the_runs_they_were_fitted_to(tmp_path: Path) -> None:
    pipe = tiny.qwen_image()
    arguments = {"height": 64, "width": 64, "num_inference_steps": 30, "negative_prompt": " "}
    omni = omni_of(pipe)
    fitted, document, points = calibrate.calibrate(omni, omni.prepare("a cat", seed=0, **arguments))
    assert fitted.points == len(points) == 58
    assert document["calibrated_for"] == {
        "transformer": "QwenImageTransformer2DModel",
        "blocks": 4,
        "steps": 30,
        "latents": [16, 64],
        "width": 64,
        "height": 64,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "scheduler_settings": document["calibrated_for"]["scheduler_settings"],
    }
    assert document["calibrated_for"]["scheduler_settings"]["shift_terminal"] == 0.02
    about = document["provenance"]
    assert (about["prompts"], about["seeds"], about["images"]) == (["a cat"], [0], 1)
    assert about["arguments"]["negative_prompt"] == " "
    assert about["versions"]["diffusers"]
    calibration.write(document, tmp_path / "tea.json")
    omni.close()
    with Omni(pipe, cache_backend="tea_cache", cache_config={"coefficients": str(tmp_path / "tea.json")}) as cached:
        (result,) = cached.generate("a dog", seed=1, **arguments)
    assert len(result.cache.notes) == 1, "nothing differs"
    assert result.cache.forwards_saved > 0
    json.dumps(result.settings)


def test_all_requests_are_pooled_and_each_is_told_of() -> None:
    omni = omni_of(tiny.z_image())
    requests = omni.prepare(["a cat", "a dog"], seed=0, height=64, width=64, num_inference_steps=26)
    told: list[tuple[int, str | None]] = []

    class Listener:
        def __init__(self, number: int, request: Any) -> None:
            told.append((number, request.prompt))

        def __enter__(self) -> None:
            return None

        def __exit__(self, *error: object) -> None:
            return None

    fitted, document, _ = calibrate.calibrate(omni, requests, Listener)
    assert told == [(0, "a cat"), (1, "a dog")]
    assert fitted.points == 2 * 25, "guidance is batched: two samples of one image"
    assert document["provenance"]["prompts"] == ["a cat", "a dog"]


def test_the_pictures_that_were_edited_are_told_apart_by_their_pixels(small_references: None) -> None:
    omni = omni_of(tiny.qwen_image_edit())
    red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    small = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 0}
    requests = [one for image in (red, blue, red) for one in omni.prepare("a cat", image=image, **small)]
    _, document, _ = calibrate.calibrate(omni, requests, method="mag_cache")
    assert document["provenance"]["images"] == 3
    assert document["provenance"]["references"] == [
        ["RGB", [64, 64], hashlib.sha256(image.tobytes()).hexdigest()] for image in (red, blue)
    ]


def test_calibration_is_without_a_cache() -> None:
    pipe = tiny.qwen_image()
    with Omni(pipe, cache_backend="tea_cache") as omni, pytest.raises(ValueError, match="an Omni without a cache"):
        calibrate.calibrate(omni, omni.prepare("a cat", height=64, width=64))


# A model that brings its own


@pytest.fixture
def shipped(embedded: str) -> Path:
    """The file of the only embedded model."""
    pipe = tiny.qwen_image()
    run = calibration.describe(pipe.transformer, 4, pipe.scheduler, 5, (16, 64))
    numbers = [0.01 * i for i in range(1, 61)]
    document = calibration.document(polynomial.fit(numbers, numbers), run, {"model": embedded})
    path = loading.EMBEDDED / embedded / "tea_cache.json"
    calibration.write(document, path)
    return path


def test_a_model_that_brings_coefficients_runs_with_them(shipped: Path, embedded: str) -> None:
    for model in (embedded, str(shipped.parent)):
        omni = Omni(model, cache_backend="tea_cache", device="cpu")
        assert omni.cache_config["coefficients"]["file"] == "tea_cache.json"
        assert omni.cache_config["rel_l1_thresh"] == 0.2
    omni.pipe.set_progress_bar_config(disable=True)
    (result,) = omni.generate("a cat", height=64, width=64, num_inference_steps=5, negative_prompt=" ")
    assert result.cache.notes == [f"coefficients: calibrated on {embedded}, 5 steps, R² 1.00"]
    pipe = omni.pipe
    omni.close()
    with Omni(pipe, cache_backend="tea_cache") as loaded:
        assert loaded.cache_config["coefficients"]["file"] == "tea_cache.json"


@pytest.mark.usefixtures("no_weights")
def test_given_coefficients_and_other_methods_do_not_look_at_the_models_own(shipped: Path, embedded: str) -> None:
    shipped.write_text("{")
    omni = Omni(embedded, cache_backend="tea_cache", cache_config={"coefficients": [0, 0, 0, 1, 0]})
    assert omni.cache_config["coefficients"] == (0, 0, 0, 1, 0)
    assert "coefficients" not in Omni(embedded, cache_backend="cache_dit").cache_config
    assert Omni(embedded, cache_backend=None).cache_config == {}
    with pytest.raises(ValueError, match=r"tea_cache\.json is not valid JSON"):
        Omni(embedded, cache_backend="tea_cache")


# The command


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def calibrate_command(model: object, out: Path, *more: object) -> int:
    small = ("--size", 64, "--steps", 30, "--negative-prompt", " ", "--device", "cpu")
    return run("calibrate", "tea_cache", "--model", model, "--out", out, *small, *more)


def test_the_command_writes_a_file_that_generate_takes_and_prints_the_fit(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made" / "tea.json"
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    prompts = ("--prompts", tmp_path / "prompts.txt", "--prompts", "a bird", "--seeds", "3,4")
    assert calibrate_command(saved["qwen_image"], path, *prompts) == 0
    out, err = capsys.readouterr()
    document = json.loads(path.read_text())
    assert document["points"] == 3 * 2 * 29 * 2
    assert document["provenance"]["prompts"] == ["a cat", "a dog", "a bird"]
    assert document["provenance"]["seeds"] == [3, 4]
    assert document["model"] == "qwen_image", "a directory's name, without the way to it"
    assert document["calibrated_for"]["steps"] == 30
    assert f"{document['points']} points" in out
    assert f"R² {document['r_squared']:.3f}" in out
    assert str(path) in out
    assert "6 of 6, under a minute left" in err

    config = json.dumps({"coefficients": str(path)})
    more = ("--cache-backend", "tea_cache", "--cache-config", config, "--size", 64, "--steps", 30, "--json")
    assert run("generate", "--model", saved["qwen_image"], "--prompt", "a cat", "--out", tmp_path / "out", *more) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["cache"]["notes"][0].startswith("coefficients: calibrated on qwen_image, 30 steps, 64×64, R²")
    assert len(result["cache"]["notes"]) == 1


def test_mag_cache_is_calibrated_by_the_same_command(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    small = ("--size", 64, "--steps", 6, "--device", "cpu", "--quiet")
    for model in ("qwen_image", "z_image"):  # the one has published ratios, the other none
        assert run("calibrate", "mag_cache", "--model", saved[model], "--prompt", "a cat", *small) == 0
        file = calibration.kept_for(str(saved[model]), "mag_cache")
        assert file.is_relative_to(tmp_path)
        document = json.loads(file.read_text())
        assert (document["method"], document["model"]) == ("mag_cache", model)
        assert document["points"] == {"qwen_image": 5, "z_image": 10}[model]  # Z-Image is guided in one batch
        assert document["mag_ratios"][0] == 1.0
        assert len(document["mag_ratios"]) == 6
        assert document["calibrated_for"]["steps"] == 6
        assert document["provenance"]["prompts"] == ["a cat"]
        out = capsys.readouterr().out
        assert f"{document['points']} points: from step to step" in out
        command = f"omni generate --model {saved[model]} --prompt 'a cat' --steps 6 --size 64x64"
        assert out.endswith(f"\n{command} --cache-backend mag_cache\n")
    config = json.dumps({"threshold": 0.5})
    more = ("--cache-backend", "mag_cache", "--cache-config", config, "--size", 64, "--steps", 6, "--json")
    assert run("generate", "--model", saved["z_image"], "--prompt", "a cat", "--quiet", *more) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["cache"]["notes"] == ["mag_ratios: calibrated on z_image, 6 steps, 64×64"]
    assert result["cache"]["forwards_saved"] > 0


def test_a_model_that_brings_ratios_runs_with_them(embedded: str, capsys: pytest.CaptureFixture[str]) -> None:
    home = loading.EMBEDDED / embedded
    assert run("calibrate", "mag_cache", "--model", embedded, "--out", home / "mag_cache.json", "--quiet") == 0
    omni = Omni(embedded, cache_backend="mag_cache", device="cpu")
    assert omni.cache_config["mag_ratios"]["file"] == "mag_cache.json"
    assert Omni(embedded, cache_backend="tea_cache", device="cpu").cache_config["coefficients"] is None
    capsys.readouterr()
    assert run("models") == 0
    assert f"mag_cache mag_ratios: calibrated on {embedded}, 5 steps, 64×64" in capsys.readouterr().out


def test_json_is_the_document(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("--prompt", "a cat", "--prompt", "a dog")
    assert calibrate_command(saved["z_image"], tmp_path / "tea.json", *prompts, "--quiet", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"file": str(tmp_path / "tea.json"), **json.loads((tmp_path / "tea.json").read_text())}
    assert err == ""


def test_a_useless_fit_is_one_line_and_writes_nothing(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate_command(saved["qwen_image"], tmp_path / "tea.json", "--prompt", "a cat", "--steps", 5) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("omni: error: no file was written: 8 points are too few for 5 coefficients, which need 50")
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_model_is_calibrated_with_its_own_prompts(
    embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate_command(embedded, tmp_path / "tea.json", "--quiet") == 0
    document = json.loads((tmp_path / "tea.json").read_text())
    assert document["provenance"]["prompts"] == ["a cat", "a dog", "a bird"]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache_dit"], "invalid choice: 'cache_dit'"),
        (["sea_cache"], "invalid choice: 'sea_cache'"),
        ([], "the following arguments are required: METHOD"),
        (["tea_cache", "--model", "MODEL"], "has no prompts of its own: give --prompts"),
        (["tea_cache", "--model", "MODEL", "--prompt", "x", "--out", "."], "--out . is a directory: give a file"),
        (["tea_cache", "--model", "MODEL", "--prompt", "x", "--steps", "0"], "a whole number of at least 1"),
        (["tea_cache", "--model", "UNKNOWN", "--prompt", "x"], "the transformer's ModelRow gives no modulation"),
    ],
)
def test_wrong_input_is_one_line_before_loading(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "unknown" / "transformer").mkdir(parents=True)
    index = (saved["qwen_image"] / "model_index.json").read_text()
    (tmp_path / "unknown" / "model_index.json").write_text(index)
    (tmp_path / "unknown" / "transformer" / "config.json").write_text('{"_class_name": "Strange"}')
    stand_ins = {"MODEL": str(saved["qwen_image"]), "UNKNOWN": str(tmp_path / "unknown")}
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "tea.json")]
    assert run("calibrate", *(stand_ins.get(argument, argument) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.usefixtures("no_weights")
def test_a_wrong_file_is_named_before_loading(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tea.json").write_text('{"method": "other"}')
    for name, message in (("no.json", "there is no file"), ("tea.json", "is not a calibration of TeaCache")):
        config = json.dumps({"coefficients": str(tmp_path / name)})
        more = ("--cache-backend", "tea_cache", "--cache-config", config)
        assert run("generate", "--model", saved["qwen_image"], "--prompt", "x", *more) == 2
        assert message in capsys.readouterr().err


def test_models_says_which_coefficients_a_model_has(
    shipped: Path, embedded: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("models") == 0
    assert f"tea_cache coefficients: calibrated on {embedded}, 5 steps, R² 1.00" in capsys.readouterr().out
    assert run("models", "--json") == 0
    assert json.loads(capsys.readouterr().out)["embedded"][embedded]["tea_cache"].startswith("calibrated on")
    shipped.unlink()
    assert run("models") == 0
    assert "tea_cache coefficients: those published for its transformer" in capsys.readouterr().out


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("method", ["mag_cache", "tea_cache", "velocity_cache"])
@pytest.mark.parametrize("model", CALIBRATED)
def test_what_an_embedded_model_brings_was_calibrated_on_it_as_it_is_run(model: str, method: str) -> None:
    directory = loading.embedded_models()[model]
    omni = Omni(model, cache_backend=method)
    brought = omni.cache_config[calibration.KINDS[method].key]
    about = brought["calibrated_for"]
    defaults = json.loads((directory / "defaults.json").read_text())
    scheduler = json.loads((directory / "scheduler" / "scheduler_config.json").read_text())
    facts = models.describe(json.loads((directory / "transformer" / "config.json").read_text()))
    assert brought["model"] == directory.name
    assert (about["transformer"], about["blocks"]) == (facts.class_name, facts.blocks)
    steps = {about["steps"]} if "steps" in about else {row["steps"] for row in brought["schedules"]}
    assert steps == {defaults["num_inference_steps"]}
    if "width" in about:
        assert (about["width"], about["height"]) == (defaults["width"], defaults["height"])
    assert about["scheduler"] == scheduler["_class_name"]
    assert about["scheduler_settings"].items() <= scheduler.items()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_pipeline_finds_its_calibration_whether_it_was_loaded_by_text_or_by_a_path(kind: type) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(kind(loading.embedded_models()["emoji-qwen-image"]))
    with omni_kernels.patched(pipe, "velocity_cache", {"budget": 17}) as handle:
        assert handle.cache_config["calibration"]["model"] == "emoji-qwen-image"
    with Omni(pipe, cache_backend="velocity_cache") as omni:
        assert omni.cache_config["calibration"]["model"] == "emoji-qwen-image"
