"""A model's directory that is damaged: the error names the file, and comes before anything is computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_runtime import Omni
from omni_runtime.generation import loading, weights

DEEP = "[" * 10**6
LARGE = " " * (9 << 20)


@pytest.fixture
def model(saved: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(saved["qwen_image"], tmp_path / "model")
    return tmp_path / "model"


def changed(path: Path, change: str | dict[str, Any]) -> None:
    """Write text, or a JSON object with changed entries."""
    if isinstance(change, dict):
        before = json.loads(path.read_text()) if path.exists() else {}
        change = json.dumps({key: value for key, value in (before | change).items() if value is not ...})
    path.write_text(change)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", "", "is not valid JSON"),
        ("model_index.json", DEEP, "is nested more than 64 deep"),
        ("model_index.json", LARGE, "has more than 8 MiB"),
        ("model_index.json", {"transformer": 5}, r"transformer must be \[library, class\], not 5"),
        ("model_index.json", {"transformer": {"a": 1}}, r"transformer must be \[library, class\], not {'a': 1}"),
        ("model_index.json", {"vae": "AutoencoderKLQwenImage"}, r"vae must be \[library, class\]"),
        ("model_index.json", {"_class_name": 5}, "_class_name must be the name of a pipeline class, not 5"),
        ("model_index.json", {"_class_name": []}, "_class_name must be the name of a pipeline class"),
        ("transformer/config.json", "[]", "must be a JSON object whose _class_name"),
        ("transformer/config.json", {"_class_name": ...}, "must be a JSON object whose _class_name"),
        ("transformer/config.json", {"_class_name": ["a"]}, "must be a JSON object whose _class_name"),
        ("transformer/config.json", DEEP, "is nested more than 64 deep"),
        ("pipeline.json", "null", "must hold a JSON object, not NoneType"),
        ("pipeline.json", {"reference_pixels": 4096}, "only QwenImageEditPipeline"),
        ("tea_cache.json", DEEP, "is nested more than 64 deep.*`omni calibrate` writes a new one"),
        ("tea_cache.json", "{", r"is not valid JSON.*`omni calibrate` writes a new one, or take the file away"),
    ],
    ids=lambda value: str(value)[:24].strip(),
)
def test_a_damaged_file_is_named(model: Path, file: str, change: Any, message: str) -> None:
    changed(model / file, change)
    with pytest.raises(ValueError, match=rf"{model / file}\W.*{message}"):
        Omni(str(model), cache_backend="tea_cache")


@pytest.mark.usefixtures("no_weights")
def test_a_transformer_without_its_config_is_named(model: Path) -> None:
    (model / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no {model}/transformer/config.json"):
        Omni(str(model), cache_backend=None)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["a" * 5000, "~nosuchuser/x", "a\0b"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no model"):
        loading.find(name)


# Weights


def edited(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    ("part", "weight"),
    [("transformer", "transformer_blocks.1.attn.to_k.weight"), ("vae", "decoder.conv_in.bias")],
)
def test_missing_weights_are_named(model: Path, part: str, weight: str, low_cpu_mem_usage: bool) -> None:
    edited(model / part / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop(weight))
    with pytest.raises(
        ValueError, match=rf"the {part}'s files in {model / part} lack 1 of its weights, such as {weight}"
    ):
        Omni(str(model), cache_backend=None, low_cpu_mem_usage=low_cpu_mem_usage).load()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    ("part", "file"),
    [("transformer", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")],
)
def test_weights_that_are_not_finite_are_named(model: Path, part: str, file: str, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[3]].view(-1)[-1] = value

    edited(model / part / file, change)
    with pytest.raises(ValueError, match=rf"the {part} \(from {model / part}\) has weights that are not finite"):
        Omni(str(model), cache_backend=None).load()


def test_the_variants_files_are_the_ones_that_count(model: Path) -> None:
    """Both variants are there; what one lacks is no fault of the other."""
    folder = model / "transformer"
    for path in model.rglob("diffusion_pytorch_model.safetensors"):
        shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    edited(folder / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop("img_in.weight"))
    Omni(str(model), cache_backend=None, variant="fp16").load()
    with pytest.raises(ValueError, match=r"img_in\.weight"):
        Omni(str(model), cache_backend=None).load()


def test_shards_are_read_together(model: Path) -> None:
    import diffusers

    folder = model / "transformer"
    transformer = diffusers.QwenImageTransformer2DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    Omni(str(model), cache_backend=None).load()
    name = next(iter(load_file(shards[-1])))
    edited(shards[-1], lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"lack 1 of its weights, such as {name}"):
        weights.check_present({"transformer": diffusers.QwenImageTransformer2DModel.from_pretrained(folder)})


def test_a_component_of_the_caller_is_the_callers(model: Path) -> None:
    """Weights that are not there are wanted in some places: an Omni judges what it loads itself."""
    import tiny

    transformer = tiny.qwen_image().transformer
    with torch.no_grad():
        transformer.img_in.weight.fill_(torch.nan)
    Omni(str(model), cache_backend=None, transformer=transformer).load()


def test_old_names_of_weights_are_renamed_as_diffusers_does(tmp_path: Path) -> None:
    import diffusers

    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    vae.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "attentions" in name]:
            for now, then in old.items():
                if f".{now}." in name:
                    tensors[name.replace(now, then)] = tensors.pop(name)

    edited(tmp_path / "diffusion_pytorch_model.safetensors", rename)
    weights.check_present({"vae": diffusers.AutoencoderKL.from_pretrained(tmp_path)})


def test_what_cannot_be_looked_at_is_passed_over() -> None:
    module = torch.nn.Linear(2, 2, device="meta")
    module.register_parameter("empty", torch.nn.Parameter(torch.zeros(0)))
    module.register_parameter("whole", torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    weights.check_finite({"transformer": module, "scheduler": object()})
    weights.check_present({"transformer": module, "scheduler": object()})
    module.register_parameter("largest", torch.nn.Parameter(torch.full((2,), 65504.0, dtype=torch.float16)))
    weights.check_finite({"transformer": module})
