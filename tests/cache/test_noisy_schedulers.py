"""The velocity cache under schedulers that draw new noise at each step: the clean latents carry over."""

import diffusers
import pytest
import tiny
import torch
from diffusers.configuration_utils import FrozenDict

import omni_kernels
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.schedulers import CLEAN, NOISY, check_scheduler, clean_latents, draws_noise

STEPS = 8
SCHEDULE = (0, 1, 3, 6, 7)
STOCHASTIC = {"stochastic_sampling": True}
SDE = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CASES = [
    *(("CogVideoXDPMScheduler", {"prediction_type": one}) for one in PREDICTIONS),
    *(("DDPMScheduler", {"prediction_type": one, "clip_sample": False}) for one in PREDICTIONS),
    *(("DPMSolverMultistepScheduler", SDE | {"prediction_type": one}) for one in PREDICTIONS),
    ("DPMSolverMultistepScheduler", SDE | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    *(("EulerAncestralDiscreteScheduler", {"prediction_type": one}) for one in PREDICTIONS[:2]),
    ("FlowMatchEulerDiscreteScheduler", STOCHASTIC),
    ("FlowMatchLCMScheduler", {}),
    *(("LCMScheduler", {"prediction_type": one}) for one in PREDICTIONS),
    ("LTXEulerAncestralRFScheduler", {}),
    ("SCMScheduler", {}),
]


def named(value):
    return value if isinstance(value, str) else value.get("prediction_type", "")


def timesteps(scheduler, steps):
    if isinstance(scheduler, diffusers.SCMScheduler):
        scheduler.set_timesteps(steps, intermediate_timesteps=None)
        return scheduler.timesteps[:-1]  # the last one is the end
    if isinstance(scheduler, diffusers.LTXEulerAncestralRFScheduler):
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1))
        return scheduler.timesteps[:-1]
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def levels(scheduler):
    sigmas = getattr(scheduler, "sigmas", None)
    return [float(one) for one in (scheduler.timesteps if sigmas is None else sigmas)]


def stepped(scheduler, output, t, x):
    """One step: the new latents, and the clean latents that the scheduler says it predicts, if it does."""
    if not isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
        made = scheduler.step(output, t, x)
        return made.prev_sample, getattr(made, "pred_original_sample", None)
    return scheduler.step(output, None, t, None, x, return_dict=False)


def test_every_noisy_scheduler_is_tried():
    assert {name for name, _ in CASES} == {*CLEAN}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("name", "config"), CASES, ids=named)
def test_the_clean_latents_are_those_that_the_scheduler_predicts(name, config, steps):
    """A model that predicts the same clean latents at each step ends there, whatever the noise."""
    scheduler = getattr(diffusers, name)(**config)
    if "timestep_spacing" in scheduler.config:
        scheduler.register_to_config(timestep_spacing="trailing")
    assert draws_noise(scheduler)
    clean, x = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    with torch.random.fork_rng(devices=[]):
        for place, t in enumerate(timesteps(scheduler, steps)):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            a, b = clean_latents(scheduler, levels(scheduler)[place])
            x, told = stepped(scheduler, (clean - a * x) / b, t, x)
            if told is not None:
                torch.testing.assert_close(told, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, clean, rtol=2e-3, atol=2e-3)


def test_noise_alone_says_nothing_of_the_clean_latents():
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    assert clean_latents(scheduler, levels(scheduler)[0]) is None
    assert clean_latents(scheduler, levels(scheduler)[1]) is not None


def latents(pipe, **arguments):
    torch.manual_seed(0)  # pipelines give the scheduler no generator
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": STEPS} | arguments)


@pytest.fixture(params=[diffusers.FlowMatchEulerDiscreteScheduler, diffusers.LTXEulerAncestralRFScheduler])
def noisy_pipe(request, z_pipe):
    own = STOCHASTIC if request.param is diffusers.FlowMatchEulerDiscreteScheduler else {}
    z_pipe.scheduler = request.param.from_config(z_pipe.scheduler.config, **own)
    return z_pipe


def trace(pipe):
    """A list to which each step adds its noise level, its latents and what it is given as the model output."""
    seen, step = [], pipe.scheduler.step

    def spy(model_output, t, sample, *args, **kwargs):
        seen.append((float(pipe.scheduler.sigmas[len(seen)]), sample.clone(), model_output.clone()))
        return step(model_output, t, sample, *args, **kwargs)

    pipe.scheduler.step = spy
    return seen


def test_skipped_steps_reuse_the_clean_latents(noisy_pipe):
    plain = latents(noisy_pipe)
    with omni_kernels.patched(noisy_pipe, "velocity_cache", {"budget": STEPS}):
        assert torch.equal(latents(noisy_pipe), plain)
    seen = trace(noisy_pipe)
    with omni_kernels.patched(noisy_pipe, "velocity_cache", {"schedule": SCHEDULE}) as handle:
        assert not torch.equal(latents(noisy_pipe), plain)
        assert handle.report.complete
        (branch,) = handle.report.branches.values()
        assert branch.computed == [*SCHEDULE]
        assert any("reuse the clean latents" in note for note in handle.report.notes)
    clean = [sample - level * output for level, sample, output in seen[:STEPS]]
    newest = None
    for step, one in enumerate(clean):
        newest = one if step in SCHEDULE else newest
        torch.testing.assert_close(one, newest, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(clean[0], clean[1], atol=1e-2)
    del noisy_pipe.scheduler.step
    assert torch.equal(latents(noisy_pipe), plain)


def test_half_precision(noisy_pipe):
    noisy_pipe.to(torch.bfloat16)
    plain = latents(noisy_pipe)
    with omni_kernels.patched(noisy_pipe, "velocity_cache", {"schedule": SCHEDULE}):
        made = latents(noisy_pipe)
    assert made.dtype == plain.dtype
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("name", sorted(NOISY - {*CLEAN}))
def test_others_are_refused(name):
    scheduler = type(name, (), {"config": FrozenDict({})})()  # some need a package that is not installed
    with pytest.raises(
        ValueError,
        match=rf"{name} .*draws new noise at each step.*A cache of blocks .* not depend on the scheduler$",
    ):
        check_scheduler(scheduler)


def test_easy_cache_names_the_velocity_cache(noisy_pipe):
    with pytest.raises(
        ValueError,
        match=r"draws new noise at each step.*cache of blocks .* velocity_cache caches the clean",
    ):
        omni_kernels.patch(noisy_pipe, "easy_cache")


def test_tensors_for_another_scheduler_are_refused(noisy_pipe, monkeypatch):
    forward = noisy_pipe.transformer.forward
    monkeypatch.setattr(
        noisy_pipe.transformer,
        "forward",
        lambda *args, **kwargs: ([*forward(*args, **{**kwargs, "return_dict": False})[0], torch.zeros(1)],),
    )
    with (
        omni_kernels.patched(noisy_pipe, "velocity_cache"),
        pytest.raises(ValueError, match=r"draws new noise at each step.*returns tensors of several shapes"),
    ):
        latents(noisy_pipe)


def test_levels_of_each_token_are_refused(noisy_pipe, monkeypatch):
    monkeypatch.setattr(Request, "by_token", property(lambda self: True, lambda self, value: None), raising=False)
    with (
        omni_kernels.patched(noisy_pipe, "velocity_cache"),
        pytest.raises(ValueError, match=r"draws new noise at each step.*a noise level for each token"),
    ):
        latents(noisy_pipe)
