"""Unfinished pictures: which steps are shown, what they predict, and how latents become pictures."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch

from omni_runtime import Omni
from omni_runtime.serving.http import partials


@pytest.mark.parametrize(
    ("steps", "count", "shown"),
    [
        (50, 3, {11, 24, 37}),
        (12, 3, {2, 5, 8}),
        (8, 1, {3}),
        (4, 3, {1, 2}),
        (2, 3, set()),
        (1, 3, set()),
        (9, 0, set()),
    ],
)
def test_the_steps_that_are_shown(steps: int, count: int, shown: set[int]) -> None:
    assert partials.chosen(steps, count) == shown


def test_the_clean_latents_of_a_straight_flow_are_predicted_exactly() -> None:
    clean, noise = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0])
    config = SimpleNamespace()
    scheduler = type("FlowMatchEulerDiscreteScheduler", (), {"sigmas": sigmas, "config": config, "step_index": 2})()
    at = [(1 - sigma) * clean + sigma * noise for sigma in sigmas]
    assert torch.allclose(partials.predicted(scheduler, at[2], at[1]), clean, atol=1e-5)
    scheduler.config = SimpleNamespace(stochastic_sampling=True)
    assert partials.predicted(scheduler, at[2], at[1]) is at[2], "new noise says nothing of the flow"
    other = type("DDIMScheduler", (), {"config": SimpleNamespace(prediction_type="epsilon")})()
    assert partials.predicted(other, at[2], at[1]) is at[2]


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux"])
def test_the_last_latents_give_the_picture_that_the_pipeline_makes(name: str) -> None:
    pipe = tiny.PIPELINES[name](layers=2)
    seen = partials.Partials(0, lambda *shown: None)
    with Omni(pipe, cache_backend=None) as omni:
        pipe.set_progress_bar_config(disable=True)
        result = omni.generate(
            "a cat", height=64, width=96, num_inference_steps=2, seed=0, callback_on_step_end=seen
        )[0]  # fmt: skip
        (picture,) = result.images
        assert seen.last is not None
        made = partials.decode(pipe, seen.last, (64, 96), 1.5)
        assert made.tobytes() == picture.tobytes()
        if seen.last.dim() == 3:
            assert partials.decode(pipe, seen.last, None, 1.4).tobytes() == picture.tobytes()
        assert partials.differs(pipe, seen, picture) is None
        pipe.vae.register_to_config(scaling_factor=3.0)
        pipe.vae.register_to_config(latents_mean=None)
        assert "decode to another" in str(partials.differs(pipe, seen, picture))


def flux2() -> diffusers.Flux2KleinPipeline:
    """A FLUX.2 pipeline that takes embeddings of 96 channels."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(16,) * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16, mlp_ratio=2.0,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15)
    text = tiny.qwen_image(layers=2)  # unused: embeddings are given
    return diffusers.Flux2KleinPipeline(
        scheduler, vae, text.text_encoder, text.tokenizer, transformer, is_distilled=True
    )


def test_the_last_latents_of_flux_2_give_its_picture() -> None:
    pipe = flux2()
    pipe.set_progress_bar_config(disable=True)
    seen = partials.Partials(0, lambda *shown: None)
    embeddings = torch.randn(1, 7, 96)
    with Omni(pipe, cache_backend=None) as omni:
        result = omni.generate(
            None, prompt_embeds=embeddings, height=64, width=96, num_inference_steps=2, seed=0,
            callback_on_step_end=seen,
        )[0]  # fmt: skip
    (picture,) = result.images
    assert seen.last is not None
    assert partials.decode(pipe, seen.last, (64, 96)).tobytes() == picture.tobytes()
    assert partials.decode(pipe, seen.last, None, 1.4).tobytes() == picture.tobytes()
    pipe.vae.bn.running_mean.add_(1.0)
    assert "decode to another" in str(partials.differs(pipe, seen, picture))


def test_latents_that_cannot_be_decoded_are_found_out() -> None:
    pipe = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), dtype=torch.float32))
    seen = partials.Partials(0, lambda *shown: None)
    assert "does not hand out" in str(partials.differs(pipe, seen, None))
    seen.last = torch.zeros(1, 4, 8)
    assert "cannot be decoded here (AttributeError)" in str(partials.differs(pipe, seen, None))
