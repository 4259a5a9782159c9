"""What a block begins of the next: taken where the next is called with just that, and nowhere else."""

import copy

import pytest
import tiny
import torch

import omni_kernels
from omni_kernels.patching import ahead

CACHES = {
    "first_block_cache": {"threshold": 0.4},
    "cache_dit": {"max_warmup_steps": 2, "Bn_compute_blocks": 1, "residual_diff_threshold": 0.5},
    "tea_cache": {"rel_l1_thresh": 0.3, "coefficients": [0, 0, 0, 1, 0]},
}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 4} | arguments)


def off(now, expected):
    return ((now - expected).norm() / expected.norm()).item()


@pytest.fixture
def taken(monkeypatch):
    """What each block's `take` found, by the block."""
    found = []
    original = ahead.take

    def take(states, block, given):
        made = original(states, block, given)
        found.append((block, made is not None))
        return made

    monkeypatch.setattr(ahead, "take", take)
    return found


def share(found):
    return sum(hit for _, hit in found) / len(found)


@pytest.mark.parametrize("build", [tiny.qwen_image, tiny.qwen_image_edit], ids=["image", "edit"])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_every_block_but_the_first_finds_its_beginning(build, zero_cond_t, taken):
    pipe = build(zero_cond_t=zero_cond_t)
    expected = latents(pipe)
    with omni_kernels.patched(pipe):
        assert off(latents(pipe), expected) < 1e-5
    first = pipe.transformer.transformer_blocks[0]
    assert all(hit == (block is not first) for block, hit in taken)
    assert len(taken) == 4 * 2 * 4 * 2  # blocks, streams, steps, branches


@pytest.mark.parametrize("backend", CACHES)
def test_under_a_cache(qwen_pipe, backend, taken):
    with omni_kernels.patched(qwen_pipe, backend, CACHES[backend]) as handle:
        expected, skipped = latents(qwen_pipe, num_inference_steps=8), handle.report.forwards_saved
    with omni_kernels.patched(qwen_pipe, backend, CACHES[backend], fuse=True) as handle:
        assert off(latents(qwen_pipe, num_inference_steps=8), expected) < 1e-4
        assert handle.report.forwards_saved == skipped > 0
    assert 0.2 < share(taken) < 1.0, "a skipped stretch is not begun by the block before it"


def test_whoever_works_between_blocks_is_heard(qwen_pipe, taken):
    def doubled(module, args, output):
        return output[0], output[1] * 2

    hook = qwen_pipe.transformer.transformer_blocks[1].register_forward_hook(doubled)
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe):
        assert off(latents(qwen_pipe), expected) < 1e-5
    hook.remove()
    second, third = qwen_pipe.transformer.transformer_blocks[1:3]
    assert not any(hit for block, hit in taken if block is second), "nothing is made ahead for a hooked block"
    assert {hit for block, hit in taken if block is third} == {True, False}, "the text's is, the image's was exchanged"


def test_a_change_in_place_is_heard(qwen_pipe, taken):
    def tilted(module, args, output):
        tilt = torch.linspace(-1, 1, output[1].shape[-1])  # which a LayerNorm sees, unlike a factor
        output[1].add_(tilt * output[1].abs().mean())

    plain = latents(qwen_pipe)
    hook = qwen_pipe.transformer.transformer_blocks[1].register_forward_hook(tilted)
    expected = latents(qwen_pipe)
    assert off(plain, expected) > 1e-2
    with omni_kernels.patched(qwen_pipe):
        assert off(latents(qwen_pipe), expected) < 1e-5
    hook.remove()
    third = qwen_pipe.transformer.transformer_blocks[2]
    assert {hit for block, hit in taken if block is third} == {True, False}, "the text's is, the image's was changed"


def test_hooks_on_the_modulation_are_called_in_their_turn(qwen_pipe, taken):
    order = []
    for i, block in enumerate(qwen_pipe.transformer.transformer_blocks):
        block.img_mod[1].register_forward_hook(lambda *of_it, i=i: order.append(i))
    with omni_kernels.patched(qwen_pipe):
        latents(qwen_pipe, num_inference_steps=1, negative_prompt=None)
    assert order == [0, 1, 2, 3]
    assert sum(hit for _, hit in taken) == 3, "the text's"


def test_another_order_of_blocks_is_heard(qwen_pipe):
    blocks = qwen_pipe.transformer.transformer_blocks
    with omni_kernels.patched(qwen_pipe):
        blocks[1], blocks[2] = blocks[2], blocks[1]
        found = latents(qwen_pipe)
    assert off(found, latents(qwen_pipe)) < 1e-5


def test_a_block_whose_successor_is_undecided_begins_none(qwen_pipe, taken):
    expected = latents(qwen_pipe)
    first, second, third, fourth = qwen_pipe.transformer.transformer_blocks
    own = dict(vars(first))
    with omni_kernels.patched(qwen_pipe):
        installed = dict(vars(first))
        with ahead.Apart(first), ahead.Apart(first):
            assert off(latents(qwen_pipe), expected) < 1e-5
        assert dict(vars(first)) == installed, "no mark is left"
    assert dict(vars(first)) == own
    hits = {block: {hit for of, hit in taken if of is block} for block in (first, second, third, fourth)}
    assert hits == {first: {False}, second: {False}, third: {True}, fourth: {True}}


def test_a_call_apart_that_fails_leaves_no_mark(qwen_pipe):
    block = qwen_pipe.transformer.transformer_blocks[0]
    with omni_kernels.patched(qwen_pipe):
        installed = dict(vars(block))
        with pytest.raises(TypeError), ahead.Apart(block):
            block()
        assert dict(vars(block)) == installed


def test_compiled_blocks_begin_themselves(qwen_pipe, monkeypatch):
    torch._dynamo.reset()
    left = []
    monkeypatch.setattr(ahead, "leave", lambda *what: left.append(what))
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, fuse=True, compile={"backend": "eager"}):
        assert off(latents(qwen_pipe), expected) < 1e-5
    assert not left


def test_inference_mode_counts_no_changes(qwen_pipe, taken):
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe), torch.inference_mode():
        assert off(latents(qwen_pipe), expected) < 1e-5
    assert not any(hit for _, hit in taken)


def test_half_precision_is_clipped_first(taken):
    pipe = tiny.qwen_image().to(torch.float16)
    with omni_kernels.patched(pipe):
        assert torch.isfinite(latents(pipe)).all()
    assert not any(hit for _, hit in taken)


def test_copies_are_plain_and_undoing_leaves_nothing(qwen_pipe):
    before = [set(vars(block)) for block in qwen_pipe.transformer.transformer_blocks]
    with omni_kernels.patched(qwen_pipe):
        copied = copy.deepcopy(qwen_pipe.transformer)
        with torch.no_grad():
            assert all(ahead.next_of(block, torch.ones(1)) is None for block in copied.transformer_blocks)
    assert [set(vars(block)) for block in qwen_pipe.transformer.transformer_blocks] == before


@pytest.mark.parametrize("controlled", [False, True])
def test_a_cache_of_blocks_begins_no_block_that_it_may_skip(controlled, monkeypatch):
    """Also where a ControlNet adds to the states between blocks, which then run one by one."""
    pipe, begun = tiny.qwen_image(), []
    if controlled:
        residuals = {"controlnet_block_samples": [torch.zeros(1, 16, 64)]}
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | residuals), with_kwargs=True
        )
    leave = ahead.leave
    monkeypatch.setattr(ahead, "leave", lambda states, block, *made: begun.append(block) or leave(states, block, *made))
    blocks = list(pipe.transformer.transformer_blocks)
    with omni_kernels.patched(pipe, "first_block_cache", {"threshold": 1.0}, fuse=True) as handle:
        tiny.generate(pipe, output_type="latent", num_inference_steps=1)  # its blocks are found, and all run
        begun.clear()
        tiny.generate(pipe, output_type="latent", num_inference_steps=4)
    assert handle.report.forwards_saved > 0
    assert blocks[1] not in begun
    assert begun.count(blocks[2]) == 2 * handle.report.forwards, "both streams, where the site was computed"


def test_a_cache_whose_site_begins_later_leaves_what_comes_before_to_begin_ahead(taken):
    pipe = tiny.qwen_image()
    first, second, third, fourth = pipe.transformer.transformer_blocks
    config = {"Fn_compute_blocks": 3, "residual_diff_threshold": 1.0, "max_warmup_steps": 1}
    with omni_kernels.patched(pipe, "cache_dit", config, fuse=True) as handle:
        tiny.generate(pipe, num_inference_steps=1)  # its blocks are found, and all run
        taken.clear()
        tiny.generate(pipe, num_inference_steps=4)
    assert handle.report.blocks_run < handle.report.blocks_total
    hits = {block: {hit for of, hit in taken if of is block} for block in (first, second, third, fourth)}
    assert hits == {first: {False}, second: {True}, third: {True}, fourth: {False}}
