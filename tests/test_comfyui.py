"""The ComfyUI node: its logic with stand-ins of ComfyUI's interface, and all of it in ComfyUI where that is there."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

import omni_kernels
from omni_runtime.cache import presets

ROOT = Path(__file__).parents[1]
NODES = ROOT / "integrations" / "comfyui"
COMFYUI = os.environ.get("OMNI_TEST_COMFYUI")


@pytest.fixture(autouse=True, scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(NODES))
        import omni_velocity_cache

        yield omni_velocity_cache
        for name in [name for name in sys.modules if name.startswith("omni_velocity_cache")]:
            del sys.modules[name]


class Executor:
    """As ComfyUI's `WrapperExecutor`: called, it runs what is wrapped."""

    def __init__(self, function, class_obj):
        self.function, self.class_obj = function, class_obj

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def flat(steps):
    return torch.linspace(1.0, 0.0, steps + 1)


def sampled(nodes, asked, sampler, sigmas, model, latents):
    """What a sampler makes of a model (x, σ → x0) under the cache, how often the model ran, and the cache."""
    cache, calls = nodes.VelocityCache(asked), []
    guider = SimpleNamespace(model_options={})

    def evaluate(x, timestep, options=None, seed=None):
        calls.append(float(timestep[0]))
        return model(x, float(timestep[0]))

    def predict(x, sigma, options=None):
        return cache.predict(Executor(evaluate, guider), x, sigma * torch.ones(len(x)), options)

    object_ = SimpleNamespace(sampler_function=sampler)
    made = cache.sample(Executor(lambda guider, sigmas: sampler(predict, latents, sigmas), object_), guider, sigmas)
    return made, calls, cache


def sample_euler(model, x, sigmas):
    for sigma, then in itertools.pairwise(sigmas):
        x = x + (x - model(x, sigma)) / sigma * (then - sigma)
    return x


def sample_dpmpp_2m(model, x, sigmas):
    old = None
    for i in range(len(sigmas) - 1):
        clean = model(x, sigmas[i])
        t, following = -sigmas[i].log(), -sigmas[i + 1].log()
        h = following - t
        used = clean
        if old is not None and sigmas[i + 1] > 0:
            r = (t + sigmas[i - 1].log()) / h
            used = (1 + 1 / (2 * r)) * clean - old / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * used if sigmas[i + 1] > 0 else used
        old = clean
    return x


def sample_heun(model, x, sigmas):
    for sigma, then in itertools.pairwise(sigmas):
        slope = (x - model(x, sigma)) / sigma
        ahead = x + slope * (then - sigma)
        if then > 0:
            slope = (slope + (ahead - model(ahead, then)) / then) / 2
        x = x + slope * (then - sigma)
    return x


def sample_euler_ancestral(model, x, sigmas):
    generator = torch.Generator().manual_seed(1)
    for sigma, then in itertools.pairwise(sigmas):
        clean = model(x, sigma)
        x = clean + then * torch.randn(x.shape, generator=generator)
    return x


def straight(x, sigma):
    """x0 where v is linear in σ: then forecasts are exact."""
    direction = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    return x - sigma * (direction + 0.5 * sigma)


# Of the first skipped step nothing is known but the output before it. Only Euler's can be corrected afterwards.
@pytest.mark.parametrize(("sampler", "tolerance"), [(sample_euler, 1e-5), (sample_dpmpp_2m, 3e-4)])
def test_half_of_the_evaluations_are_left_out_and_a_straight_change_is_followed(nodes, sampler, tolerance):
    latents = torch.ones(2, 3, 4)
    full = sampler(straight, latents, flat(50))
    made, calls, cache = sampled(nodes, presets.Asked(quality="high"), sampler, flat(50), straight, latents)
    assert len(calls) == 25
    assert cache.last == ([step for step, bit in enumerate(presets.answer(
        presets.Asked(quality="high"), 50).schedule.mask) if bit], 50)  # fmt: skip
    torch.testing.assert_close(made, full, rtol=0.0, atol=tolerance)
    assert cache._runs == {}


def test_new_noise_is_not_forecast_but_the_clean_latents_are_used_again(nodes):
    """With the model's x0 constant, nothing is lost; a forecast of v would keep the old noise."""
    target = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    made, calls, _ = sampled(
        nodes, presets.Asked(speedup=2), sample_euler_ancestral, flat(20), lambda x, sigma: target, torch.ones(1, 3, 4)
    )
    assert len(calls) == 10
    torch.testing.assert_close(made, target)


def test_a_sampler_with_two_evaluations_a_step_is_refused_and_leaves_nothing(nodes):
    cache = nodes.VelocityCache(presets.Asked())
    with pytest.raises(ValueError, match="the sampler heun evaluates the model more than once in a step"):
        sampled(nodes, presets.Asked(), sample_heun, flat(20), straight, torch.ones(1, 3, 4))
    assert cache._runs == {}


def test_a_sampler_that_needs_the_branches_of_guidance_is_refused(nodes):
    def sample_euler_cfg_pp(model, x, sigmas):
        return model(x, sigmas[0], {"sampler_post_cfg_function": [None]})

    with pytest.raises(ValueError, match="needs the branches of guidance in each step"):
        sampled(nodes, presets.Asked(), sample_euler_cfg_pp, flat(20), straight, torch.ones(1, 3, 4))


def test_few_steps_are_all_computed(nodes):
    _, calls, _ = sampled(nodes, presets.Asked(quality="fast"), sample_euler, flat(8), straight, torch.ones(1, 3, 4))
    assert len(calls) == 8


def test_the_preview_shows_the_schedule(nodes):
    marks, words = nodes.preview(presets.Asked(quality="balanced"), 30).split("\n")
    assert (len(marks), marks.count("■"), marks[0], marks[-1]) == (30, 10, "■", "■")
    assert words.startswith("10 of 30 steps computed")


def test_the_steps_and_latents_are_those_of_the_cache_in_diffusers(nodes):
    """The same transformer, sampled by diffusers with `auto` and by an Euler loop with the node's wrappers."""
    pipe = tiny.qwen_image()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 16, 64, generator=generator), torch.randn(1, 5, 32, generator=generator)
    given = {"prompt_embeds": text, "height": 64, "width": 64, "num_inference_steps": 40, "output_type": "latent"}
    given["prompt_embeds_mask"] = torch.ones(1, 5, dtype=torch.long)
    with omni_kernels.patched(pipe, "auto", {"quality": "high"}) as handle:
        expected = pipe(**given, latents=noise.clone()).images
        skipped = handle.report.skipped

    def model(x, sigma):
        return x - sigma * pipe.transformer(
            hidden_states=x, encoder_hidden_states=text, timestep=torch.tensor([sigma]), img_shapes=[[(1, 4, 4)]],
            encoder_hidden_states_mask=given["prompt_embeds_mask"], return_dict=False,
        )[0]  # fmt: skip

    with torch.no_grad():
        made, _, cache = sampled(
            nodes, presets.Asked(quality="high"), sample_euler, pipe.scheduler.sigmas, model, noise
        )
    assert skipped
    assert cache.last == ([step for step in range(40) if step not in skipped], 40)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


IN_COMFYUI = """
    import json, sys
    from unittest import mock

    from transformers.utils import import_utils

    # Some of ComfyUI's models import torchvision. Sampling does not use it.
    import_utils.is_torchvision_available(), import_utils.is_torchaudio_available()
    for name in ("torchvision", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.functional",
                 "torchaudio"):
        try:
            __import__(name)
        except Exception:
            sys.modules[name] = mock.MagicMock(__spec__=None, __path__=[])

    from comfy.cli_args import args

    args.cpu = True
    import comfy.model_patcher, comfy.sample, comfy.samplers, comfy.supported_models
    import torch
    from omni_velocity_cache import NODE_CLASS_MAPPINGS

    torch.set_num_threads(1)
    sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    made = comfy.supported_models.QwenImage({"image_model": "qwen_image", "axes_dims_rope": (4, 6, 6), **sizes})
    made.set_inference_dtype(torch.float32, None)
    model = made.get_model({}, device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    noise = torch.randn(1, 16, 1, 8, 8)
    positive, negative = [[torch.randn(1, 5, 32), {}]], [[torch.randn(1, 7, 32), {}]]
    calls = []
    model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))

    def run(patched, sampler, steps=30, start=torch.zeros_like(noise), **more):
        calls.clear()
        torch.manual_seed(0)
        latents = comfy.sample.sample(patched, noise, steps, 4.0, sampler, "simple", positive, negative, start,
                                      disable_pbar=True, seed=0, **more)
        return latents, len(calls)

    node = NODE_CLASS_MAPPINGS["OmniVelocityCache"]()
    cached, text = node.apply(patcher, preset="high", speedup=2.0, steps=30)
    twice, _ = node.apply(cached, preset="fast", speedup=2.0, steps=30)
    found = {"text": text, "samplers": {}, "errors": {}}
    for sampler in sys.argv[1].split(","):
        full, of_full = run(patcher, sampler)
        fewer, _ = run(patcher, sampler, 15)
        try:
            near, of_near = run(cached, sampler)
        except ValueError as error:
            found["errors"][sampler] = str(error)
            continue
        size = full.norm().item()
        found["samplers"][sampler] = {
            "full": of_full, "cached": of_near, "error": (near - full).norm().item() / size,
            "of fewer steps": (fewer - full).norm().item() / size,
        }
        found["undone"] = torch.equal(run(patcher, sampler)[0], full)
        found["again"] = torch.equal(run(cached, sampler)[0], near)
    picture, mask = torch.randn_like(noise), torch.zeros(1, 1, 1, 8, 8)
    mask[..., 4:] = 1
    painted, of_painted = run(cached, "euler", start=picture, denoise=0.6, noise_mask=mask)
    found["inpainting"] = of_painted, (painted - picture)[..., :4].abs().max().item()
    found["a part"] = run(cached, "euler", start=picture, start_step=10, last_step=28)[1]
    found["the last node counts"] = run(twice, "euler")[1]
    print(json.dumps(found))
"""
#: Those of ComfyUI that evaluate the model once a step; the noise of the second ones is new at each step.
ONCE = ["euler", "dpmpp_2m", "lms", "ipndm", "deis", "uni_pc", "res_multistep", "gradient_estimation"]
WITH_NOISE = ["euler_ancestral", "dpmpp_2m_sde", "ddpm", "lcm", "er_sde"]
REFUSED = ["heun", "dpm_2", "dpmpp_sde", "dpm_adaptive", "dpm_fast", "euler_cfg_pp", "dpmpp_2s_ancestral", "seeds_2"]


@pytest.mark.skipif(not COMFYUI, reason="OMNI_TEST_COMFYUI names no ComfyUI: see integrations/comfyui/README.md")
def test_in_comfyui():
    paths = [COMFYUI or "", str(ROOT), str(NODES)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IN_COMFYUI), ",".join([*ONCE, *WITH_NOISE, *REFUSED])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=COMFYUI, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert found["text"].endswith("embedded models, which are small; `omni calibrate schedule` measures this one)")
    assert set(found["errors"]) == set(REFUSED)
    assert "needs the branches of guidance" in found["errors"].pop("euler_cfg_pp")
    assert all("more than once in a step" in message for message in found["errors"].values())
    for name, one in found["samplers"].items():
        assert one["cached"] == 15 / 30 * one["full"], name
    for name in ("euler", "dpmpp_2m"):
        assert found["samplers"][name]["error"] < found["samplers"][name]["of fewer steps"], name
    assert found["undone"]
    assert found["again"]
    calls, moved = found["inpainting"]
    assert calls == 30
    assert moved < 1e-5, "what is masked stays"
    assert found["a part"] == 18  # two calls for each of 9 of 18 steps
    assert found["the last node counts"] == 16  # two calls for each of 8 of 30 steps
