"""Batches: every image is as well off as alone, because the worst one decides."""

import itertools
import math

import pytest
import tiny
import torch

import omni_kernels
from omni_runtime.cache.signals import ModulatedInput

STEPS = 8
SEEDS = [0, 1, 2]


def latents(pipe, seeds, **arguments):
    """One sample for each seed, of one prompt, in one batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {"num_images_per_prompt": len(seeds), "num_inference_steps": STEPS, **arguments}
    return tiny.generate(pipe, generator=generators, output_type="latent", **arguments)


def per_image(now, then, images):
    """Relative L1 distance of each image, in float64; of guidance in one batch, sample i is image i mod images's."""
    difference, magnitude = (x.double().abs().flatten(1).sum(1) for x in (now - then, then))
    return (difference.view(-1, images).sum(0) / magnitude.view(-1, images).sum(0)).tolist()


def first_block_residuals(block, call):
    """What `block` adds to the hidden states, for each of its calls."""
    seen = []

    def hook(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((output[1] if isinstance(output, tuple) else output) - hidden)

    handle = block.register_forward_hook(hook, with_kwargs=True)
    call()
    handle.remove()
    return seen


def assert_the_worst_image_decided(residuals, decisions, threshold, images):
    last, spread = None, 0.0
    for residual, decision in zip(residuals, decisions, strict=True):
        if last is not None:
            distances = per_image(residual, last, images)
            assert decision.distance == pytest.approx(max(distances), rel=1e-4)
            assert decision.computed == (max(distances) >= threshold)
            each = per_image(residual, last, len(residual))
            spread = max(spread, max(each) / (sum(each) / len(each)))
        if decision.computed:
            last = residual
    assert spread > 1.02, "the samples differ, or this would be no test of which of them decides"
    assert {decision.computed for decision in decisions[1:]} == {True, False}


def test_every_skipped_step_has_every_images_own_distance_below_the_threshold(qwen_pipe):
    threshold = 0.15
    blocks = qwen_pipe.transformer.transformer_blocks
    with omni_kernels.patched(qwen_pipe, "first_block_cache", {"threshold": threshold}) as handle:
        residuals = first_block_residuals(blocks[0], lambda: latents(qwen_pipe, SEEDS))
        branches = handle.report.branches
    assert len(residuals[0]) == 3
    for index, name in enumerate(("cond", "uncond")):
        assert_the_worst_image_decided(residuals[index::2], branches[name].decisions, threshold, images=3)


@pytest.mark.parametrize("images", [1, 3])
def test_the_halves_of_guidance_in_one_batch_are_decided_as_one_image(z_pipe, images):
    threshold = 0.1
    with omni_kernels.patched(z_pipe, "first_block_cache", {"threshold": threshold}) as handle:
        residuals = first_block_residuals(z_pipe.transformer.layers[0], lambda: latents(z_pipe, SEEDS[:images]))
        (branch,) = handle.report.branches.values()
    assert len(residuals[0]) == 2 * images
    assert_the_worst_image_decided(residuals, branch.decisions, threshold, images)


def test_tea_cache_accumulates_for_each_sample_by_itself(qwen_pipe, monkeypatch):
    threshold, sums = 0.12, []
    original = ModulatedInput.observe

    def spy(*args):
        modulated, pair = original(*args)
        sums.append((pair.tolist(), modulated[0].numel()))
        return modulated, pair

    monkeypatch.setattr(ModulatedInput, "observe", spy)
    config = {"rel_l1_thresh": threshold, "coefficients": [0, 0, 0, 1, 0]}
    with omni_kernels.patched(qwen_pipe, "tea_cache", config) as handle:
        latents(qwen_pipe, SEEDS, negative_prompt=None)
        decisions = handle.report.branches["cond"].decisions
    assert len(sums) == STEPS
    own = [0.0] * len(SEEDS)
    for (pairs, elements), decision in itertools.islice(zip(sums, decisions, strict=True), 1, None):
        own = [total + n / (d + 1e-8 * elements) for total, (n, d) in zip(own, pairs, strict=True)]
        assert decision.accumulated == pytest.approx(max(own), rel=1e-9)
        assert decision.computed == (not max(own) < threshold)
        assert len({round(total, 6) for total in own}) == len(SEEDS)
        if decision.computed:
            own = [0.0] * len(SEEDS)
    assert 0 < handle.report.forwards_saved < STEPS - 1


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux"])
def test_with_the_same_decisions_a_batch_is_three_batches_of_one(name):
    pipe = tiny.PIPELINES[name]()
    config = {
        "steps_computation_mask": "11010011",
        "scm_steps_policy": "static",
        "max_warmup_steps": 0,
        "enable_taylorseer": True,
        "Bn_compute_blocks": 1,
    }
    with omni_kernels.patched(pipe, "cache_dit", config) as handle:
        together = latents(pipe, SEEDS)
        assert next(iter(handle.report.branches.values())).computed == [0, 1, 3, 6, 7]
        alone = torch.cat([latents(pipe, [seed]) for seed in SEEDS])
    assert (together[0] - together[1]).abs().max() > 0.1
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_no_sample_of_a_batch_is_skipped_where_it_would_be_computed_alone(qwen_pipe):
    """Up to the first step at which the batch computes and the sample alone would not."""
    with omni_kernels.patched(qwen_pipe, "first_block_cache", {"threshold": 0.12}) as handle:
        latents(qwen_pipe, SEEDS)
        together = handle.report.branches["cond"].decisions
        for seed in SEEDS:
            latents(qwen_pipe, [seed])
            for batch, sample in zip(together, handle.report.branches["cond"].decisions, strict=True):
                assert batch.computed or not sample.computed
                if batch.computed != sample.computed:
                    break


def test_one_sample_without_a_number_computes_the_batch(qwen_pipe):
    """A sample that has overflowed is no reason to skip, nor to stop."""
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 0.9})

    def overflow(pipe, step, timestep, tensors):
        if step == 1:
            tensors["latents"][1] = math.nan
        return tensors

    latents(qwen_pipe, SEEDS, callback_on_step_end=overflow)
    assert handle.report.branches["cond"].skipped == [1]
    assert handle.report.complete
