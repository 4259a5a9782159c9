"""Which prompts, images, seeds and sizes a pipeline class is asked for, and which are refused; no weights anywhere."""

import inspect
import io
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from omni_runtime.generation import request

TEXT, EDIT, PLUS = diffusers.QwenImagePipeline, diffusers.QwenImageEditPipeline, diffusers.QwenImageEditPlusPipeline
PICTURE = tiny.reference_image()


def test_one_prompt_is_one_request() -> None:
    (one,) = request.build(TEXT, "a cat", seed=3, height=64, num_inference_steps=4)
    assert (one.prompt, one.seed, one.arguments) == ("a cat", 3, {"height": 64, "num_inference_steps": 4})


def test_a_list_of_prompts_is_a_request_each_with_the_same_seed() -> None:
    requests = request.build(TEXT, ["a cat", "a dog"], seed=3, negative_prompt="blurry")
    assert [(one.prompt, one.seed, one.arguments["negative_prompt"]) for one in requests] == [
        ("a cat", 3, "blurry"),
        ("a dog", 3, "blurry"),
    ]


def test_lists_of_seeds_negative_prompts_and_images_go_with_the_prompts() -> None:
    other = tiny.reference_image(seed=1)
    requests = request.build(EDIT, ["a cat", "a dog"], seed=[1, 2], negative_prompt=["x", "y"], image=[PICTURE, other])
    assert [one.seed for one in requests] == [1, 2]
    assert [one.arguments["negative_prompt"] for one in requests] == ["x", "y"]
    assert [one.arguments["image"] for one in requests] == [PICTURE, other]


def test_a_list_of_images_with_one_prompt_is_its_references() -> None:
    (one,) = request.build(PLUS, "a cat", image=[PICTURE, PICTURE])
    assert one.arguments["image"] == [PICTURE, PICTURE]


def test_without_a_seed_each_prompt_gets_one_of_its_own() -> None:
    first, second = request.build(TEXT, ["a cat", "a cat"])
    assert isinstance(first.seed, int)
    assert first.seed != second.seed


def test_the_seed_makes_noise_on_the_cpu_whatever_the_device() -> None:
    (one,) = request.build(TEXT, "a cat", seed=3)
    generator = one.call()["generator"]
    assert (generator.device.type, generator.initial_seed()) == ("cpu", 3)


def test_a_generator_of_the_callers_is_passed_on() -> None:
    generator = torch.Generator()
    (one,) = request.build(TEXT, "a cat", generator=generator)
    assert one.seed is None
    assert one.call()["generator"] is generator


def test_defaults_hold_where_nothing_is_given() -> None:
    defaults = {"height": 64, "num_inference_steps": 50, "negative_prompt": " ", "no_such_argument": 1}
    (one,) = request.build(TEXT, "a cat", defaults=defaults, height=None, num_inference_steps=9)
    assert one.arguments == {"height": 64, "num_inference_steps": 9, "negative_prompt": " "}
    (one,) = request.build(TEXT, "a cat", defaults=defaults, negative_prompt="blurry")
    assert one.arguments["negative_prompt"] == "blurry"


def test_prompt_embeddings_instead_of_a_prompt() -> None:
    embeddings = torch.zeros(1, 4, 32)
    (one,) = request.build(TEXT, None, prompt_embeds=embeddings)
    assert one.prompt is None
    assert "prompt" not in one.call()


def test_an_image_may_be_a_path(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "reference.png")
    (one,) = request.build(EDIT, "a cat", image=tmp_path / "reference.png")
    assert one.arguments["image"].size == PICTURE.size
    (one,) = request.build(EDIT, "a cat", image=str(tmp_path / "reference.png"))
    assert np.array_equal(np.asarray(one.arguments["image"]), np.asarray(PICTURE))


def test_an_image_that_cannot_be_read_to_its_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        whole = io.BytesIO()
        PICTURE.save(whole, format=kind)
        path = tmp_path / f"half.{kind.lower()}"
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            request.build(EDIT, "a cat", image=path)
    PICTURE.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match=r"large\.png cannot be read to its end: Image size .* exceeds limit"):
        request.build(EDIT, "a cat", image=tmp_path / "large.png")


def test_images_of_pipelines_that_can_do_without_are_optional() -> None:
    assert "image" in inspect.signature(diffusers.FluxKontextPipeline.__call__).parameters
    assert "image" not in request.build(diffusers.FluxKontextPipeline, "a cat")[0].arguments


@pytest.mark.parametrize(
    ("pipeline", "arguments", "error", "message"),
    [
        (TEXT, {"prompt": None}, ValueError, "QwenImagePipeline needs a prompt"),
        (TEXT, {"prompt": []}, ValueError, "prompt is an empty list"),
        (TEXT, {"prompt": 3}, TypeError, "prompt must be text or a list of texts, not int"),
        (TEXT, {"prompt": ["a cat", None]}, TypeError, "the list holds None"),
        (TEXT, {"prompt": "a cat", "prompt_embeds": torch.zeros(1)}, ValueError, "cannot both be given"),
        (TEXT, {"prompt": ["a", "b"], "negative_prompt": ["x"]}, ValueError, "1 negative prompt for 2 prompts"),
        (TEXT, {"image": PICTURE}, ValueError, "QwenImagePipeline makes images from text alone: it takes no image"),
        (EDIT, {}, ValueError, "QwenImageEditPipeline needs an image"),
        (PLUS, {}, ValueError, "QwenImageEditPlusPipeline needs an image"),
        (PLUS, {"image": []}, ValueError, "image is an empty list"),
        (EDIT, {"image": [PICTURE, PICTURE]}, ValueError, "takes one image per prompt, not 2"),
        (EDIT, {"prompt": ["a", "b"], "image": [PICTURE] * 3}, ValueError, "3 images for 2 prompts"),
        (EDIT, {"image": 7}, TypeError, "image must be a picture"),
        (EDIT, {"image": "no/such.png"}, FileNotFoundError, "no image file 'no/such.png'"),
        (EDIT, {"image": __file__}, ValueError, "is not an image that Pillow can read"),
        (TEXT, {"num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1, not 0"),
        (TEXT, {"num_inference_steps": -1}, ValueError, "num_inference_steps must be at least 1, not -1"),
        (TEXT, {"num_inference_steps": 4.5}, TypeError, "num_inference_steps must be a whole number, not 4.5"),
        (TEXT, {"num_inference_steps": True}, TypeError, "num_inference_steps must be a whole number"),
        (TEXT, {"height": "64"}, TypeError, "height must be a whole number, not '64'"),
        (TEXT, {"width": -64}, ValueError, "width must be at least 1, not -64"),
        (TEXT, {"seed": -1}, ValueError, "seed must be at least 0"),
        (TEXT, {"seed": 2**64}, ValueError, "seed must be below"),
        (TEXT, {"seed": 1.5}, TypeError, "seed must be a whole number"),
        (TEXT, {"seed": [1, 2]}, ValueError, "2 seeds for 1 prompt"),
        (TEXT, {"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator cannot both"),
        (
            TEXT,
            {"num_inference_step": 4},
            TypeError,
            "takes no 'num_inference_step'; did you mean 'num_inference_steps'",
        ),
        (TEXT, {"true_cfg_scale": "4"}, TypeError, "true_cfg_scale must be a number, not '4'"),
        (TEXT, {"true_cfg_scale": float("nan")}, ValueError, "true_cfg_scale must be finite"),
        (TEXT, {"output_type": 3}, TypeError, "output_type must be text, not 3"),
        (diffusers.ZImagePipeline, {"cfg_normalization": 1}, TypeError, "cfg_normalization must be True or False"),
        (TEXT, {"return_dict": False}, TypeError, "it takes no return_dict"),
    ],
)
def test_what_a_pipeline_cannot_take(
    pipeline: type, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        request.build(pipeline, **{"prompt": "a cat"} | arguments)


@pytest.mark.parametrize(("height", "nearest"), [(72, "64 or 80"), (8, "16")])
def test_sizes_that_the_pipeline_would_round(height: int, nearest: str) -> None:
    pipe = tiny.qwen_image()
    with pytest.raises(ValueError, match=f"height {height} is not a multiple of 16; nearest: {nearest}"):
        request.check_size(pipe, request.build(TEXT, "a cat", height=height))
    request.check_size(pipe, request.build(TEXT, "a cat", height=64, width=80))


def test_step_count_is_known_only_where_the_pipeline_does_just_that_many() -> None:
    assert request.step_count(TEXT, {"num_inference_steps": 9}) == 9
    assert request.step_count(TEXT, {}) == 50
    assert request.step_count(TEXT, {"sigmas": [1.0, 0.5]}) is None
    assert request.step_count(diffusers.QwenImageImg2ImgPipeline, {"num_inference_steps": 9}) is None


def test_a_pipeline_that_writes_into_its_lists_changes_no_request() -> None:
    """Z-Image's writes the chat's template into the list of prompts."""
    one = request.GenerationRequest("a cat", 0, {"image": ["reference"], "height": 64})
    one.call()["image"][0] = "rewritten"
    assert one.arguments == {"image": ["reference"], "height": 64}
    assert one.call()["image"] == ["reference"]
