"""What a model's name may be, and what is said where it is wrong, before any weight is read."""

import json
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from omni_runtime.generation import loading

pytestmark = pytest.mark.usefixtures("no_weights")


def test_a_directory_is_read_from_its_index(saved: dict[str, Path]) -> None:
    source = loading.find(str(saved["qwen_image"]))
    assert source.kind == "directory"
    assert source.pipeline_class is diffusers.QwenImagePipeline
    assert source.transformer_config["num_layers"] == 4


def test_an_embedded_model_is_known_by_name_and_brings_its_defaults(embedded: str) -> None:
    source = loading.find(embedded)
    assert source.kind == "embedded"
    assert source.defaults["num_inference_steps"] == 5
    assert list(loading.embedded_models()) == [embedded]


def test_unknown_name_says_what_there_is(embedded: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model 'tiny-modle'.*\(tiny-model\).*did you mean 'tiny-model'"):
        loading.find("tiny-modle")


@pytest.mark.parametrize("name", ["./no/such/directory", "/no/such", "no_such"])
def test_unknown_directory(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no model '{name}': no such directory"):
        loading.find(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ValueError, match="is a file; a model is a directory"):
        loading.find(str(path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no model_index.json"),
        ({"config.json": "{}"}, "it holds a single model"),
        ({"model_index.json": "{}"}, "names no pipeline class"),
        ({"model_index.json": "{"}, "is not valid JSON"),
        ({"model_index.json": '{"_class_name": "NoSuchPipeline"}'}, "'NoSuchPipeline'"),
        ({"model_index.json": '{"_class_name": "AutoencoderKL"}'}, "is not a pipeline that diffusers"),
    ],
)
def test_a_directory_that_is_no_pipeline(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        loading.find(str(tmp_path))


def test_misspelt_argument_of_from_pretrained(saved: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match="'varient'; did you mean 'variant'"):
        loading.find(str(saved["qwen_image"]), {"varient": "fp16"})
    with pytest.raises(TypeError, match="'cache_confg'; did you mean 'cache_config'"):
        loading.find(str(saved["qwen_image"]), {"cache_confg": {}})


def test_a_component_given_by_the_caller_is_the_one_described(saved: dict[str, Path]) -> None:
    import tiny

    transformer = tiny.qwen_image(layers=2).transformer
    source = loading.find(str(saved["qwen_image"]), {"transformer": transformer})
    assert source.transformer_config["num_layers"] == 2


# The hub, played by a function


def hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path) -> list[tuple]:
    calls = []

    def hf_hub_download(model: str, name: str, **arguments: object) -> str:
        calls.append((model, name, arguments))
        if isinstance(answer, Exception):
            raise answer
        if not (answer / name).is_file():
            raise errors.EntryNotFoundError(name)
        return str(answer / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return calls


def test_a_hub_model_is_known_from_two_small_files(monkeypatch: pytest.MonkeyPatch, saved: dict[str, Path]) -> None:
    calls = hub(monkeypatch, saved["z_image"])
    source = loading.find("someone/z-image", {"revision": "v1", "variant": "bf16"})
    assert (source.kind, source.location) == ("hub", "someone/z-image")
    assert source.pipeline_class is diffusers.ZImagePipeline
    assert source.transformer_config["n_layers"] == 4
    assert [name for _, name, _ in calls] == ["model_index.json", "transformer/config.json"]
    assert all(arguments == {"revision": "v1"} for _, _, arguments in calls)


def test_hub_model_that_is_no_pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"someone/text-model is not a diffusers pipeline: it has no model_index.json"):
        loading.find("someone/text-model")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("outgoing traffic is disabled"), "could not be reached: outgoing traffic"),
        (ConnectionError("no route"), "could not be reached: no route"),
    ],
)
def test_offline(monkeypatch: pytest.MonkeyPatch, embedded: str, error: Exception, message: str) -> None:
    hub(monkeypatch, error)
    expected = rf"'a/b' is not a directory, not an embedded model \(tiny-model\), and the hub {message}"
    with pytest.raises(FileNotFoundError, match=expected):
        loading.find("a/b")


def test_offline_for_real(embedded: str) -> None:
    """HF_HUB_OFFLINE is set for all tests: this is what the hub's own client says then."""
    with pytest.raises(FileNotFoundError, match="the hub could not be reached"):
        loading.find("no-such-owner/no-such-model")


# Device and dtype


def test_auto_is_float32_on_the_cpu_and_bfloat16_elsewhere() -> None:
    assert loading.resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert loading.resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert loading.resolve_dtype("torch.float16", torch.device("cpu")) is torch.float16
    assert loading.resolve_dtype(torch.float64, torch.device("cpu")) is torch.float64


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [("bfloat61", ValueError, "did you mean 'bfloat16'"), (16, TypeError, "not int")],
)
def test_wrong_dtype(dtype: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loading.resolve_dtype(dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("gpu", ValueError, "unknown device 'gpu'"),
        ("npu:0", ValueError, "unknown device 'npu:0': torch-npu is not installed"),
        ("cuda:99", ValueError, "'cuda:99' is not available here; available: cpu"),
        (0, TypeError, "not int"),
    ],
)
def test_wrong_device(device: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loading.resolve_device(device)


def test_broken_defaults_are_named(embedded: str) -> None:
    path = loading.EMBEDDED / embedded / "defaults.json"
    path.write_text(json.dumps({"height": 32})[:-1])
    with pytest.raises(ValueError, match=r"defaults.json is not valid JSON"):
        loading.find(embedded)
