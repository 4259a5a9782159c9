"""Denoising loops that are not what they seem: steps left out, several loops in a call, other schedulers that step."""

import copy
import functools
import warnings

import diffusers
import pytest
import tiny
import torch

import omni_kernels
from benchmarks.models import tiny as tiny_models
from omni_kernels.patching import Patch
from omni_runtime.cache.lifecycle import outside

NOISE = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(7))
TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
SKIPPING = {
    "first_block_cache": {"threshold": 1.0, "forecaster": "newton"},
    "velocity_cache": {"schedule": [0, 1, 4], "corrector_order": 0},
    "easy_cache": {"thresh": 0.5, "ret_steps": 2},
}


class LoopPipeline(diffusers.DiffusionPipeline):
    """A pipeline whose call is the loop that it is given."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, loop, *args):
        return loop(self, *args)

    def velocity(self, latents, t):
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=TEXT,
            timestep=t.expand(1) / 1000,
            img_shapes=[[(1, 4, 4)]],
            return_dict=False,
        )[0]


@pytest.fixture
def pipe():
    made = tiny.qwen_image()
    return LoopPipeline(made.transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


def denoise(pipe, timesteps, latents=NOISE, scheduler=None):
    scheduler = pipe.scheduler if scheduler is None else scheduler
    for t in timesteps:
        latents = scheduler.step(pipe.velocity(latents, t), t, latents, return_dict=False)[0]
    return latents


# Steps that are left out


def video_to_video(pipe, told):
    """Leaves out the first 4 of 10 steps, and says nothing of it to the scheduler."""
    pipe.scheduler.set_timesteps(10)
    timesteps = pipe.scheduler.timesteps[4:]
    if told:
        pipe._num_timesteps = len(timesteps)
    return denoise(pipe, timesteps)


def image_to_image(pipe):
    pipe.scheduler.set_timesteps(10)
    pipe.scheduler.set_begin_index(4)
    return denoise(pipe, pipe.scheduler.timesteps[4:])


@pytest.mark.parametrize("backend", SKIPPING)
def test_steps_that_are_left_out_without_a_word_are_no_steps_of_the_request(pipe, backend):
    with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
        expected = pipe(image_to_image)
        decisions = handle.report.branches["0"].decisions
        assert handle.report.steps == 6
        assert handle.report.forwards_saved > 0
        assert torch.equal(pipe(video_to_video, True), expected)
        assert handle.report.branches["0"].decisions == decisions
        assert handle.report.complete


@pytest.mark.parametrize("backend", SKIPPING)
def test_steps_that_nobody_tells_of_are_found_by_the_schedulers_count(pipe, backend):
    plain = pipe(video_to_video, False)
    with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
        made = pipe(video_to_video, False)
    report = handle.report
    assert report.complete
    assert report.steps == 6
    assert report.forwards_saved > 0
    assert report.branches["0"].computed[:2] == [0, 1], "what the first step had recorded was of another place"
    assert (made - plain).norm() < 0.2 * plain.norm()


def test_number_of_steps_of_an_earlier_call_is_not_believed(pipe):
    with omni_kernels.patched(pipe, "velocity_cache", {"budget": 5}) as handle:
        pipe(video_to_video, True)
        pipe(lambda pipe: pipe.scheduler.set_timesteps(10) or denoise(pipe, pipe.scheduler.timesteps))
        assert handle.report.steps == 10
        assert handle.report.complete
        assert pipe._num_timesteps == 6


# Several loops


def segments(pipe):
    """Three loops, and timesteps set once more for a next one that does not come."""
    latents = NOISE
    for _ in range(3):
        pipe.scheduler.set_timesteps(6)
        latents = denoise(pipe, pipe.scheduler.timesteps, latents)
        pipe.scheduler.set_timesteps(6)
    return latents


@pytest.mark.parametrize("backend", SKIPPING)
def test_each_segment_has_a_report(pipe, backend):
    with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
        pipe(segments)
        reports = handle.reports
        pipe(lambda pipe: pipe.scheduler.set_timesteps(5) or denoise(pipe, pipe.scheduler.timesteps))
    assert [report.complete for report in reports] == [True] * 3
    assert all(report.forwards_saved > 0 for report in reports)
    assert handle.report.steps == 5
    assert len(handle.reports) == 1


# Other schedulers


def step_copies(pipe):
    """As SkyReels V2 does: the scheduler itself makes no step."""
    pipe.scheduler.set_timesteps(24)
    scheduler = copy.deepcopy(pipe.scheduler)
    return denoise(pipe, pipe.scheduler.timesteps, scheduler=scheduler)


@pytest.mark.parametrize("backend", SKIPPING)
def test_pipeline_that_steps_copies_of_its_scheduler_is_refused_and_nothing_piles_up(pipe, backend):
    plain = pipe(step_copies)
    with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
        with pytest.raises(ValueError, match=rf"{backend} cannot follow the steps of LoopPipeline: .* copies"):
            pipe(step_copies)
        assert handle._installed.held_tensors() == []
    assert torch.equal(pipe(step_copies), plain)


def test_where_copies_of_the_scheduler_step_auto_computes_all(pipe):
    plain = pipe(step_copies)
    with omni_kernels.patched(pipe, "auto") as handle:
        with pytest.warns(UserWarning, match=r"LoopPipeline .* steps another one.*auto caches nothing"):
            made = pipe(step_copies)
        assert handle._installed.held_tensors() == []
        assert "steps another one" in handle.report.notes[-1]
    assert torch.equal(made, plain)


def step_another(pipe):
    """The pipeline has made its own scheduler, which is no copy."""
    pipe.scheduler.set_timesteps(24)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(24)
    return denoise(pipe, scheduler.timesteps, scheduler=scheduler)


@pytest.mark.parametrize("backend", SKIPPING)
def test_pipeline_that_steps_another_scheduler_is_told_of_and_nothing_piles_up(pipe, backend):
    plain = pipe(step_another)
    with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
        with pytest.warns(UserWarning, match=rf"LoopPipeline .* steps another one.*{backend} caches nothing"):
            made = pipe(step_another)
        assert handle._installed.held_tensors() == []
    assert torch.equal(made, plain)


def step_twice(pipe, steps=8):
    """As Cosmos 1.0 does: a step for the clean latents, taken back, and the step itself."""
    latents, scheduler = NOISE, pipe.scheduler
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        velocity = pipe.velocity(latents, t)
        scheduler.step(velocity, t, latents)
        scheduler._step_index -= 1
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def test_step_that_is_taken_twice_is_one(pipe):
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 1.0}) as handle:
        pipe(step_twice)
    assert handle.report.complete
    assert len(handle.report.step_seconds) == 8
    assert [d.step for d in handle.report.branches["0"].decisions] == list(range(8))
    assert handle.report.branches["0"].computed == [0]


def test_whole_steps_that_are_taken_twice_are_refused(pipe):
    with (
        omni_kernels.patched(pipe, "velocity_cache", {"budget": 4}) as handle,
        pytest.raises(ValueError, match=r"LoopPipeline takes a step of its scheduler twice.*cache of blocks"),
    ):
        pipe(step_twice)
    assert handle._installed.held_tensors() == []


def test_where_steps_are_taken_twice_auto_computes_all(pipe):
    """A pipeline that `schedulers.STEP_TWICE` does not name. The report says why, and the next request is the same."""
    expected = pipe(step_twice, 16)
    with omni_kernels.patched(pipe, "auto") as handle:
        for _ in range(2):
            assert torch.equal(pipe(step_twice, 16), expected)
            assert handle.report.forwards_saved == 0
            note = "LoopPipeline takes a step of its scheduler twice: whole steps cannot be skipped"
            assert handle.report.notes[1:] == [f"auto: every step is computed, because {note}"]
        assert handle._installed.held_tensors() == []


@pytest.mark.parametrize("backend", SKIPPING)
def test_loop_whose_first_step_needs_no_transformer(pipe, backend):
    def loop(pipe):
        pipe.scheduler.set_timesteps(8)
        first, *others = pipe.scheduler.timesteps
        latents = pipe.scheduler.step(NOISE, first, NOISE, return_dict=False)[0]
        return denoise(pipe, others, latents)

    with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a step without the transformer is told of
            pipe(loop)
        assert handle.report.steps == 8
        assert handle.report.complete
        assert handle.report.branches["0"].decisions[0].step == 1
        assert handle.report.forwards_saved > 0


def test_undone_within_a_call_nothing_more_is_cached(pipe):
    def loop(pipe):
        omni_kernels.unpatch(pipe)
        pipe.scheduler.set_timesteps(4)
        return denoise(pipe, pipe.scheduler.timesteps)

    plain = pipe(loop)
    handle = omni_kernels.patch(pipe, "first_block_cache", {"threshold": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(pipe(loop), plain)
    assert handle.report is None
    with pytest.raises(RuntimeError, match="this patch was undone"):
        handle.sampling()


def test_keywords_that_a_wrapped_step_takes_reach_it(pipe):
    own, seen = pipe.scheduler.step, []

    def step(*args, mine=None, **kwargs):
        seen.append(mine)
        return own(*args, **kwargs)

    pipe.scheduler.step = step

    def loop(pipe):
        pipe.scheduler.set_timesteps(6)
        latents = NOISE
        for t in pipe.scheduler.timesteps:
            latents = pipe.scheduler.step(pipe.velocity(latents, t), t, latents, mine=1, return_dict=False)[0]

    for backend in SKIPPING:
        with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
            pipe(loop)
            assert handle.report.complete
    assert seen == [1] * 6 * len(SKIPPING)


class PictureAndSound(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A transformer with two outputs, each for a scheduler of its own."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, size=8):
        super().__init__()
        torch.manual_seed(0)
        self.picture, self.sound = torch.nn.Linear(size, size), torch.nn.Linear(size, size)

    def forward(self, hidden_states, audio_hidden_states, timestep, return_dict=False):
        scale = 1 + timestep
        return tuple(
            torch.tanh(layer(states) * scale) * scale
            for layer, states in ((self.picture, hidden_states), (self.sound, audio_hidden_states))
        )


def picture_and_sound(pipe, noise=None):
    draw = torch.Generator().manual_seed(0)
    picture, sound = (torch.randn(1, 16, 8, generator=draw) if noise is None else noise for _ in range(2))
    second = copy.deepcopy(pipe.scheduler)
    for scheduler in (second, pipe.scheduler):
        scheduler.set_timesteps(30)
    for t in pipe.scheduler.timesteps:
        seen, heard = pipe.transformer(picture, sound, t / 1000)
        picture = pipe.scheduler.step(seen, t, picture, return_dict=False)[0]
        sound = second.step(heard, t, sound, return_dict=False)[0]
    return picture, sound


@pytest.mark.parametrize(
    ("backend", "config"), [("velocity_cache", {"budget": 15}), ("easy_cache", {"thresh": 0.1, "ret_steps": 3})]
)
def test_what_a_second_scheduler_steps_with_is_forecast_too(backend, config):
    """LTX-2 makes sound beside the video, with a copy of the scheduler."""
    with torch.random.fork_rng(devices=[]):
        pipe = LoopPipeline(PictureAndSound(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    expected = pipe(picture_and_sound)
    with omni_kernels.patched(pipe, backend, config) as handle:
        made = pipe(picture_and_sound)
        assert handle._installed.held_tensors() == []
    assert handle.report.forwards_saved > 5
    picture, sound = ((a - b).norm() / b.norm() for a, b in zip(made, expected, strict=True))
    assert sound < 3 * picture + 0.01


@pytest.mark.parametrize("counted", [False, True])
def test_what_a_second_scheduler_steps_with_is_corrected_too(counted):
    """Up to its last step, which it takes when the request is over: the one before is skipped."""
    with torch.random.fork_rng(devices=[]):
        pipe = LoopPipeline(PictureAndSound(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    if counted:  # as by CFG parallelism
        step = pipe.scheduler.step
        Patch().set_method(pipe.scheduler, "step", functools.wraps(step)(lambda *args, **kwargs: step(*args, **kwargs)))
    pipe.transformer.sound = pipe.transformer.picture  # so both must stay the same, for the same noise
    with omni_kernels.patched(pipe, "velocity_cache", {"schedule": [0, 1, 3, 5, 9, 13, 17, 21, 25]}) as handle:
        picture, sound = pipe(picture_and_sound, pipe.transformer.picture.weight[None])
        assert handle._installed.held_tensors() == []
    assert handle.report.forwards_saved == 20
    assert torch.equal(picture, sound)


def sound_of_ltx2(model, guided):
    model.pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model.pipe(**model.asked(guided, num_inference_steps=20, generator=generator))[1]


@pytest.mark.parametrize(("name", "guided"), [("LTX2Pipeline", False), ("LTX2Pipeline (all guidances)", True)])
def test_correction_brings_the_sound_of_ltx2_nearer(name, guided):
    model = tiny_models.build(name)
    expected = sound_of_ltx2(model, guided)

    def error(order):
        with omni_kernels.patched(model.pipe, "velocity_cache", {"budget": 10, "corrector_order": order}):
            return (sound_of_ltx2(model, guided) - expected).norm()

    assert error(2) < 0.75 * error(0)


def test_sound_of_steps_that_are_all_computed_is_the_same():
    model = tiny_models.build("LTX2Pipeline")
    expected = sound_of_ltx2(model, True)
    with omni_kernels.patched(model.pipe, "velocity_cache", {"budget": 20}):
        assert torch.equal(sound_of_ltx2(model, True), expected)
    assert torch.equal(sound_of_ltx2(model, True), expected)


@pytest.mark.parametrize("shape", ["same steps", "copied in each step"])
def test_copy_of_the_scheduler_that_steps_something_else_is_left_alone(pipe, shape):
    """A transformer that returns one tensor makes nothing for the copy."""
    stepped = torch.ones(1, 2)

    def loop(pipe):
        pipe.scheduler.set_timesteps(8)
        second, latents, moved = copy.deepcopy(pipe.scheduler), NOISE, [stepped]
        for t in pipe.scheduler.timesteps:
            if shape == "copied in each step":
                second = copy.deepcopy(pipe.scheduler)
            latents = pipe.scheduler.step(pipe.velocity(latents, t), t, latents, return_dict=False)[0]
            moved.append(second.step(t.expand(1, 2), t, moved[-1], return_dict=False)[0])
        return moved

    expected = pipe(loop)
    with omni_kernels.patched(pipe, "velocity_cache", {"schedule": [0, 1, 4]}) as handle:
        assert torch.equal(torch.stack(pipe(loop)), torch.stack(expected))
    assert handle.report.forwards_saved == 4


# Schedulers that draw noise


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchLCMScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_noise_drawn_at_each_step_is_no_forecast(pipe, scheduler):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} .* new noise at each step.*cache_dit"):
        omni_kernels.patch(pipe, "easy_cache")
    omni_kernels.patch(pipe, "first_block_cache").undo()


# Gradients


@pytest.mark.parametrize("backend", SKIPPING)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_whose_gradient_is_asked_for_are_computed_and_right(pipe, backend, checkpointing):
    """Reward tuning: the first steps without a gradient, the last ones with."""
    scale = torch.ones(1, requires_grad=True)

    def tuned(pipe):
        pipe.scheduler.set_timesteps(8)
        first, last = pipe.scheduler.timesteps[:6], pipe.scheduler.timesteps[6:]
        begun = denoise(pipe, first, NOISE)
        with torch.enable_grad():
            return denoise(pipe, last, begun * scale).square().mean()

    def gradient():
        scale.grad = None
        pipe(tuned).backward()
        return scale.grad.clone()

    pipe.transformer.requires_grad_(False)
    if checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
        pipe.transformer.train()
    never = {"first_block_cache": {"threshold": 0.0}, "velocity_cache": {"budget": 8}, "easy_cache": {"ret_steps": 8}}
    expected = gradient()
    with omni_kernels.patched(pipe, backend, never[backend]):
        torch.testing.assert_close(gradient(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
            assert torch.isfinite(gradient()).all()
    reasons = {d.step: d.reason for d in handle.report.branches["0"].decisions}
    assert handle.report.forwards_saved > 0
    assert {6, 7} <= set(handle.report.branches["0"].computed)
    assert reasons[6] == "a gradient is asked for" or backend != "first_block_cache"


class Unusual(diffusers.FlowMatchEulerDiscreteScheduler):
    """A scheduler that names its arguments otherwise, and returns something of its own."""

    def step(self, velocity, t, latents):
        return {"latents": super().step(velocity, t, latents).prev_sample}


def test_scheduler_with_names_of_its_own_serves_a_cache_of_blocks(pipe):
    pipe.scheduler = Unusual(shift=3.0)

    def loop(pipe):
        pipe.scheduler.set_timesteps(6)
        latents = NOISE
        for t in pipe.scheduler.timesteps:
            latents = pipe.scheduler.step(pipe.velocity(latents, t), t, latents)["latents"]
        return latents

    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 1.0}) as handle:
        assert torch.isfinite(pipe(loop)).all()
    assert handle.report.branches["0"].computed == [0]
    assert handle.report.complete


def test_few_calls_without_a_step_are_told_of_too(pipe):
    with (
        omni_kernels.patched(pipe, "velocity_cache", {"budget": 2}),
        pytest.warns(UserWarning, match="its own scheduler made no step, so velocity_cache has cached nothing"),
    ):
        pipe(lambda pipe: pipe.scheduler.set_timesteps(4) or pipe.velocity(NOISE, pipe.scheduler.timesteps[0]))


def test_modular_pipeline_is_cached_and_undone():
    pipe = diffusers.ZImageAutoBlocks().init_pipeline()
    pipe.update_components(**tiny.z_image().components)
    pipe.set_progress_bar_config(disable=True)

    def made():
        with torch.no_grad():
            return torch.stack(
                list(
                    pipe(
                        prompt="a cat",
                        height=64,
                        width=64,
                        num_inference_steps=6,
                        generator=torch.Generator().manual_seed(0),
                        output_type="pt",
                        output="images",
                    )
                )
            )

    plain = made()
    for backend in ("velocity_cache", "first_block_cache"):
        config = {"budget": 3} if backend == "velocity_cache" else {"threshold": 1.0}
        with omni_kernels.patched(pipe, backend, config) as handle:
            cached = made()
        assert handle.report.complete
        assert handle.report.forwards_saved > 0
        assert not torch.equal(cached, plain)
        assert torch.equal(made(), plain)


def test_scheduler_that_others_set_during_a_request_does_as_they_say(pipe):
    """What runs outside, a callback for one, is not the request's: it is let through, and begins none."""

    def loop(pipe):
        pipe.scheduler.set_timesteps(4)
        latents = NOISE
        for t in pipe.scheduler.timesteps:
            latents = pipe.scheduler.step(pipe.velocity(latents, t), t, latents, return_dict=False)[0]
        with outside():
            pipe.scheduler.set_timesteps(9)
        return latents

    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 1.0}) as handle:
        pipe(loop)
    assert pipe.scheduler.num_inference_steps == 9
    assert [report.steps for report in handle.reports] == [4]


@pytest.mark.parametrize("backend", SKIPPING)
def test_scheduler_that_the_call_itself_changes_is_followed(pipe, backend):
    def loop(pipe):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
        pipe.scheduler.set_timesteps(6)
        latents = NOISE
        for t in pipe.scheduler.timesteps:
            velocity = pipe.velocity(latents, t)  # before the scheduler's step is looked up, as in pipelines
            latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents

    with omni_kernels.patched(pipe, backend, SKIPPING[backend]) as handle:
        pipe(loop)
    assert handle.report.steps == 6
    assert handle.report.complete
    assert handle.report.forwards_saved > 0
