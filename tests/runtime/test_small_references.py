"""A folder's pipeline.json makes its references small, and leaves diffusers as it is."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

from omni_runtime import Omni
from omni_runtime.generation import loading, small_references

SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "true_cfg_scale": 2.0, "negative_prompt": " "}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A saved tiny edit pipeline whose references are to have 64² pixels."""
    shutil.copytree(saved["qwen_image_edit"], tmp_path / "edit")
    (tmp_path / "edit" / "pipeline.json").write_text('{"reference_pixels": 4096}')
    return tmp_path / "edit"


def test_the_reference_is_seen_in_16_tokens(folder: Path) -> None:
    before = dict(vars(pipeline_qwenimage_edit)), dict(vars(diffusers.QwenImageEditPipeline))
    omni = Omni(model=str(folder), cache_backend=None)
    lengths = []
    omni.pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, keywords: lengths.append(keywords["hidden_states"].shape[1]), with_kwargs=True
    )
    picture = omni.generate("a cat", image=tiny.reference_image(), **SETTINGS)[0].images[0]
    assert picture.size == (64, 64)
    assert set(lengths) == {16 + 16}
    assert (vars(pipeline_qwenimage_edit), dict(vars(diffusers.QwenImageEditPipeline))) == before


def test_the_picture_is_that_of_diffusers_own_call_on_small_references(folder: Path) -> None:
    ours = Omni(model=str(folder), cache_backend=None).pipe
    with tiny.processor_without_video():
        theirs = diffusers.QwenImageEditPipeline.from_pretrained(folder, dtype=torch.float32)
    expected, actual = (tiny.generate(pipe, num_inference_steps=2) for pipe in (theirs, ours))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not actual.requires_grad


def test_it_goes_by_the_names_of_diffusers(folder: Path, tmp_path: Path) -> None:
    pipe = Omni(model=str(folder), cache_backend=None).pipe
    assert isinstance(pipe, diffusers.QwenImageEditPipeline)
    assert type(pipe).__name__ == "QwenImageEditPipeline"
    assert inspect.signature(type(pipe).__call__) == inspect.signature(diffusers.QwenImageEditPipeline.__call__)
    pipe.save_pretrained(tmp_path / "again")
    written, read = (json.loads((where / "model_index.json").read_text()) for where in (tmp_path / "again", folder))
    assert written.pop("_name_or_path") == str(folder)
    assert written == read
    assert loading.find(str(tmp_path / "again")).reference_pixels == 4096
    with tiny.processor_without_video():
        diffusers.QwenImageEditPipeline.from_pretrained(tmp_path / "again")


def test_references_of_other_shapes_keep_their_ratio(folder: Path) -> None:
    pipe = Omni(model=str(folder), cache_backend=None).pipe
    wide = tiny.reference_image(128).resize((128, 32))
    picture = Omni(pipe, cache_backend=None).generate("a cat", image=wide, **SETTINGS)[0].images[0]
    assert picture.size == (128, 32)


def test_other_folders_are_loaded_as_ever(saved: dict[str, Path]) -> None:
    assert loading.find(str(saved["qwen_image_edit"])).reference_pixels is None
    with tiny.processor_without_video():
        pipe = Omni(model=str(saved["qwen_image_edit"]), cache_backend=None).pipe
    assert type(pipe) is diffusers.QwenImageEditPipeline


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reference_pixels": 64.5}, TypeError, "reference_pixels must be a whole number"),
        ({"reference_pixels": 100}, ValueError, "reference_pixels must be at least 1024"),
    ],
)
def test_an_area_that_is_none(folder: Path, settings: dict[str, Any], error: type, message: str) -> None:
    (folder / "pipeline.json").write_text(json.dumps(settings))
    with pytest.raises(error, match=message):
        loading.find(str(folder))


def test_only_the_edit_pipeline_takes_an_area(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["z_image"], tmp_path / "z")
    (tmp_path / "z" / "pipeline.json").write_text('{"reference_pixels": 4096}')
    with pytest.raises(ValueError, match="only QwenImageEditPipeline takes reference_pixels, not ZImagePipeline"):
        loading.find(str(tmp_path / "z"))


def test_the_processor_needs_no_torchvision(folder: Path) -> None:
    processor = small_references.processor_class().from_pretrained(folder / "processor")
    made = processor(text=["<|image_pad|>"], images=[tiny.reference_image()], return_tensors="pt")
    assert made["pixel_values"].ndim == 2
