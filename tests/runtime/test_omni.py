"""`Omni`: what it takes, what it gives back, what it refuses before loading, and that it leaves nothing behind."""

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import tiny
import torch
from PIL import Image

import omni_kernels
from omni_kernels.patching import handle_of
from omni_runtime import Omni, OmniResult, embedded_pipeline
from omni_runtime.cache import calibration, config
from omni_runtime.cache.report import CacheReport, StepEvent

pytestmark = pytest.mark.usefixtures("no_environment")

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 6, "seed": 0}
FIVE_OF_FOUR_BLOCKS = {"Fn_compute_blocks": 3, "Bn_compute_blocks": 2}
ALWAYS_SKIP = {"residual_diff_threshold": 1.0, "max_warmup_steps": 2, "max_continuous_cached_steps": -1}


def images_equal(a: OmniResult, b: OmniResult) -> bool:
    return [x.tobytes() for x in a.images] == [y.tobytes() for y in b.images]


def quiet(omni: Omni) -> Omni:
    omni.pipe.set_progress_bar_config(disable=True)
    return omni


# The two snippets


def test_the_first_snippet(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`model="Qwen/Qwen-Image"` finds a directory of that name before it asks the hub; sizes are the test's."""
    stand_in_for_qwen_image(saved["qwen_image"], tmp_path, monkeypatch)

    omni = Omni(model="Qwen/Qwen-Image", cache_backend="tea_cache", cache_config={"rel_l1_thresh": 0.2})
    outputs = omni.generate(prompt="A cat sitting on a windowsill", num_inference_steps=50)

    assert isinstance(outputs[0].images[0], Image.Image)
    assert outputs[0].cache.steps == 50
    assert outputs[0].cache.forwards_saved > 0


def test_the_second_snippet(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_for_qwen_image(saved["qwen_image"], tmp_path, monkeypatch)

    omni = Omni(
        model="Qwen/Qwen-Image",
        cache_backend="cache_dit",
        cache_config={
            "Fn_compute_blocks": 1,
            "Bn_compute_blocks": 0,
            "max_warmup_steps": 8,
            "enable_taylorseer": True,
            "taylorseer_order": 1,
        },
    )
    outputs = omni.generate(prompt="A cat sitting on a windowsill", num_inference_steps=50)

    assert outputs[0].cache.branches["cond"].computed[:8] == list(range(8))
    assert outputs[0].cache.forwards_saved > 0


def stand_in_for_qwen_image(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen-Image").symlink_to(directory)
    monkeypatch.chdir(tmp_path)
    # 1024×1024 is what the pipeline makes when no size is given: 64×64 here.
    init = diffusers.QwenImagePipeline.__init__

    @functools.wraps(init)
    def small(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.default_sample_size = 8

    monkeypatch.setattr(diffusers.QwenImagePipeline, "__init__", small)


# What `model` may be


def test_a_loaded_pipeline_gives_what_the_pipeline_alone_gives(qwen_pipe: Any) -> None:
    alone = tiny.generate(qwen_pipe, num_inference_steps=6, output_type="pt")
    with quiet(Omni(qwen_pipe)) as omni:
        (result,) = omni.generate("a cat", " ", output_type="pt", **SMALL)
    assert torch.equal(result.images, alone)


def test_a_directory_gives_what_the_loaded_pipeline_gives(saved: dict[str, Path]) -> None:
    """Loaded from the same file: where weights lie in memory may decide the last bit of a product."""
    loaded = diffusers.DiffusionPipeline.from_pretrained(saved["qwen_image"])
    (expected,) = Omni(loaded).generate("a cat", **SMALL)
    for model in (str(saved["qwen_image"]), saved["qwen_image"]):
        assert images_equal(Omni(model).generate("a cat", **SMALL)[0], expected)


def test_an_embedded_model_runs_by_name_with_its_defaults(embedded: str) -> None:
    (result,) = Omni(embedded, cache_backend="tea_cache").generate("a cat", seed=0)
    assert result.images[0].size == (64, 64)
    assert result.cache.steps == 5
    assert set(result.cache.branches) == {"cond", "uncond"}, "the default negative prompt turns guidance on"
    (result,) = Omni(embedded, cache_backend="tea_cache").generate("a cat", seed=0, num_inference_steps=3)
    assert result.cache.steps == 3


def test_what_from_pretrained_takes_is_passed_on(saved: dict[str, Path]) -> None:
    transformer = tiny.qwen_image(layers=2).transformer
    omni = Omni(saved["qwen_image"], transformer=transformer, low_cpu_mem_usage=True)
    assert omni.pipe.transformer is transformer


def test_a_hub_model_is_loaded_by_its_id_with_what_from_pretrained_takes(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model, name, **_: str(saved["z_image"] / name))
    real, calls = diffusers.DiffusionPipeline.from_pretrained, []

    def from_pretrained(location: str, **arguments: Any) -> Any:
        calls.append((location, arguments))
        return real(saved["z_image"])

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    omni = Omni("someone/z-image", cache_backend="tea_cache", revision="v1", variant="bf16", device="cpu")
    assert not calls, "nothing is downloaded before it is needed"
    (result,) = quiet(omni).generate("a cat", **SMALL)
    assert calls == [("someone/z-image", {"dtype": torch.float32, "revision": "v1", "variant": "bf16"})]
    assert result.settings["model"] == "someone/z-image"


def test_every_tiny_pipeline_runs_under_every_backend(any_pipe: Any) -> None:
    arguments = tiny.default_arguments(any_pipe)
    for backend in ("tea_cache", "cache_dit", "first_block_cache"):
        with tiny.small_references(), quiet(Omni(any_pipe, cache_backend=backend)) as omni:
            (result,) = omni.generate("a cat", **arguments, **SMALL)
        assert result.images[0].size == (64, 64)
        assert result.cache.complete
        assert result.cache.steps == 6


# dtype and device


def test_weights_are_float32_on_the_cpu_unless_a_dtype_is_named(saved: dict[str, Path]) -> None:
    assert Omni(saved["z_image"], device="cpu").pipe.transformer.dtype is torch.float32
    assert Omni(saved["z_image"], device="cpu", dtype="bf16").pipe.transformer.dtype is torch.bfloat16
    assert Omni(saved["z_image"], device="cpu", torch_dtype=torch.float64).pipe.transformer.dtype is torch.float64
    with pytest.raises(ValueError, match="dtype and torch_dtype cannot both be given"):
        Omni(saved["z_image"], dtype="fp32", torch_dtype=torch.float32)


def test_a_loaded_pipeline_keeps_dtype_and_device_unless_asked(z_pipe: Any) -> None:
    z_pipe.to(torch.bfloat16)
    assert Omni(z_pipe).pipe.transformer.dtype is torch.bfloat16
    omni_kernels.unpatch(z_pipe)
    assert Omni(z_pipe, dtype="float32", device="cpu").pipe.transformer.dtype is torch.float32


# The cache: by argument, JSON text, environment variable, not at all


@pytest.mark.parametrize("backend", [None, "none"])
def test_no_cache(z_pipe: Any, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "tea_cache")
    omni = quiet(Omni(z_pipe, cache_backend=backend))
    assert (omni.cache_backend, omni.cache_config) == (None, {})
    (result,) = omni.generate("a cat", **SMALL)
    assert result.cache is None


def test_left_out_the_environment_variable_names_the_backend(z_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "cache_dit")
    assert Omni(z_pipe).cache_backend == "cache_dit"
    omni_kernels.unpatch(z_pipe)
    assert Omni(z_pipe, cache_backend="tea_cache").cache_backend == "tea_cache"
    omni_kernels.unpatch(z_pipe)
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "")
    assert Omni(z_pipe).cache_backend is None


def test_configuration_as_json_text_is_the_same_as_a_dict(z_pipe: Any) -> None:
    omni = Omni(z_pipe, cache_backend="cache_dit", cache_config='{"Fn_compute_blocks": 2, "enable_taylorseer": true}')
    assert omni.cache_config["Fn_compute_blocks"] == 2
    assert omni.cache_config["enable_taylorseer"] is True
    assert omni.cache_config["max_warmup_steps"] == 4, "what is left out takes its default"


# Results


def test_a_result_per_prompt_with_images_cache_and_timings(z_pipe: Any) -> None:
    omni = quiet(Omni(z_pipe, cache_backend="cache_dit", cache_config=ALWAYS_SKIP))
    results = omni.generate(["a cat", "a dog"], **SMALL)
    assert [result.prompt for result in results] == ["a cat", "a dog"]
    assert not images_equal(*results)
    for result in results:
        assert isinstance(result.cache, CacheReport)
        assert [branch.computed for branch in result.cache.branches.values()] == [[0, 1]]
        assert len(result.timings.steps) == 6
        parts = result.timings.before + sum(result.timings.steps) + result.timings.after
        assert result.timings.total == pytest.approx(parts)
        assert min(result.timings.steps) > 0
    assert results[0].cache is not results[1].cache


def test_skipped_steps_take_less_time_in_the_timings() -> None:
    """24 blocks, so that a skipped step is much shorter than any noise of the clock."""
    omni = quiet(Omni(tiny.z_image(layers=24), cache_backend="cache_dit", cache_config=ALWAYS_SKIP))
    (result,) = omni.generate("a cat", **SMALL)
    assert max(result.timings.steps[2:]) < result.timings.steps[1]


def test_one_prompt_gives_a_list_of_one(z_pipe: Any) -> None:
    assert len(quiet(Omni(z_pipe)).generate("a cat", **SMALL)) == 1


def test_the_same_seed_gives_the_same_images_and_is_told(z_pipe: Any) -> None:
    omni = quiet(Omni(z_pipe, cache_backend="tea_cache"))
    arguments = SMALL | {"seed": None}
    (drawn,) = omni.generate("a cat", **arguments)
    (again,) = omni.generate("a cat", **arguments | {"seed": drawn.seed})
    assert images_equal(drawn, again)
    assert not images_equal(drawn, omni.generate("a cat", **arguments)[0])


def test_several_images_per_prompt_are_in_one_result(z_pipe: Any) -> None:
    (result,) = quiet(Omni(z_pipe)).generate("a cat", num_images_per_prompt=2, **SMALL)
    assert len(result.images) == 2


@pytest.mark.parametrize("backend", [None, "cache_dit"])
def test_a_listener_is_told_of_every_step(z_pipe: Any, backend: str | None) -> None:
    events: list[StepEvent] = []
    omni = quiet(Omni(z_pipe, cache_backend=backend, cache_config=ALWAYS_SKIP if backend else None))
    omni.generate("a cat", on_step=events.append, **SMALL)
    assert [(event.step, event.steps) for event in events] == [(step, 6) for step in range(6)]
    assert [event.computed for event in events] == [True, True] + [backend is None] * 4
    omni.generate("a cat", **SMALL)
    assert len(events) == 6, "a listener hears its own request only"


def test_settings_say_all_that_makes_the_images_again_and_are_written_into_the_png(z_pipe: Any, tmp_path: Path) -> None:
    from omni_runtime.generation.result import read_settings

    omni = quiet(Omni(z_pipe, cache_backend="tea_cache", cache_config={"rel_l1_thresh": 0.1}))
    (result,) = omni.generate("ein Kätzchen", num_images_per_prompt=2, **SMALL)
    first, second = result.save(tmp_path / "made" / "cat.png")
    assert [path.name for path in (first, second)] == ["cat.png", "cat-2.png"]
    settings = read_settings(first)
    assert settings == result.settings
    assert settings["prompt"] == "ein Kätzchen"
    assert settings["cache_config"]["rel_l1_thresh"] == 0.1
    assert set(settings["versions"]) == {"omni_kernels", "diffusers", "torch"}
    assert {"seed", "num_inference_steps", "height", "width", "model", "cache_backend"} <= set(settings)
    with Image.open(first) as image:
        assert image.convert("RGB").tobytes() == result.images[0].tobytes()
        assert b"tEXtomni\0" in first.read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="holds no settings"):
        read_settings(tmp_path / "other.png")


def test_settings_name_the_steps_that_the_pipeline_chose(qwen_pipe: Any) -> None:
    (result,) = quiet(Omni(qwen_pipe, cache_backend="tea_cache")).generate("a cat", height=64, width=64)
    assert result.settings["num_inference_steps"] == result.cache.steps == 50


def test_tensors_are_not_saved_as_png(z_pipe: Any, tmp_path: Path) -> None:
    (result,) = quiet(Omni(z_pipe)).generate("a cat", output_type="pt", **SMALL)
    with pytest.raises(TypeError, match="only PIL images can be saved"):
        result.save(tmp_path / "cat.png")
    assert json.dumps(result.settings)


# Wrong input, before any weight is loaded


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cache_backend": "teacache"}, ValueError, "unknown cache backend 'teacache': did you mean 'tea_cache'"),
        ({"cache_backend": 7}, TypeError, "must be the name of a backend, not int"),
        ({"cache_backend": "tea_cache", "cache_config": {"rel_l1_tresh": 1}}, ValueError, "mean 'rel_l1_thresh'"),
        ({"cache_backend": "tea_cache", "cache_config": '{"rel_l1_tresh": 1}'}, ValueError, "mean 'rel_l1_thresh'"),
        ({"cache_backend": "tea_cache", "cache_config": "{rel"}, ValueError, "cache_config is not valid JSON"),
        ({"cache_backend": "tea_cache", "cache_config": "[1]"}, TypeError, "must be a JSON object"),
        ({"cache_backend": "tea_cache", "cache_config": [1]}, TypeError, "must be a dict or JSON text, not list"),
        ({"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 0}}, ValueError, "rel_l1_thresh .* not 0"),
        ({"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": -1}}, ValueError, "rel_l1_thresh .* not -1"),
        ({"cache_backend": "tea_cache", "cache_config": '{"rel_l1_thresh": NaN}'}, ValueError, "> 0, not nan"),
        ({"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": "0.2"}}, TypeError, "rel_l1_thresh"),
        ({"cache_backend": "tea_cache", "cache_config": {"coefficients": [1, 2, 3, 4]}}, ValueError, "5 finite"),
        ({"cache_backend": "cache_dit", "cache_config": {"Fn_compute_blocks": -1}}, ValueError, "Fn_compute_blocks"),
        ({"cache_backend": "cache_dit", "cache_config": {"Bn_compute_blocks": -1}}, ValueError, "Bn_compute_blocks"),
        ({"cache_backend": "cache_dit", "cache_config": FIVE_OF_FOUR_BLOCKS}, ValueError, "3 [+] 2: .* 4 blocks"),
        ({"cache_backend": "cache_dit", "cache_config": {"taylorseer_order": 4}}, ValueError, "taylorseer_order"),
        ({"cache_backend": "cache_dit", "cache_config": {"enable_taylorseer": "yes"}}, TypeError, "enable_taylorseer"),
        ({"cache_config": {"rel_l1_thresh": 0.2}}, ValueError, "without a cache_backend"),
        ({"dtype": "bfloat61"}, ValueError, "did you mean 'bfloat16'"),
        ({"device": "cuda:99"}, ValueError, "not available"),
        ({"cache_confg": {}}, TypeError, "'cache_confg'; did you mean 'cache_config'"),
    ],
)  # fmt: skip
def test_wrong_arguments_fail_by_name_before_loading(
    saved: dict[str, Path], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Omni(saved["qwen_image"], **arguments)


@pytest.mark.parametrize(("model", "files"), [("emoji-qwen-image", 1), ("qwen_image", 0)])
def test_a_configuration_is_resolved_once_and_a_calibration_looked_for_once(
    saved: dict[str, Path], model: str, files: int
) -> None:
    """With a calibration of the model's own, and without one: neither loading nor installing does it again."""
    counted = (config, "resolve"), (calibration, "own_file"), (calibration, "read")
    with contextlib.ExitStack() as stack:
        resolved, looked_for, read = (
            stack.enter_context(mock.patch.object(one, name, wraps=getattr(one, name))) for one, name in counted
        )
        with Omni(saved.get(model, model), device="cpu", cache_backend="velocity_cache", cache_config={}) as omni:
            omni.load()
            assert (omni.cache_config["calibration"] is not None) == bool(files)
    assert (resolved.call_count, looked_for.call_count, read.call_count) == (1, 1, files)


@pytest.mark.usefixtures("no_weights")
def test_a_backend_from_the_environment_is_blamed_on_it(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "teecache")
    with pytest.raises(ValueError, match=r"unknown cache backend 'teecache'.*variable DIFFUSION_CACHE_BACKEND"):
        Omni(saved["qwen_image"])


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("qwen_image", {"image": tiny.reference_image()}, "takes no image"),
        ("qwen_image_edit", {}, "needs an image"),
        ("qwen_image_edit", {"image": [tiny.reference_image()] * 2}, "one image per prompt"),
        ("qwen_image", {"prompt": []}, "empty list"),
        ("qwen_image", {"num_inference_steps": 0}, "num_inference_steps"),
    ],
)
def test_a_first_request_that_cannot_be_fails_before_loading(
    saved: dict[str, Path], model: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Omni(saved[model]).generate(**{"prompt": "a cat"} | arguments)


@pytest.mark.usefixtures("no_weights")
def test_a_mask_of_the_wrong_length_fails_before_loading(saved: dict[str, Path]) -> None:
    omni = Omni(saved["qwen_image"], cache_backend="cache_dit", cache_config={"steps_computation_mask": "1101"})
    with pytest.raises(ValueError, match="4 entries, but the request has 6 steps"):
        omni.generate("a cat", **SMALL)


@pytest.mark.usefixtures("no_weights")
def test_a_transformer_that_no_cache_knows_is_refused_by_name(saved: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(saved["qwen_image"], model)
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": "NewTransformer2DModel"}))
    with pytest.raises(ValueError, match="'NewTransformer2DModel'"):
        Omni(model, cache_backend="tea_cache")
    Omni(model)  # without a cache it is the pipeline's business


@pytest.mark.parametrize("model", [7, None, object(), torch.nn.Linear(1, 1)])
def test_model_must_be_a_name_or_a_pipeline(model: Any) -> None:
    with pytest.raises(TypeError, match="model must be a name, a directory or a loaded diffusers pipeline"):
        Omni(model)


def test_a_loaded_pipeline_takes_no_arguments_of_from_pretrained(z_pipe: Any) -> None:
    with pytest.raises(TypeError, match="a loaded pipeline takes no variant"):
        Omni(z_pipe, variant="fp16")


def test_a_size_that_would_be_rounded_fails_before_the_pipeline_runs(z_pipe: Any) -> None:
    with pytest.raises(ValueError, match="height 72 is not a multiple of 16"):
        Omni(z_pipe).generate("a cat", **SMALL | {"height": 72})


# Nothing stays behind


def interrupt_at_step_three(pipe: Any, step: int, *_: Any) -> dict:
    if step == 3:
        raise KeyboardInterrupt
    return {}


def test_a_request_that_raises_leaves_nothing_behind(qwen_pipe: Any) -> None:
    omni = quiet(Omni(qwen_pipe, cache_backend="cache_dit", cache_config=ALWAYS_SKIP))
    (expected,) = omni.generate("a cat", " ", **SMALL)
    before, tensors = dict(vars(qwen_pipe)), live_tensors()
    with pytest.raises(KeyboardInterrupt):
        omni.generate("a cat", " ", callback_on_step_end=interrupt_at_step_three, on_step=lambda event: None, **SMALL)
    qwen_pipe._current_timestep = None  # the pipeline's own, until its next request
    assert live_tensors() == tensors, "tensors of the dead request are still held"
    after = dict(vars(qwen_pipe))
    changed = {name for name in before | after if before.get(name) is not after.get(name)}
    assert changed <= {"_interrupt", "_num_timesteps", "_guidance_scale", "_attention_kwargs"}
    assert handle_of(qwen_pipe).on_step is None
    assert images_equal(omni.generate("a cat", " ", **SMALL)[0], expected)


def live_tensors() -> int:
    gc.collect()
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


def test_close_puts_the_pipeline_back(qwen_pipe: Any) -> None:
    expected = tiny.generate(qwen_pipe)
    before = set(vars(qwen_pipe))
    with Omni(qwen_pipe, cache_backend="cache_dit", cache_config=ALWAYS_SKIP) as omni:
        assert not torch.equal(tiny.generate(qwen_pipe), expected)
    assert set(vars(qwen_pipe)) == before
    assert torch.equal(tiny.generate(qwen_pipe), expected)
    omni.close()
    with pytest.raises(RuntimeError, match="this Omni is closed"):
        omni.generate("a cat", **SMALL)


def test_a_close_that_cannot_undo_can_be_tried_again(z_pipe: Any) -> None:
    omni = Omni(z_pipe, cache_backend="tea_cache")
    installed = type(z_pipe)
    z_pipe.__class__ = type("Theirs", (installed,), {})
    with pytest.raises(omni_kernels.PatchConflictError):
        omni.close()
    z_pipe.__class__ = installed
    omni.close()
    assert handle_of(z_pipe) is None


def test_a_pipeline_that_was_unpatched_behind_its_back_does_not_run_without_a_cache_unnoticed(z_pipe: Any) -> None:
    omni = Omni(z_pipe, cache_backend="tea_cache")
    omni_kernels.unpatch(z_pipe)
    with pytest.raises(RuntimeError, match="was unpatched"):
        omni.generate("a cat", **SMALL)


def test_a_patch_that_was_there_before_stays_after_close(qwen_pipe: Any) -> None:
    handle = omni_kernels.patch(qwen_pipe, cache_backend="tea_cache")
    with Omni(qwen_pipe, cache_backend="tea_cache"):
        pass
    assert handle.active
    with pytest.raises(omni_kernels.PatchConflictError):
        Omni(qwen_pipe, cache_backend="cache_dit")
    assert handle.active


def test_the_pipelines_own_progress_bar_still_runs(z_pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Omni(z_pipe).generate("a cat", **SMALL)
    assert "6/6" in capsys.readouterr().err
    assert "progress_bar" not in vars(z_pipe)


# Importing


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return set(subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).split())


def test_importing_loads_neither_diffusers_nor_transformers() -> None:
    assert "torch" not in loaded_after("import omni_runtime")
    modules = "from omni_runtime.cli import calibrate, compare, generate, listings"
    assert not loaded_after(f"from omni_runtime import Omni; {modules}") & {"diffusers", "transformers"}


def test_all_names_what_there_is() -> None:
    import omni_runtime

    for name in omni_runtime.__all__:
        assert callable(getattr(omni_runtime, name))
        assert name in dir(omni_runtime)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = omni_runtime.no_such_name


@pytest.mark.parametrize("name", ["emoji-qwen-image", "emoji-z-image"])
def test_an_embedded_pipeline_is_plain_and_makes_small_pictures(name: str) -> None:
    pipe = embedded_pipeline(name)
    assert handle_of(pipe) is None
    size = {} if name == "emoji-qwen-image" else {"height": 64, "width": 64}
    assert pipe("red apple on blue", num_inference_steps=2, **size).images[0].size == (64, 64)


def test_an_embedded_pipeline_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no embedded model 'emoji-flux'; there are emoji-qwen-image"):
        embedded_pipeline("emoji-flux")
