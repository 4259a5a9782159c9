"""Pipelines share transformers, schedulers and threads: each is as it was told to be, and leaves another nothing."""

import copy
import pickle
import threading

import diffusers
import pytest
import tiny
import torch
from pairs import in_turn

import omni_kernels
from omni_runtime import Omni

CONFIGS = {
    "velocity_cache": {"speedup": 2.0},
    "first_block_cache": {"threshold": 0.4},
    "mag_cache": {"threshold": 0.5},
    "cache_dit": {"engine": "library", "residual_diff_threshold": 0.4, "max_warmup_steps": 2},
}


class StopError(Exception):
    pass


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 6} | arguments)


def sibling(pipe, own_scheduler=False):
    """A second pipeline on the same models, as diffusers makes one."""
    made = type(pipe).from_pipe(pipe)
    if own_scheduler:
        made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return made


def in_two_threads(first, second):
    """What both give, or what they raise."""
    made = {}

    def run(number, function):
        try:
            made[number] = function()
        except Exception as error:
            made[number] = error

    threads = [threading.Thread(target=run, args=one) for one in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made[0], made[1]


# One after the other


@pytest.mark.parametrize(
    ("own_scheduler", "backend"),
    [
        pytest.param(own, backend, marks=() if own == bool(turn % 2) else pytest.mark.long)
        for turn, backend in enumerate(CONFIGS)
        for own in (False, True)
    ],
)
def test_sibling_that_nobody_patched_is_not_cached(qwen_pipe, backend, own_scheduler):
    plain = latents(qwen_pipe)
    before = sibling(qwen_pipe, own_scheduler)
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS[backend])
    cached = latents(qwen_pipe)
    report = handle.report
    for other in (before, sibling(qwen_pipe, own_scheduler), copy.copy(qwen_pipe)):
        assert type(other) is diffusers.QwenImagePipeline
        assert torch.equal(latents(other), plain)
        omni_kernels.unpatch(other)
        assert handle.active
        assert handle.report == report
    assert torch.equal(latents(qwen_pipe), cached)
    assert not torch.equal(cached, plain)


@pytest.mark.parametrize("backend", CONFIGS)
def test_sibling_that_dies_holds_nothing(qwen_pipe, backend):
    plain = latents(qwen_pipe)
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS[backend])
    other = sibling(qwen_pipe)

    def stop(pipe, step, timestep, tensors):
        raise StopError

    with pytest.raises(StopError):
        latents(other, callback_on_step_end=stop)
    assert handle._installed.held_tensors() == []
    assert torch.equal(latents(sibling(qwen_pipe, own_scheduler=True)), plain)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(first, second, marks=() if (turn + place) % 3 == 0 else pytest.mark.long)
        for turn, first in enumerate(CONFIGS)
        for place, second in enumerate(("velocity_cache", "first_block_cache", "cache_dit"))
    ],
)
def test_siblings_are_each_cached_as_they_were_told_and_undone_in_any_order(qwen_pipe, first, second):
    other = sibling(qwen_pipe)
    plain = latents(qwen_pipe)
    alone = []
    for pipe, backend in ((qwen_pipe, first), (other, second)):
        with omni_kernels.patched(pipe, backend, CONFIGS[backend]):
            alone.append(latents(pipe))
    handles = [
        omni_kernels.patch(pipe, backend, CONFIGS[backend]) for pipe, backend in ((qwen_pipe, first), (other, second))
    ]
    for _ in range(2):
        assert torch.equal(latents(qwen_pipe), alone[0])
        assert torch.equal(latents(other), alone[1])
    handles[0].undo()
    assert torch.equal(latents(qwen_pipe), plain)
    assert torch.equal(latents(other), alone[1])
    handles[1].undo()
    assert torch.equal(latents(other), plain)


@pytest.mark.parametrize("backend", ["velocity_cache", "first_block_cache"])
def test_call_within_a_call_keeps_its_request_to_itself(qwen_pipe, backend):
    """A preview by a sibling, from a callback, on the same transformer."""
    other = sibling(qwen_pipe, own_scheduler=True)
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS[backend])
    inner = omni_kernels.patch(other, "cache_dit", {"max_warmup_steps": 1, "residual_diff_threshold": 1})
    expected, preview, seen = latents(qwen_pipe), latents(other, num_inference_steps=3), []

    def look(pipe, step, timestep, tensors):
        if step in (1, 3, 4):
            seen.append(latents(other, num_inference_steps=3))
        return {}

    assert torch.equal(latents(qwen_pipe, callback_on_step_end=look), expected)
    assert len(seen) == 3
    assert all(torch.equal(one, preview) for one in seen)
    assert handle.report.complete
    assert inner.report.complete


@pytest.mark.parametrize("backend", CONFIGS)
def test_callback_may_run_a_pipeline_that_nobody_patched(qwen_pipe, backend):
    """A preview by a sibling on the same transformer is as ever, and changes nothing."""
    other = sibling(qwen_pipe, own_scheduler=True)
    preview = latents(other, num_inference_steps=3)
    handle = omni_kernels.patch(qwen_pipe, backend, CONFIGS[backend])
    expected, seen = latents(qwen_pipe), []

    def look(pipe, step, timestep, tensors):
        if step in (1, 3, 4):
            seen.append(latents(other, num_inference_steps=3))
        return {}

    if CONFIGS[backend].get("engine") == "library":
        with pytest.raises(ValueError, match="was called from a callback"):
            latents(qwen_pipe, callback_on_step_end=look)
    else:
        assert torch.equal(latents(qwen_pipe, callback_on_step_end=look), expected)
        handle.on_step = lambda event: look(None, event.step, None, None)
        assert torch.equal(latents(qwen_pipe), expected)
        assert len(seen) == 6
        assert all(torch.equal(one, preview) for one in seen)
    handle.on_step = None
    assert torch.equal(latents(qwen_pipe), expected)


# At the same time


@pytest.mark.parametrize(("backend", "both"), in_turn(CONFIGS, [True, False]))
def test_two_threads_on_one_transformer(qwen_pipe, backend, both):
    """Each has a pipeline and a scheduler of its own; one is cached, or both are."""
    other = sibling(qwen_pipe, own_scheduler=True)
    handles = [omni_kernels.patch(pipe, backend, CONFIGS[backend]) for pipe in (qwen_pipe, other)[: 1 + both]]
    alone = latents(qwen_pipe), latents(other, seed=1, prompt="a dog on a mat")
    for _ in range(2):
        made = in_two_threads(
            lambda: latents(qwen_pipe), lambda: latents(other, seed=1, prompt="a dog on a mat")
        )  # fmt: skip
        for one, expected in zip(made, alone, strict=True):
            assert torch.equal(one, expected)
    for handle in handles:
        assert handle.report.complete
        handle.undo()


def test_two_threads_on_one_omni_take_turns(z_pipe):
    z_pipe.set_progress_bar_config(disable=True)
    with Omni(z_pipe, cache_backend="first_block_cache", cache_config={"threshold": 0.2}) as omni:

        def several(seeds):
            return [
                omni.generate("a cat", seed=seed, height=64, width=64, num_inference_steps=4, output_type="latent")[0]
                for seed in seeds
            ]

        alone = several(range(4))
        made = in_two_threads(lambda: several([0, 2]), lambda: several([1, 3]))
    for results, seeds in zip(made, ([0, 2], [1, 3]), strict=True):
        for result, seed in zip(results, seeds, strict=True):
            assert torch.equal(result.images, alone[seed].images)
            assert result.cache.to_dict()["branches"] == alone[seed].cache.to_dict()["branches"]


def test_patching_waits_for_a_sampling_under_way_on_the_same_transformer(qwen_pipe):
    other = sibling(qwen_pipe, own_scheduler=True)
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", CONFIGS["first_block_cache"])
    patched = threading.Event()

    def patch():
        omni_kernels.patch(other, "first_block_cache", CONFIGS["first_block_cache"])
        patched.set()

    thread = threading.Thread(target=patch)
    with handle.sampling():
        thread.start()
        assert not patched.wait(0.3)
    thread.join()
    assert patched.is_set()
    for pipe in (qwen_pipe, other):
        omni_kernels.unpatch(pipe)
    assert qwen_pipe.transformer._compiled_call_impl is None
    assert type(qwen_pipe.transformer.transformer_blocks) is torch.nn.ModuleList


def test_omni_that_is_closed_from_on_step_still_gives_the_picture(qwen_pipe):
    omni = Omni(qwen_pipe, cache_backend="velocity_cache", cache_config={"budget": 2})
    arguments = {"seed": 0, "num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
    (result,) = omni.generate("a cat", on_step=lambda event: omni.close(), **arguments)
    assert torch.isfinite(result.images).all()
    assert type(qwen_pipe) is diffusers.QwenImagePipeline


# Copies


def test_omni_is_copied_and_pickled_by_what_it_was_made_with(qwen_pipe, saved):
    arguments = {"seed": 0, "num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
    cache = {"cache_backend": "velocity_cache", "cache_config": {"budget": 2}}
    given, named = Omni(qwen_pipe, **cache), Omni(str(saved["qwen_image"]), **cache)
    copies = (given, copy.deepcopy(given)), (named, copy.deepcopy(named)), (named, pickle.loads(pickle.dumps(named)))
    for omni, made in copies:
        (expected,) = omni.generate("a cat", **arguments)
        (result,) = made.generate("a cat", **arguments)
        assert made.pipe is not omni.pipe
        assert torch.equal(result.images, expected.images)
        assert result.cache.forwards == expected.cache.forwards


def test_omni_that_has_not_loaded_is_pickled_without_weights():
    made = pickle.loads(pickle.dumps(Omni("emoji-qwen-image", cache_backend=None, dtype="bf16")))
    assert made._pipe is None
    assert (made.name, made.cache_backend) == ("emoji-qwen-image", None)
