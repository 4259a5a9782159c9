"""The command line: what it writes, prints, lists and refuses, and with which exit code."""

import io
import json
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny
import torch
from PIL import Image

from omni_kernels.patching import backends as registry
from omni_runtime import Omni, cli
from omni_runtime.cli import inputs, listings, options
from omni_runtime.generation.loading import embedded_models
from omni_runtime.generation.result import read_settings

pytestmark = pytest.mark.usefixtures("no_environment")


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def generate(model: object, out: Path, *more: object) -> int:
    return run("generate", "--model", model, "--out", out, "--prompt", "a cat", "--size", 64, "--steps", 6, *more)


# generate


def test_generate_writes_a_png_with_its_settings_and_prints_a_summary(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = generate(
        saved["qwen_image"], tmp_path, "--seed", 3, "--cache-backend", "cache_dit",
        "--cache-config", '{"residual_diff_threshold": 1}', "--negative-prompt", " ",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "a-cat-seed3-cache_dit.png"
    assert Image.open(path).size == (64, 64)
    settings = read_settings(path)
    assert (settings["prompt"], settings["seed"], settings["num_inference_steps"]) == ("a cat", 3, 6)
    assert settings["model"] == str(saved["qwen_image"])
    assert settings["cache_config"]["residual_diff_threshold"] == 1
    assert settings["versions"]["diffusers"]
    assert str(path) in out
    assert "seed 3, 6 steps" in out
    assert "cache_dit: 8 of 12 transformer forwards computed, 4 skipped" in out
    assert "[████░░]" in err, "the bar says which steps were computed and which skipped"
    assert "4 computed, 2 skipped" in err


def test_the_same_command_makes_the_same_image_under_another_name(saved: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        assert generate(saved["z_image"], tmp_path, "--seed", 0, "--quiet") == 0
    first, second = sorted(tmp_path.iterdir(), reverse=True)
    assert {first.name, second.name} == {"a-cat-seed0.png", "a-cat-seed0-2.png"}
    assert Image.open(first).tobytes() == Image.open(second).tobytes()


def test_json_is_the_only_thing_on_stdout(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(saved["z_image"], tmp_path, "--prompt", "a dog", "--cache-backend", "tea_cache", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["prompt"] for result in results] == ["a cat", "a dog"]
    for result in results:
        assert Path(result["files"][0]).is_file()
        assert result["cache"]["backend"] == "tea_cache"
        assert len(result["timings"]["steps"]) == 6
        assert result["settings"]["seed"] == result["seed"]


def test_quiet_shows_no_progress(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(saved["z_image"], tmp_path, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_out_may_be_a_file(saved: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "made" / "here.png"
    assert generate(saved["z_image"], out) == 0
    assert Image.open(out).size == (64, 64)


def test_set_reaches_the_pipeline(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--set", "num_images_per_prompt=2", "--set", "guidance_scale=0.0", "--json")
    assert generate(saved["z_image"], tmp_path, *more) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert len(result["files"]) == 2
    assert result["settings"]["guidance_scale"] == 0.0


@pytest.mark.usefixtures("small_references")
def test_an_edit_starts_from_a_picture(saved: dict[str, Path], tmp_path: Path) -> None:
    tiny.reference_image().save(tmp_path / "reference.png")
    assert generate(saved["qwen_image_edit"], tmp_path / "out", "--image", tmp_path / "reference.png") == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_an_embedded_model_runs_with_its_defaults_on_one_thread(
    embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    more = ("--prompt", "a cat", "--device", "cpu", "--out", tmp_path, "--json")
    assert run("generate", "--model", embedded, *more) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["settings"]["height"] == 64
    assert result["settings"]["dtype"] == "float32"
    assert len(result["timings"]["steps"]) == 5
    assert threads == [1]
    assert run("generate", "--model", embedded, *more, "--threads", 2) == 0
    assert threads == [1, 2]


def test_the_environment_variable_names_the_backend(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "first_block_cache")
    assert generate(saved["z_image"], tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["cache"]["backend"] == "first_block_cache"
    assert generate(saved["z_image"], tmp_path, "--json", "--cache-backend", "none") == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["cache"] is None


# Wrong input


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["generat"], "invalid choice: 'generat'"),
        (["generate"], "the following arguments are required: --prompt"),
        (
            ["generate", "--prompt", "x", "--step", "3"],
            "unknown option --step: did you mean --steps? (see omni generate",
        ),
        (["generate", "--promt", "x"], "unknown option --promt: did you mean --prompt?"),
        (["generate", "--promt=x"], "unknown option --promt: did you mean --prompt?"),
        (["calibrate", "--promt", "x"], "unknown option --promt: did you mean --prompt?"),
        (["--vesion", "generate"], "unknown option --vesion: did you mean --version? (see omni --help)"),
        (["generate", "x", "--prompt", "y"], "unrecognized arguments: x"),
        (["generate", "--prompt", "\udcf1"], "must be UTF-8, not '\\udcf1'"),
        (["generate", "--prompt", "x", "--out", "x.jpg"], "--out x.jpg: pictures are PNG: give a .png file or a dir"),
        (["backends", "tee_cache"], "did you mean 'tea_cache'?"),
        (["generate", "--prompt", "x", "--steps", "0"], "must be a whole number of at least 1, not '0'"),
        (["generate", "--prompt", "x", "--seed", "-1"], "--seed"),
        (["generate", "--prompt", "x", "--size", "64*64"], "must be a size like 512 or 768x512 (width x height), not"),
        (["generate", "--prompt", "x", "--set", "scale"], "must be KEY=JSON, not 'scale'"),
        (["generate", "--prompt", "x", "--model", "no/such/directory"], "no model 'no/such/directory'"),
        (["generate", "--prompt", "x", "--model", "owner/name"], "the hub could not be reached"),
        (["generate", "--prompt", "x", "--model", "TESTS"], "is not a diffusers pipeline: it has no model_index.json"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--cache-backend", "teacache"], "did you mean 'tea_cache'?"),
        (
            ["generate", "--prompt", "x", "--model", "MODEL", "--cache-backend", "tea_cache", "--cache-config", "{"],
            "cache_config is not valid JSON",
        ),
        (
            [
                "generate",
                "--prompt",
                "x",
                "--model",
                "MODEL",
                "--cache-backend",
                "tea_cache",
                "--cache-config",
                '{"x":1}',
            ],
            "tea_cache has no key 'x'",
        ),
        (["generate", "--prompt", "x", "--model", "MODEL", "--image", "no.png"], "it takes no image"),
        (["generate", "--prompt", "x", "--model", "EDIT"], "QwenImageEditPipeline needs an image"),
        (["generate", "--prompt", "x", "--model", "EDIT", "--image", "no.png"], "no image file 'no.png'"),
        (
            ["generate", "--prompt", "x", "--model", "MODEL", "--set", "tru_cfg_scale=4"],
            "did you mean 'true_cfg_scale'",
        ),
        (
            ["generate", "--prompt", "x", "--model", "MODEL", "--set", "true_cfg_scale=high"],
            "must be a number, not 'high'",
        ),
        (["generate", "--prompt", "x", "--model", "MODEL", "--set", "output_type=pt"], "output_type cannot be set"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--dtype", "float31"], "unknown dtype 'float31'"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--device", "cuda:99"], "not available here"),
        (["generate", "--prompt", "x", "--prompt", "y", "--out", "x.png"], "is one file, for 2 prompts"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--min-width", "64"], "belong to --quantize"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--edge-steps", "2"], "two numbers of steps like 2,2"),
        (["compare", "--model", "MODEL"], "has no prompts of its own"),
        (["compare", "--model", "MODEL", "--prompts", "missing.txt"], "no file 'missing.txt'"),
        (["compare", "--model", "MODEL", "--prompts", "no/such/file"], "no file 'no/such/file'"),
        (["compare", "--model", "MODEL", "--prompts", "no prompts.txt"], "no file 'no prompts.txt'"),
        (["compare", "--model", "MODEL", "--prompts", "EMPTY"], "empty.txt has no prompts: it must have one per line"),
        (["compare", "--model", "MODEL", "--prompts", "LATIN-1"], "latin-1.txt is not UTF-8"),
        (["compare", "--model", "MODEL", "--prompt", "x", "--out", "x.png"], "--out x.png: several files are written"),
        (["compare", "--model", "MODEL", "--prompt", "x", "--run", "a=b=c"], "a run is NAME=BACKEND:JSON"),
        (["compare", "--model", "MODEL", "--prompt", "x", "--run", "tea_cache:{"], "is not valid JSON"),
        (["compare", "--model", "MODEL", "--prompt", "x", "--run", "tee_cache"], "did you mean 'tea_cache'"),
        (["compare", "--model", "MODEL", "--prompt", "x", "--run", 'tea_cache:{"rel_l1_thresh":0}'], "rel_l1_thresh"),
        (["compare", "--model", "MODEL", "--prompt", "x", "--run", "tea_cache", "--run", "tea_cache"], "two runs are"),
        (["compare", "--model", "MODEL", "--prompt", "x", "--fewer-steps", "60"], "fewer steps than 50 are wanted"),
        (["compare", "--model", "MODEL", "--prompt", "x", "--seeds", "1,x"], "--seeds"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two_before_loading(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    stand_ins = {"MODEL": saved["qwen_image"], "EDIT": saved["qwen_image_edit"], "TESTS": Path(__file__).parent}
    stand_ins |= {"EMPTY": tmp_path / "empty.txt", "LATIN-1": tmp_path / "latin-1.txt"}
    stand_ins["EMPTY"].write_text(" \n\n")
    stand_ins["LATIN-1"].write_text("ñandú", encoding="latin-1")
    assert run(*(stand_ins.get(argument, argument) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("omni: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_what_looks_like_no_file_is_a_prompt(tmp_path: Path) -> None:
    for prompt in ("a cat", "cat", "half man/half horse", "a cat, black/white", "cat.", "n" * 300):
        assert inputs.texts(prompt) == [prompt]
    file = tmp_path / "prompts of mine.txt"
    file.write_text("a cat\n\n  ein Nandú \n", encoding="utf-8")
    assert inputs.texts(str(file)) == ["a cat", "ein Nandú"]


def test_a_truncated_picture_is_named(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = io.BytesIO()
    tiny.reference_image().save(whole, format="PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    out = tmp_path / "out"
    assert generate(saved["qwen_image_edit"], out, "--image", tmp_path / "half.png") == 2
    assert f"omni: error: {tmp_path / 'half.png'} cannot be read" in capsys.readouterr().err
    assert not out.exists()


def test_a_size_that_does_not_fit_is_refused(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        "generate", "--model", saved["qwen_image"], "--prompt", "x", "--size", "64x72", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "omni: error: height 72 is not a multiple of 16; nearest: 64 or 80\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made_is_refused_before_anything_runs(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert generate(saved["z_image"], tmp_path / "file" / "out") == 2
    assert re.search(r"^omni: error: .*file", capsys.readouterr().err)


def test_what_nobody_expected_is_exit_code_one_with_a_traceback(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug")

    import diffusers

    monkeypatch.setattr(diffusers.ZImageTransformer2DModel, "forward", forward)
    assert generate(saved["z_image"], tmp_path) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("omni: error: unexpected ValueError: a bug\n")


def test_no_memory_is_told_without_a_traceback(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB wanted")

    import diffusers

    monkeypatch.setattr(diffusers.ZImageTransformer2DModel, "forward", forward)
    assert generate(saved["z_image"], tmp_path) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.endswith("omni: error: the device is out of memory: 2 GiB wanted\n")


def test_ctrl_c_is_exit_code_130(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    import diffusers

    monkeypatch.setattr(diffusers.ZImageTransformer2DModel, "forward", forward)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    try:
        assert generate(saved["z_image"], tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, former)
    err = capsys.readouterr().err
    assert err.endswith("omni: error: interrupted\n")
    assert "Traceback" not in err


# Listings


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import omni_kernels

    assert run("--version") == 0
    assert capsys.readouterr().out == f"omni {omni_kernels.__version__}\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["compare"], ["calibrate"], ["backends"], ["models"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: omni")
    if command == ["generate"]:
        assert "1 for an embedded model on the CPU" in " ".join(out.split())


def test_backends_lists_keys_and_defaults_on_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("backends") == 0
    names = capsys.readouterr().out
    assert run("backends", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"tea_cache", "cache_dit", "first_block_cache", "mag_cache", "sea_cache", "easy_cache"} <= set(listed)
    for name, backend in listed.items():
        assert f"{name} {backend['summary']}" in " ".join(names.split())
        assert run("backends", name) == 0
        text = capsys.readouterr().out
        assert backend["summary"] in " ".join(text.split())
        for key in backend["keys"]:
            default = re.escape(json.dumps(key["default"])[:40])
            assert re.search(rf"^  {key['name']} = {default}", text, re.MULTILINE)
            assert f"{key['doc']} ({key['allowed']})" in " ".join(text.split())
        lines = names.splitlines() + text.splitlines()
        assert [line for line in lines if len(line) > 80] == []
        assert run("backends", name, "--json") == 0
        assert json.loads(capsys.readouterr().out) == {name: backend}
    assert {"rel_l1_thresh": 0.2, "coefficients": None}.items() <= {
        key["name"]: key["default"] for key in listed["tea_cache"]["keys"]
    }.items()


def test_models_lists_what_is_embedded_and_what_caches_know(
    embedded: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("models") == 0
    text = capsys.readouterr().out
    assert f"{embedded}: QwenImagePipeline" in text
    assert "num_inference_steps 5" in text
    assert max(map(len, text.splitlines())) <= 80
    assert run("models", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["embedded"][embedded]["defaults"]["height"] == 64
    for transformer, about in listed["transformers"].items():
        assert transformer in text
        assert all(pipeline in text for pipeline in about["pipelines"])


def test_inspect_shows_the_blocks_and_which_caches_work(
    embedded: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("inspect", "--model", embedded, "--prompt", "a cat") == 0
    shown = capsys.readouterr()
    text = " ".join(shown.out.split())
    assert "QwenImagePipeline: QwenImageTransformer2DModel, FlowMatchEulerDiscreteScheduler" in text
    assert "transformer_blocks: 4 × QwenImageTransformerBlock, hidden_states and encoder_hidden_states" in text
    assert "4 QwenImageTransformerBlock fused" in text
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "first_block_cache" in shown.err
    assert run("inspect", "--model", embedded, "--prompt", "a cat", "--json", "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    listed = json.loads(shown.out)
    assert listed["fused"] == 4
    assert listed["caches"] == dict.fromkeys(listings.SUMMARIES)


def test_inspect_says_why_a_cache_does_not_work(embedded: str, capsys: pytest.CaptureFixture[str]) -> None:
    index = embedded_models()[embedded] / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"stochastic_sampling": True}))
    assert run("inspect", "--model", embedded, "--prompt", "a cat", "--json", "--quiet") == 0
    caches = json.loads(capsys.readouterr().out)["caches"]
    assert "draws new noise at each step" in caches["easy_cache"]
    assert caches["velocity_cache"] is None
    assert caches["first_block_cache"] is None


def test_inspect_tries_the_caches_on_a_modular_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = diffusers.ZImageAutoBlocks().init_pipeline()
    pipe.update_components(**tiny.z_image().components)
    pipe.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    assert run("inspect", "--model", tmp_path / "modular", "--size", 64, "--json", "--quiet") == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["pipeline"], listed["transformer"]) == ("ZImageModularPipeline", "ZImageTransformer2DModel")
    assert listed["blocks"] == ["layers: 4 × ZImageTransformerBlock, x"]
    refused = {name: why for name, why in listed["caches"].items() if why is not None}
    assert list(refused) == ["mag_cache"]
    assert "no MagCache ratios are known" in refused["mag_cache"]
    assert generate(tmp_path / "modular", tmp_path) == 2
    assert "it is a modular pipeline: load it with diffusers" in capsys.readouterr().err
    with pytest.raises(TypeError, match="ZImageModularPipeline is a modular pipeline: load it with diffusers"):
        Omni(pipe)


def test_the_list_of_backends_says_what_they_say() -> None:
    assert {name: backend.summary for name, backend in registry.available().items()} == listings.SUMMARIES


def test_backends_of_others_are_listed_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(name="theirs", summary="skips what it likes", keys=(), check=None, install=None)
    monkeypatch.setitem(sys.modules, "their_plugin", SimpleNamespace(BACKEND=backend))  # type: ignore[misc]
    entry = metadata.EntryPoint("theirs", "their_plugin:BACKEND", registry.GROUP)
    known = metadata.entry_points(group=registry.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [*known, entry])
    assert run("backends") == 0
    assert re.search("^theirs +skips what it likes$", capsys.readouterr().out, re.MULTILINE)
    assert run("backends", "theirs") == 0
    assert capsys.readouterr().out.startswith("theirs: skips what it likes\n")


def test_a_picture_that_is_not_a_number_is_an_error_and_no_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One step of a scheduler with a terminal shift divides by zero."""
    path = tmp_path / "one.png"
    assert run("generate", "--prompt", "a cat", "--steps", "1", "--out", str(path), "--quiet") == 1
    assert "the picture contains NaN" in capsys.readouterr().err
    assert not path.exists()
    assert run("compare", "--prompt", "a cat", "--steps", "2", "--seeds", "0", "--out", str(tmp_path), "--quiet") == 0
    assert (tmp_path / "results.json").exists()


def test_a_backend_that_takes_a_built_in_name_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = metadata.EntryPoint("tea_cache", "their_plugin:BACKEND", registry.GROUP)
    known = metadata.entry_points(group=registry.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [*known, entry])
    assert run("backends") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Not used: cache backend 'tea_cache' of" in told
    assert "the built-in method has that name" in told
    assert told.startswith("auto "), "and the others are listed"


def test_listings_do_not_load_diffusers() -> None:
    code = (
        "import sys; from omni_runtime.cli import main; "
        "main(['backends', 'tea_cache']); main(['models']); print(*sys.modules, file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert not {"diffusers", "transformers"} & set(loaded)


def test_neither_help_nor_the_list_of_backends_waits_for_torch() -> None:
    code = (
        "import sys; from omni_runtime.cli import main; "
        "main(['--help']); main(['backends']); print(*sys.modules, file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert not {"torch", "omni_kernels"} & set(loaded)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_of_the_output_ends_a_command(
    encoding: str, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert run("backends", "cache_dit") == 0
    assert run("compare", "--help") == 0
    more = ("--prompt", "一 ñandú", "--size", 64, "--steps", 2, "--seed", 0)
    assert run("generate", "--model", saved["z_image"], "--out", tmp_path, *more) == 0
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    sign = "≥" if encoding == "utf-8" else ">="
    assert f"always computed and watched (a whole number {sign} 1)" in " ".join(out.split())
    written = {"ascii": r"\u4e00-\xf1and\xfa", "latin-1": r"\u4e00-ñandú", "utf-8": "一-ñandú"}[encoding]
    assert f"{tmp_path}/{written}-seed0.png" in out
    assert written.replace("-", " ") in err
    assert [path.name for path in tmp_path.iterdir()] == ["一-ñandú-seed0.png"]


def test_a_locale_without_utf8_still_takes_utf8_prompts(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    argument = "a ñandú".encode().decode("ascii", "surrogateescape")  # as Python reads it there
    more = ("--prompt", argument, "--size", 64, "--steps", 2, "--seed", 0, "--quiet")
    assert run("generate", "--model", saved["z_image"], "--out", tmp_path, *more) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "a-and-seed0.png"
    assert read_settings(path)["prompt"] == "a ñandú"


def test_the_embedded_model_is_what_generate_runs_when_no_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--steps", 4, "--seed", 0, "--cache-backend", "cache_dit", "--device", "cpu", "--out", tmp_path, "--json")
    assert run("generate", "--prompt", "red apple on blue", *more) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["settings"]["model"] == "emoji-qwen-image"
    assert set(result["cache"]["branches"]) == {"cond", "uncond"}
    assert Image.open(result["files"][0]).size == (64, 64)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], None),
        (["--quantize", "int8"], "int8"),
        (["--quantize", "fp8", "--min-width", "64"], {"dtype": "fp8", "min_width": 64}),
        (["--quantize", "int8", "--edge-steps", "2,0"], {"dtype": "int8", "edge_steps": (2, 0)}),
    ],
)
def test_how_to_quantise_is_passed_on(given: list[str], wanted: Any) -> None:
    parsed = options.parser().parse_args(["generate", "--prompt", "x", *given])
    assert inputs.speed_of(parsed)["quantize"] == wanted
