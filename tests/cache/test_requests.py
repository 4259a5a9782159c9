"""Requests: whatever ends one, and however the next differs, the next is as in a fresh pipeline, bit for bit."""

import functools
import itertools
import warnings

import diffusers
import pytest
import tiny
import torch
from pairs import by_gate, in_turn

import omni_kernels
from omni_runtime.cache import forecasters

CONFIGS = {
    "tea_cache": {"rel_l1_thresh": 0.1, "coefficients": [0, 0, 0, 1, 0]},
    "mag_cache": {"threshold": 0.3, "forecaster": "foca"},
    "sea_cache": {"threshold": 0.4, "forecaster": "dmd"},
    "first_block_cache": {"threshold": 0.2},
    "cache_dit": {
        "residual_diff_threshold": 0.3,
        "max_warmup_steps": 2,
        "Bn_compute_blocks": 1,
        "enable_taylorseer": True,
    },
    "velocity_cache": {"speedup": 2.5},
    "easy_cache": {"thresh": 0.3, "ret_steps": 2, "forecaster": "newton"},
}
EVERY_OTHER = {"steps_computation_mask": "10101011", "scm_steps_policy": "static", "max_warmup_steps": 0}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 6} | arguments)


def decisions(report):
    return {name: branch.decisions for name, branch in report.branches.items()}


def fresh(backend, build=tiny.qwen_image, **arguments):
    """Latents and decisions of a request in a pipeline that has seen no other."""
    pipe = build()
    handle = omni_kernels.patch(pipe, backend, CONFIGS[backend])
    return latents(pipe, **arguments), decisions(handle.report)


@functools.cache
def fresh_once(backend, **arguments):
    return fresh(backend, **arguments)


def assert_as_fresh(handle, pipe, backend, **arguments):
    expected, expected_decisions = fresh_once(backend, **arguments)
    assert torch.equal(latents(pipe, **arguments), expected)
    assert decisions(handle.report) == expected_decisions
    assert handle.report.complete
    assert handle.report.forwards_saved > 0, "a cache that skips nothing has nothing to leak"


def assert_nothing_is_cached(handle, pipe):
    """A call by hand computes, and leaves nothing."""
    report = handle.report
    assert torch.equal(forward(pipe, NOISE, text(5)), forward(tiny.qwen_image(), NOISE, text(5)))
    assert handle.report == report
    assert handle._installed.held_tensors() == []


def raise_at(module, call, error):
    """Raise `error` at the given call of `module`, counted from 0, and never again."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == call + 1:
            raise error

    return module.register_forward_pre_hook(hook)


def text(tokens, seed=0, batch=1):
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(seed))


def forward(pipe, noise, encoder_hidden_states, timestep=0.5, **arguments):
    """The transformer of a tiny Qwen-Image pipeline, called by hand for 64×64 pixels."""
    with torch.no_grad():
        return pipe.transformer(
            hidden_states=noise,
            encoder_hidden_states=encoder_hidden_states,
            timestep=torch.full((len(noise),), timestep),
            img_shapes=[[(1, 4, 4)]] * len(noise),
            return_dict=False,
            **arguments,
        )[0]


NOISE = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(7))


# One request after another


CHANGES = [
    {},
    {"num_inference_steps": 9},
    {"height": 96},
    {"num_images_per_prompt": 2},
    {"prompt": "a dog that is not a cat at all"},
    {"negative_prompt": None},
    {"seed": 5},
]


@pytest.mark.parametrize(
    ("backend", "change"),
    [  # every cache with every fourth change, another one's with the next
        pytest.param(
            backend,
            change,
            marks=() if (place + turn) % 4 == 0 else pytest.mark.long,
            id=f"{backend}-{next(iter(change), 'nothing')}",
        )
        for turn, backend in enumerate(CONFIGS)
        for place, change in enumerate(CHANGES)
    ],
)
def test_second_request_starts_clean(qwen_pipe, backend, change):
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS[backend])
    latents(qwen_pipe)
    assert_as_fresh(handle, qwen_pipe, backend, **change)


def test_every_pipeline_repeats_a_request_bit_for_bit(any_pipe):
    handle = omni_kernels.patch(any_pipe, "cache_dit", CONFIGS["cache_dit"])
    first, first_decisions = latents(any_pipe), decisions(handle.report)
    assert handle.report.forwards_saved > 0
    latents(any_pipe, seed=3, num_inference_steps=5)
    assert torch.equal(latents(any_pipe), first)
    assert decisions(handle.report) == first_decisions


def test_unpatched_again_the_pipeline_computes_as_before(any_pipe):
    before = latents(any_pipe)
    with omni_kernels.patched(any_pipe, "first_block_cache", {"threshold": 0.3}):
        assert not torch.equal(latents(any_pipe), before)
    assert torch.equal(latents(any_pipe), before)


def test_cache_that_never_skips_changes_no_bit(any_pipe):
    before = latents(any_pipe, num_inference_steps=4)
    for backend, config in {
        "first_block_cache": {"threshold": 0.0},
        "cache_dit": {"residual_diff_threshold": 1e-9, "Bn_compute_blocks": 1, "Fn_compute_blocks": 2},
        "tea_cache": {"rel_l1_thresh": 1e-9},
        "mag_cache": {"threshold": -1.0, "mag_ratios": [1.0]},
        "sea_cache": {"threshold": 1e-9},
        "easy_cache": {"thresh": 1e-9, "ret_steps": 0},
    }.items():
        with omni_kernels.patched(any_pipe, backend, config) as handle:
            assert torch.equal(latents(any_pipe, num_inference_steps=4), before)
            assert handle.report.forwards_saved == 0
            assert handle.report.blocks_run == handle.report.blocks_total > 0


# CFG branches


def test_without_negative_prompt_a_step_is_one_call(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", EVERY_OTHER)
    latents(qwen_pipe, negative_prompt=None, num_inference_steps=8)
    assert list(handle.report.branches) == ["cond"]
    assert handle.report.branches["cond"].computed == [0, 2, 4, 6, 7]
    assert handle.report.complete


def test_with_negative_prompt_both_branches_follow_the_mask(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", EVERY_OTHER)
    latents(qwen_pipe, num_inference_steps=8)
    assert {name: branch.computed for name, branch in handle.report.branches.items()} == {
        "cond": [0, 2, 4, 6, 7],
        "uncond": [0, 2, 4, 6, 7],
    }


def test_prompts_of_different_length_keep_their_own_snapshots(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", CONFIGS["cache_dit"])
    lengths = []
    session = handle._installed
    handle.on_step = lambda event: lengths.append({t.shape[1] for t in session.held_tensors()})
    latents(qwen_pipe, prompt="a dog that is not a cat at all")
    short = lengths[0] - {16}
    assert len(short) == 2, "two text lengths, beside the 16 image tokens"
    assert all(seen == lengths[0] for seen in lengths[:-1])


def test_calls_without_names_are_told_apart_by_their_order(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", {"max_warmup_steps": 0, "residual_diff_threshold": 1})
    scheduler, texts = qwen_pipe.scheduler, (text(5), text(9, seed=1))
    with handle.sampling():
        for calls in (1, 4):  # the first request is left after one call of its second step
            scheduler.set_timesteps(2, mu=0.5)
            for index in range(2 + calls if calls == 1 else calls):
                forward(qwen_pipe, NOISE, texts[index % 2])
                if index % 2:
                    scheduler.step(NOISE, scheduler.timesteps[index // 2], NOISE)
    assert [report.complete for report in handle.reports] == [False, True]
    assert {name: [d.computed for d in made] for name, made in decisions(handle.report).items()} == {
        "0": [True, False],
        "1": [True, False],
    }


def test_same_name_twice_in_a_step_is_two_branches(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 1.0})
    with handle.sampling():
        qwen_pipe.scheduler.set_timesteps(2, mu=0.5)
        for step in range(2):
            for seed in range(2):
                with qwen_pipe.transformer.cache_context("cond"):
                    forward(qwen_pipe, NOISE, text(5, seed))
            qwen_pipe.scheduler.step(NOISE, qwen_pipe.scheduler.timesteps[step], NOISE)
    assert [branch.computed for branch in handle.report.branches.values()] == [[0], [0]]


def test_cfg_truncation_halves_the_batch_mid_run(z_pipe):
    arguments = {"cfg_truncation": 0.2, "num_inference_steps": 8}
    before = latents(z_pipe, **arguments)
    with omni_kernels.patched(z_pipe, "cache_dit", {"residual_diff_threshold": 1e-9}):
        assert torch.equal(latents(z_pipe, **arguments), before)
    with omni_kernels.patched(z_pipe, "first_block_cache", {"threshold": 1.0}) as handle:
        latents(z_pipe, **arguments)
        (branch,) = handle.report.branches.values()
        (change,) = [d.step for d in branch.decisions if d.reason == "shape changed"]
        assert 0 < change < 7
        assert branch.computed == [0, change]


def test_prompt_of_another_length_mid_run_drops_the_text_snapshots(qwen_pipe):
    config = {"max_warmup_steps": 0, "residual_diff_threshold": 1, "Bn_compute_blocks": 1}
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", config)
    with handle.sampling():
        qwen_pipe.scheduler.set_timesteps(4, mu=0.5)
        for step, tokens in enumerate([5, 5, 8, 8]):
            forward(qwen_pipe, NOISE, text(tokens))
            qwen_pipe.scheduler.step(NOISE, qwen_pipe.scheduler.timesteps[step], NOISE)
    assert [d.reason for d in handle.report.branches["0"].decisions] == [
        "nothing cached yet",
        "threshold ≥ 1",
        "shape changed",
        "threshold ≥ 1",
    ]


# Requests that die


@pytest.mark.parametrize(
    ("backend", "error", "call"),
    [
        pytest.param(pair.values[0], *pair.values[1], id=pair.id, marks=pair.marks)
        for pair in in_turn(CONFIGS, itertools.product([RuntimeError, KeyboardInterrupt], ["cond", "uncond"]))
    ],
)
def test_exception_inside_a_block_leaves_nothing_behind(qwen_pipe, backend, error, call):
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS[backend])
    block = qwen_pipe.transformer.transformer_blocks[0 if backend != "tea_cache" else 2]
    first = 0 if backend == "tea_cache" else 2  # of the calls of the step to fail in
    hook = raise_at(block, first + (call == "uncond"), error("broken"))
    with pytest.raises(error):
        latents(qwen_pipe)
    hook.remove()
    assert not handle.report.complete
    assert handle._installed.held_tensors() == []
    assert all(isinstance(child, torch.nn.Module) for child in qwen_pipe.transformer.transformer_blocks)
    assert_as_fresh(handle, qwen_pipe, backend)


@pytest.mark.parametrize("backend", by_gate(CONFIGS))
def test_interrupt_ends_the_request(qwen_pipe, backend):
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS[backend])

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return {}

    latents(qwen_pipe, callback_on_step_end=interrupt)
    assert not handle.report.complete
    assert [d.step for d in handle.report.branches["uncond"].decisions] == [0, 1, 2]
    assert handle._installed.held_tensors() == []
    assert_as_fresh(handle, qwen_pipe, backend)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_exception_between_the_steps_ends_the_request(qwen_pipe, error):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", CONFIGS["cache_dit"])

    def fail(pipe, step, timestep, tensors):
        if step == 3:
            raise error
        return {}

    with pytest.raises(type(error)):
        latents(qwen_pipe, callback_on_step_end=fail)
    assert handle._installed.held_tensors() == []
    assert_nothing_is_cached(handle, qwen_pipe)
    assert_as_fresh(handle, qwen_pipe, "cache_dit")


def test_exception_in_the_scheduler_ends_the_request(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", CONFIGS["cache_dit"])
    with handle.sampling():
        qwen_pipe.scheduler.set_timesteps(4, mu=0.5)
        forward(qwen_pipe, NOISE, text(5))
        assert handle._installed.held_tensors() != []
        with pytest.raises(ValueError, match="integer"):
            qwen_pipe.scheduler.step(NOISE, 3, NOISE)
        assert handle._installed.held_tensors() == []


def test_listener_that_raises_does_not_keep_the_request_open(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", CONFIGS["first_block_cache"])

    def listen(event):
        if event.step == event.steps - 1:
            raise RuntimeError("listener")

    handle.on_step = listen
    with pytest.raises(RuntimeError, match="listener"):
        latents(qwen_pipe)
    handle.on_step = None
    assert_nothing_is_cached(handle, qwen_pipe)
    assert_as_fresh(handle, qwen_pipe, "first_block_cache")


def test_mask_of_the_wrong_length_fails_by_name_and_leaves_the_pipeline_usable(qwen_pipe):
    before = latents(qwen_pipe)
    with (
        omni_kernels.patched(qwen_pipe, "cache_dit", {"steps_computation_mask": "1101"}) as handle,
        pytest.raises(ValueError, match="steps_computation_mask has 4 entries, but the request has 6 steps"),
    ):
        latents(qwen_pipe)
    assert handle._installed.held_tensors() == []
    assert torch.equal(latents(qwen_pipe), before)


def test_steps_count_as_the_request_has_them_not_as_the_user_told(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", {"num_inference_steps": 50, "scm_steps_mask_policy": "fast"})
    with pytest.warns(UserWarning, match="num_inference_steps=50, but the request has 8 steps"):
        latents(qwen_pipe, num_inference_steps=8)
    assert {3, 5, 6} >= set(handle.report.branches["cond"].skipped), "fast, 8 steps: 11101001"
    assert handle.report.steps == 8


def test_a_policy_without_a_mask_for_so_few_steps_is_left_out_and_told(qwen_pipe):
    config = {"scm_steps_mask_policy": "fast", "scm_steps_policy": "static", "residual_diff_threshold": 0.0}
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", config)
    latents(qwen_pipe, num_inference_steps=7)
    assert handle.report.branches["cond"].skipped == []
    assert [note for note in handle.report.notes if "no mask 'fast' for 7 steps" in note]


# Calls and schedulers from outside


def test_transformer_called_by_hand_computes_fully_and_says_so_once(qwen_pipe):
    expected = forward(qwen_pipe, NOISE, text(5))
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 1.0})
    with pytest.warns(UserWarning, match=r"outside a call of the patched.* `with handle\.sampling\(\):`") as said:
        assert torch.equal(forward(qwen_pipe, NOISE, text(5)), expected)
    assert [w.filename for w in said] == [__file__]
    latents(qwen_pipe)
    report = handle.report
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(forward(qwen_pipe, NOISE, text(5)), expected)
    assert handle.report == report
    assert handle._installed.held_tensors() == []
    handle.undo()
    assert not qwen_pipe.transformer._forward_pre_hooks


def test_loop_of_ones_own_after_a_call_is_told_of_too(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(qwen_pipe)
    with pytest.warns(UserWarning, match="outside a call of the patched pipeline"):
        forward(qwen_pipe, NOISE, text(5))
    handle.undo()
    assert not qwen_pipe.transformer._forward_pre_hooks


def test_loop_of_ones_own_is_cached_where_it_says_so(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 1.0})
    qwen_pipe.scheduler.set_timesteps(3, mu=0.5)  # before it: the request is taken up
    with handle.sampling():
        for timestep in qwen_pipe.scheduler.timesteps:
            qwen_pipe.scheduler.step(forward(qwen_pipe, NOISE, text(5)), timestep, NOISE)
    assert handle.report.branches["0"].computed == [0]
    assert handle.report.complete
    assert not {"step", "set_timesteps"} & set(vars(qwen_pipe.scheduler))
    assert qwen_pipe.transformer._compiled_call_impl is None


def test_run_in_which_nothing_could_be_cached_says_so(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 1.0})
    with pytest.warns(UserWarning, match="first_block_cache has cached nothing"), handle.sampling():
        forward(qwen_pipe, NOISE, text(5))


def other_scheduler(pipe):
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=0.2)


def with_other_scheduler():
    pipe = tiny.qwen_image()
    pipe.scheduler = other_scheduler(pipe)
    return pipe


@pytest.mark.parametrize("used_before", [False, True])
def test_replaced_scheduler_is_followed(qwen_pipe, used_before):
    old = qwen_pipe.scheduler
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", CONFIGS["cache_dit"])
    if used_before:
        latents(qwen_pipe)
    qwen_pipe.scheduler = other_scheduler(qwen_pipe)
    expected, expected_decisions = fresh("cache_dit", with_other_scheduler)
    for _ in range(2):
        assert torch.equal(latents(qwen_pipe), expected)
        assert decisions(handle.report) == expected_decisions
    assert not {"step", "set_timesteps"} & set(vars(old))
    handle.undo()
    assert not {"step", "set_timesteps"} & set(vars(qwen_pipe.scheduler))


@pytest.mark.parametrize("backend", by_gate(CONFIGS))
def test_exception_in_the_first_request_of_a_replaced_scheduler_leaves_nothing(qwen_pipe, backend):
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS[backend])
    qwen_pipe.scheduler = other_scheduler(qwen_pipe)

    def fail(pipe, step, timestep, tensors):
        assert handle._installed.held_tensors() != []
        raise KeyError(step)

    with pytest.raises(KeyError):
        latents(qwen_pipe, callback_on_step_end=fail)
    assert handle._installed.held_tensors() == []
    assert not {"step", "set_timesteps"} & set(vars(qwen_pipe.scheduler))


def test_call_by_hand_after_replacing_the_scheduler_opens_no_request(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 1.0})
    qwen_pipe.scheduler = other_scheduler(qwen_pipe)
    with pytest.warns(UserWarning, match="outside a call of the patched pipeline"):
        forward(qwen_pipe, NOISE, text(5))
    assert handle.report is None


def test_scheduler_that_somebody_wraps_between_requests_is_left_to_him(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", CONFIGS["cache_dit"])
    expected = latents(qwen_pipe)
    own, seen = qwen_pipe.scheduler.step, []
    qwen_pipe.scheduler.step = lambda *args, **kwargs: seen.append(1) or own(*args, **kwargs)
    theirs = qwen_pipe.scheduler.step
    assert torch.equal(latents(qwen_pipe), expected)
    assert len(seen) == 6
    handle.undo()
    assert qwen_pipe.scheduler.step is theirs


def test_scheduler_that_a_callback_wraps_goes_on_without_us(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", CONFIGS["cache_dit"])
    expected = latents(qwen_pipe)

    def wrap(pipe, step, timestep, tensors):
        if step == 0:
            ours = pipe.scheduler.step
            pipe.scheduler.step = lambda *args, **kwargs: ours(*args, **kwargs)
        return {}

    for callback in (wrap, None):
        assert torch.equal(latents(qwen_pipe, callback_on_step_end=callback), expected)
        assert handle.report.complete


@pytest.mark.parametrize("backend", ["first_block_cache", "velocity_cache", "tea_cache", "easy_cache", "cache_dit"])
def test_replaced_transformer_computes_in_full_and_is_said(qwen_pipe, backend):
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS.get(backend, {}))
    latents(qwen_pipe, num_inference_steps=8)
    qwen_pipe.transformer = tiny.qwen_image().transformer
    with pytest.warns(UserWarning, match="without the patched QwenImageTransformer2DModel"):
        cached = latents(qwen_pipe, num_inference_steps=8)
    report = handle.report
    assert len(handle.reports) == 1
    assert (report.steps, report.complete, report.branches, report.skipped) == (8, True, {}, [])
    assert "without the patched QwenImageTransformer2DModel" in report.notes[-1]
    assert "nothing is cached" in str(report)
    handle.undo()
    assert torch.equal(latents(qwen_pipe, num_inference_steps=8), cached)


def test_image_to_image_counts_the_steps_that_it_runs(qwen_pipe, monkeypatch):
    seen = []

    def newton(positions, x):
        seen.append([*positions, x])
        return forecasters.reuse(positions, x)

    monkeypatch.setitem(forecasters.FORECASTERS, "newton", (newton, "sigma", None, None))
    pipe = diffusers.QwenImageImg2ImgPipeline.from_pipe(qwen_pipe)
    config = {"steps_computation_mask": "1011", "scm_steps_policy": "static", "forecaster": "newton"}
    handle = omni_kernels.patch(pipe, "cache_dit", config | {"max_warmup_steps": 0})
    pipe(
        prompt="a cat",
        image=tiny.reference_image(64),
        strength=0.5,
        num_inference_steps=8,
        height=64,
        width=64,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    assert handle.report.steps == 4
    assert handle.report.complete
    assert handle.report.branches["cond"].computed == [0, 2, 3]
    sigmas = pipe.scheduler.sigmas.tolist()
    assert seen == [[sigmas[4], sigmas[5]]]


def test_sampler_of_second_order_forecasts_though_it_visits_a_sigma_twice(qwen_pipe):
    qwen_pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    config = {"forecaster": "newton", "forecaster_order": 2, "max_warmup_steps": 5, "residual_diff_threshold": 1}
    handle = omni_kernels.patch(qwen_pipe, "cache_dit", config)
    scheduler, noise = qwen_pipe.scheduler, NOISE
    with handle.sampling():
        scheduler.set_timesteps(4)
        for timestep in scheduler.timesteps:
            velocity = forward(qwen_pipe, noise, text(5), timestep.item() / 1000)
            noise = scheduler.step(velocity, timestep, noise, return_dict=False)[0]
    assert handle.report.branches["0"].skipped == [5, 6]
    assert torch.isfinite(noise).all()
