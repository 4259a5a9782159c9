"""For the runtime's tests: a guard against loading weights, and a tiny pipeline as the embedded model."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from omni_runtime.generation import loading

SMALL = {"height": 64, "width": 64, "num_inference_steps": 4}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def from_pretrained(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the environment variable that names a backend."""
    monkeypatch.delenv("DIFFUSION_CACHE_BACKEND", raising=False)


@pytest.fixture
def embedded(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the only embedded model: a tiny Qwen-Image whose defaults are 64×64, 5 steps, guided."""
    home = tmp_path / "embedded"
    shutil.copytree(saved["qwen_image"], home / "tiny-model")
    defaults = {"height": 64, "width": 64, "num_inference_steps": 5, "true_cfg_scale": 4.0, "negative_prompt": " "}
    (home / "tiny-model" / "defaults.json").write_text(json.dumps(defaults))
    (home / "tiny-model" / "prompts.json").write_text(json.dumps({"contact_sheet": ["a cat", "a dog", "a bird"]}))
    monkeypatch.setattr(loading, "EMBEDDED", home)
    return "tiny-model"
