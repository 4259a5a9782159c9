"""What is computed once: the same bits, for the pipeline's own calls and nobody else's, and never past its request."""

import copy
import functools
import gc
import weakref
from collections import Counter

import peft
import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from test_graphs import Tape

import omni_kernels
from omni_kernels.patching import PatchConflictError
from omni_kernels.patching.graphs import Graphs
from omni_runtime import Omni

STEPS, LAYERS = 4, 4
CACHES = {
    "tea_cache": {"rel_l1_thresh": 0.3, "coefficients": [0, 0, 0, 1, 0]},
    "cache_dit": {"max_warmup_steps": 2, "Bn_compute_blocks": 1, "residual_diff_threshold": 0.5},
    "velocity_cache": {"budget": 5},
}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": STEPS} | arguments)


@pytest.fixture
def products(monkeypatch):
    """How often each linear layer ran."""
    ran = Counter()
    forward = torch.nn.Linear.forward

    def counted(module, x):
        ran[module] += 1
        return forward(module, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    return ran


def modulations(transformer):
    return [linear[1] for block in transformer.transformer_blocks for linear in (block.img_mod, block.txt_mod)]


# Qwen-Image


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize(
    "build",
    [tiny.qwen_image, tiny.qwen_image_edit, functools.partial(tiny.qwen_image_edit, plus=True)],
    ids=["image", "edit", "edit plus"],
)
def test_a_step_is_modulated_once_for_both_branches(build, zero_cond_t, fuse, products):
    pipe = build(zero_cond_t=zero_cond_t)
    with omni_kernels.patched(pipe, fuse=fuse):
        expected = latents(pipe)
    linears = modulations(pipe.transformer)
    assert {products[linear] for linear in linears} == {2 * STEPS}
    products.clear()
    with omni_kernels.patched(pipe, fuse=fuse, reuse=True) as handle:
        assert torch.equal(latents(pipe), expected)
        assert {products[linear] for linear in linears} == {STEPS}
        assert torch.equal(latents(pipe), expected), "the next request"
        assert not torch.equal(latents(pipe, seed=1), expected)
    assert handle.reused.names == ["transformer: a timestep's modulation"]
    assert handle.reused.taken == 3 * STEPS * (2 * LAYERS + 1)
    assert torch.equal(latents(pipe), latents(pipe))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("backend", CACHES)
def test_under_a_cache(qwen_pipe, backend, fuse):
    def run(**how):
        with omni_kernels.patched(qwen_pipe, backend, CACHES[backend], fuse=fuse, **how) as handle:
            return latents(qwen_pipe, num_inference_steps=8), handle.report.forwards_saved, handle

    expected, skipped, _ = run()
    found, saved, handle = run(reuse=True)
    assert torch.equal(found, expected)
    assert saved == skipped > 0
    assert handle.reused.taken > 0


def test_a_request_that_broke_leaves_nothing(qwen_pipe):
    """In the second branch of a step, which the first has made a modulation for."""
    expected = latents(qwen_pipe, seed=1)
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False):
        calls = 0

        def fails(module, args):
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt

        hook = qwen_pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fails)
        with pytest.raises(KeyboardInterrupt):
            latents(qwen_pipe)
        hook.remove()
        assert torch.equal(latents(qwen_pipe, seed=1), expected)


def test_calls_that_are_not_the_pipelines_compute(qwen_pipe):
    """Outside a request, and from a callback, the same latents at other timesteps."""
    transformer = qwen_pipe.transformer
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }

    @torch.no_grad()
    def at(timestep):
        return transformer(timestep=torch.tensor([timestep]), **given)[0]

    expected = [at(0.3), at(0.7)]
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.extend((at(0.3), at(0.7)))
        return {}

    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False) as handle:
        assert torch.equal(at(0.3), expected[0])
        assert torch.equal(at(0.7), expected[1])
        assert handle.reused.taken == 0
        latents(qwen_pipe, callback_on_step_end=callback)
    assert len(seen) == 2 * STEPS
    assert all(torch.equal(found, expected[number % 2]) for number, found in enumerate(seen))


def test_another_pipelines_calls_of_the_same_transformer_compute(qwen_pipe):
    """Even where this one's request broke, and it still believes that it is at a step."""
    other = type(qwen_pipe)(**qwen_pipe.components | {"scheduler": copy.deepcopy(qwen_pipe.scheduler)})
    expected = latents(other, seed=3)
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False):
        hook = qwen_pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            latents(qwen_pipe)
        hook.remove()
        assert qwen_pipe._current_timestep is not None
        assert torch.equal(latents(other, seed=3), expected)


def test_what_was_written_to_in_place_is_computed_again(qwen_pipe):
    """By a hook on the block, which shifts the modulation of all later ones in the first branch alone."""
    calls = 0

    def shift(module, args, kwargs):
        nonlocal calls
        calls += 1
        if calls % 2:
            kwargs["temb"].add_(0.1)

    hook = qwen_pipe.transformer.transformer_blocks[2].register_forward_pre_hook(shift, with_kwargs=True)
    expected = latents(qwen_pipe)
    calls = 0
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False):
        assert torch.equal(latents(qwen_pipe), expected)
        hook.remove()
        modulation = qwen_pipe.transformer.transformer_blocks[0].img_mod
        embedding = torch.ones(1, modulation[1].in_features)
        with torch.no_grad():
            first = modulation(embedding)
            assert modulation(embedding) is first
            assert not torch.equal(modulation(embedding.add_(1)), first)
            assert modulation(embedding.clone()) is not modulation(embedding)


def test_adapters_and_hooks_on_a_modulation_count(qwen_pipe):
    def adapt(pipe):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            pipe.transformer.add_adapter(
                peft.LoraConfig(r=2, target_modules=["img_mod.1", "img_in"], init_lora_weights=False), "lora"
            )

    other = tiny.qwen_image()
    plain = latents(other)
    adapt(other)
    expected = latents(other)
    assert not torch.equal(expected, plain)
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False) as handle:
        adapt(qwen_pipe)
        assert torch.equal(latents(qwen_pipe), expected)
        assert handle.reused.taken == STEPS * (2 * LAYERS + 1)
        calls = []
        block = qwen_pipe.transformer.transformer_blocks[0]
        hook = block.txt_mod[1].register_forward_hook(lambda module, args, output: calls.append(1))
        assert torch.equal(latents(qwen_pipe), expected)
        hook.remove()
        assert len(calls) == 2 * STEPS, "a hooked part is called each time"


def test_blocks_that_are_compiled_later_compute_as_ever(qwen_pipe):
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False) as handle:
        torch._dynamo.reset()
        qwen_pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(latents(qwen_pipe), expected)
        assert handle.reused.taken == STEPS, "the embedding alone, which is outside of the blocks"
    torch._dynamo.reset()


def test_a_forward_with_gradients_computes(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False) as handle, torch.enable_grad():
        modulation = qwen_pipe.transformer.transformer_blocks[0].img_mod
        embedding = torch.ones(1, modulation[1].in_features)
        assert modulation(embedding) is not modulation(embedding)
        assert handle.reused.taken == 0


def test_direct_calls_after_a_request_that_broke_compute(qwen_pipe):
    """The pipeline still believes that it is at the step; it is nobody's step any more."""
    transformer = qwen_pipe.transformer
    given = {
        "hidden_states": torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }

    @torch.no_grad()
    def at(timestep):
        return transformer(timestep=torch.tensor([timestep]), **given)[0]

    expected = [at(0.3), at(0.7)]
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False):
        hook = transformer.norm_out.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            latents(qwen_pipe)
        hook.remove()
        assert qwen_pipe._current_timestep is not None
        assert torch.equal(at(0.3), expected[0])
        assert torch.equal(at(0.7), expected[1])


@pytest.mark.parametrize("reuse_first", [True, False])
def test_blocks_that_another_pipeline_records_are_left_alone(qwen_pipe, reuse_first):
    other = type(qwen_pipe)(**qwen_pipe.components)
    hows = [{"reuse": True, "fuse": False}, {"graphs": Graphs(Tape(), "cpu"), "fuse": False}]
    first, second = hows if reuse_first else hows[::-1]
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, **first), omni_kernels.patched(other, **second) as handle:
        assert torch.equal(latents(other), expected)
        assert torch.equal(latents(qwen_pipe), expected)
        if reuse_first:
            assert not handle.graphs.recorded
            assert "forward is patched" in str(handle.graphs)
        else:
            assert handle.reused.names == []
            assert "through another pipeline" in str(handle.reused)
            assert not any("forward" in vars(module) for module in other.transformer.modules())


def test_calls_by_name_compute(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False), torch.no_grad():
        transformer = qwen_pipe.transformer
        latent, embedding = (
            torch.ones(1, 16, 64),
            torch.ones(1, transformer.transformer_blocks[0].img_mod[1].in_features),
        )
        states = transformer.img_in(input=latent)
        assert torch.equal(states, transformer.img_in(latent))
        modulation = transformer.transformer_blocks[0].img_mod
        assert torch.equal(modulation(input=embedding), modulation(embedding))
        named = transformer.time_text_embed(timestep=torch.tensor([0.5]), hidden_states=states)
        assert torch.equal(named, transformer.time_text_embed(torch.tensor([0.5]), states, None))


# Z-Image


@pytest.mark.parametrize("fuse", [False, True])
def test_a_caption_is_refined_once_a_request(fuse, products):
    pipe = tiny.z_image(refiners=2)
    with omni_kernels.patched(pipe, fuse=fuse):
        expected, other = latents(pipe), latents(pipe, prompt="a dog, running")
    refiner = [layer.attention.to_q for layer in pipe.transformer.context_refiner]
    assert [products[linear] for linear in refiner] == [2 * STEPS] * 2
    products.clear()
    with omni_kernels.patched(pipe, fuse=fuse, reuse=True) as handle:
        assert torch.equal(latents(pipe), expected)
        assert [products[linear] for linear in refiner] == [1, 1]
        assert torch.equal(latents(pipe, prompt="a dog, running"), other)
        assert torch.equal(latents(pipe), expected)
    assert [products[linear] for linear in refiner] == [3, 3]
    assert handle.reused.names == ["transformer: a request's refined caption"]
    assert handle.reused.taken == 3 * (STEPS - 1)


def test_weights_changed_between_requests_count(z_pipe):
    """With the very tensors of text that the last request had."""
    with torch.no_grad():
        positive, negative = z_pipe.encode_prompt("a cat", device="cpu")
    given = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    weight = z_pipe.transformer.context_refiner[0].attention.to_v.weight
    before, half = latents(z_pipe, **given), weight.detach() / 2
    with omni_kernels.patched(z_pipe, reuse=True, fuse=False):
        assert torch.equal(latents(z_pipe, **given), before)
        weight.data = half
        changed = latents(z_pipe, **given)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, latents(z_pipe, **given))


def test_a_refiner_that_is_hooked_runs_each_time(z_pipe):
    calls = []
    expected = latents(z_pipe)
    with omni_kernels.patched(z_pipe, reuse=True, fuse=False) as handle:
        layer = z_pipe.transformer.context_refiner[-1]
        hook = layer.register_forward_hook(lambda module, args, output: calls.append(1))
        assert torch.equal(latents(z_pipe), expected)
        hook.remove()
    assert len(calls) == STEPS
    assert handle.reused.taken == 0


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("hook", ["accelerate", "replaced"])
def test_a_refiner_whose_forward_was_replaced_runs_each_time(z_pipe, hook, fuse):
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    layer = z_pipe.transformer.context_refiner[-1]
    with omni_kernels.patched(z_pipe, reuse=True, fuse=fuse) as handle:
        if hook == "accelerate":
            add_hook_to_module(layer, Counting())
        else:
            own = layer.forward
            layer.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
        latents(z_pipe)
        if hook == "accelerate":
            remove_hook_from_module(layer)
        else:
            layer.forward = own
            if not fuse:
                del layer.forward
    assert len(calls) == STEPS
    assert handle.reused.taken == 0


def test_the_transformers_own_calls_refine(z_pipe):
    """Of the same caption, with other weights: there is no request."""
    transformer = z_pipe.transformer
    with torch.no_grad():
        (caption,), _ = z_pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)
        image = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))

        def output():
            return transformer([image], torch.tensor([0.5]), [caption], return_dict=False)[0][0]

        with omni_kernels.patched(z_pipe, reuse=True, fuse=False):
            before = output()
            transformer.context_refiner[0].attention.to_v.weight.mul_(0.5)
            assert not torch.equal(output(), before)


def test_inference_mode_computes(z_pipe):
    """Nobody counts there what is written in place; the layers run one by one as ever."""
    expected = latents(z_pipe)
    with omni_kernels.patched(z_pipe, reuse=True, fuse=False) as handle, torch.inference_mode():
        assert torch.equal(latents(z_pipe), expected)
    assert handle.reused.taken == 0


# The patch


def test_what_is_kept_goes_with_the_patch(qwen_pipe):
    kept = []

    def note(module, args, output):
        kept.append(weakref.ref(output))

    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False):
        hook = qwen_pipe.transformer.time_text_embed.register_forward_hook(note)
        qwen_pipe.transformer.transformer_blocks[0].img_mod.register_forward_hook(note)
        latents(qwen_pipe)
        hook.remove()
        gc.collect()
        assert 0 < sum(ref() is not None for ref in kept) < len(kept)
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_where_nothing_can_be_reused_it_is_said():
    class Own(type(tiny.qwen_image())):
        """Whose steps nobody knows."""

    with omni_kernels.patched(tiny.flux(), reuse=True) as handle:
        assert str(handle.reused) == "nothing that could be reused"
    own = Own(**tiny.qwen_image().components)
    with omni_kernels.patched(own, reuse=True) as handle:
        assert "Own is not one of diffusers' own" in handle.reused.left_alone["transformer: a timestep's modulation"]


def test_two_patches_of_one_transformer(qwen_pipe):
    other = type(qwen_pipe)(**qwen_pipe.components)
    with omni_kernels.patched(qwen_pipe, reuse=True, fuse=False):
        with omni_kernels.patched(other, reuse=True, fuse=False) as handle:
            assert handle.reused.left_alone == {"transformer: a timestep's modulation": "patched already"}
        with pytest.raises(PatchConflictError, match="reuse=True: unpatch"):
            omni_kernels.patch(qwen_pipe, fuse=False)


@pytest.mark.parametrize("how", [{"graphs": True}, {"compile": "regional"}])
def test_not_with_blocks_that_are_taken_as_they_are(qwen_pipe, how):
    with pytest.raises(ValueError, match="reuse=True does not go with"):
        omni_kernels.patch(qwen_pipe, reuse=True, **how)
    with pytest.raises(ValueError, match="reuse=True does not go with"):
        Omni("no such model", reuse=True, **how)


def test_omni_says_what_it_reuses(qwen_pipe):
    with Omni(qwen_pipe, cache_backend=None, reuse=True) as omni:
        (made,) = omni.generate("a cat", negative_prompt=" ", seed=0, height=64, width=64, num_inference_steps=2)
    assert made.settings["reused"] == "transformer: a timestep's modulation: once"
