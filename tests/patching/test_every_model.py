"""What others do to a pipeline before its blocks are fused and after, asked of every model alike.

Caches of diffusers and of the cache-dit library, adapters, attention backends, group offload, compiled blocks.
"""

import contextlib
import functools
import itertools
import logging
import sys

import cache_dit
import diffusers
import peft
import pytest
import torch
from fused import off
from models import MODELS, latents
from pairs import in_turn
from torch.utils.checkpoint import checkpoint

import omni_kernels
from omni_kernels.patching.changes import Forward

CPU = torch.device("cpu")


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture(params=[True, False], ids=["patched first", "patched last"])
def patch_first(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def quiet_library():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def patch(pipe, model, **how):
    handle = omni_kernels.patch(pipe, **how)
    assert len(handle.fused.replaced) == model.blocks
    assert handle.fused.left_alone == {}
    return handle


def nothing_of_ours_is_left(pipe):
    return not any(
        isinstance(value, Forward) or key.startswith("_omni")
        for module in pipe.transformer.modules()
        for key, value in vars(module).items()
    )


# Caches


class Diffusers:
    def __init__(self, pipe):
        self.pipe = pipe
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.3))

    def remove(self):
        self.pipe.transformer.disable_cache()


class Library:
    def __init__(self, pipe):
        self.pipe = pipe
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.5, max_warmup_steps=2
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    def remove(self):
        cache_dit.disable_cache(self.pipe)


request_of_six = functools.partial(latents, num_inference_steps=6)


@functools.cache
def unfused_under(cache, name):
    """Latents without a cache, and under it."""
    pipe = MODELS[name].build()
    plain = request_of_six(pipe)
    cache(pipe)
    return plain, request_of_six(pipe)


# Z-Image's transformer has no cache of diffusers', and FLUX.2's fails under it, fused or not.
CACHED = [(Diffusers, name) for name in MODELS if name not in ("z_image", "flux_2")]
CACHED += [(Library, name) for name in MODELS]


@pytest.mark.parametrize(
    ("cached", "order"),
    in_turn(CACHED, itertools.product(["patched first", "patched last"], ["undone first", "undone last"])),
)
def test_users_own_cache_comes_and_goes_in_any_order(cached, order):
    (cache, name), patch_first, ours_goes_first = cached, order[0] == "patched first", order[1] == "undone first"
    model, (plain, expected) = MODELS[name], unfused_under(cache, name)
    assert off(expected, plain) > 1e-3, "steps are skipped"
    pipe = model.build()
    if patch_first:
        handle, theirs = patch(pipe, model), cache(pipe)
    else:
        theirs, handle = cache(pipe), patch(pipe, model)
    with model.all_fused():
        assert off(request_of_six(pipe), expected) < 1e-5
    if ours_goes_first:
        handle.undo()
        assert nothing_of_ours_is_left(pipe)
        assert torch.equal(request_of_six(pipe), expected)
        theirs.remove()
    else:
        theirs.remove()
        with model.all_fused():
            assert off(request_of_six(pipe), plain) < 1e-5
        handle.undo()
    assert nothing_of_ours_is_left(pipe)
    assert torch.equal(request_of_six(pipe), plain)


# Adapters


def test_adapter_counts_loaded_fused_and_unloaded(model, patch_first):
    other = model.build()
    without = latents(other)
    model.add_lora(other)
    expected = latents(other)
    assert off(expected, without) > 1e-2
    pipe = model.build()
    for step in (patch, lambda pipe, model: model.add_lora(pipe))[:: 1 if patch_first else -1]:
        step(pipe, model)
    with model.all_fused():
        assert off(latents(pipe), expected) < 1e-5
        pipe.fuse_lora()
        assert off(latents(pipe), expected) < 1e-4
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert off(latents(pipe), without) < 1e-4
    omni_kernels.unpatch(pipe)
    assert nothing_of_ours_is_left(pipe)


@pytest.fixture
def lora_file(model, tmp_path):
    """As `load_lora_weights` takes it."""
    pipe = model.build()
    model.add_lora(pipe)
    weights = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="lora")
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=weights)
    return latents(pipe), tmp_path


def test_adapter_from_a_file_counts_loaded_and_fused(model, lora_file, patch_first):
    expected, directory = lora_file
    pipe = model.build()
    without = latents(pipe)
    if patch_first:
        patch(pipe, model)
    pipe.load_lora_weights(directory)
    if not patch_first:
        patch(pipe, model)
    with model.all_fused():
        assert off(latents(pipe), expected) < 1e-5
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert off(latents(pipe), expected) < 1e-4, "in the weights themselves"
        assert off(latents(pipe), without) > 1e-2


@pytest.mark.parametrize(  # of every model that it is heard: test_adapter_counts_loaded_fused_and_unloaded
    "model",
    [pytest.param(name, marks=() if name in ("qwen_image", "wan") else pytest.mark.long) for name in MODELS],
    indirect=True,
)
def test_adapter_that_is_loaded_into_compiled_blocks_counts(model, lora_file):
    _, directory = lora_file
    pipe, other = model.build(), model.build()
    other.load_lora_weights(directory)
    without, expected = latents(pipe), latents(other)
    handle = patch(pipe, model, compile={"backend": "eager"})
    assert len(handle.compiled) == model.blocks
    assert off(latents(pipe), without) < 1e-5
    pipe.load_lora_weights(directory)
    with model.all_fused():
        assert off(latents(pipe), expected) < 1e-5
    handle.undo()
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), without)


# Gradients


def gradients(model, pipe, wrapped):
    """What comes out of a transformer whose blocks are called through `wrapped`, and the gradients of its weights."""
    transformer = pipe.transformer
    calls = []

    def note(module, args, kwargs):
        calls.append((args, kwargs))

    with transformer.register_forward_pre_hook(note, with_kwargs=True), torch.no_grad():
        latents(pipe)
    args, kwargs = calls[0]
    transformer.zero_grad()
    with contextlib.ExitStack() as stack:
        for block in model.blocks_of(pipe):
            stack.enter_context(wrapped(block))
        output = transformer(*args, **kwargs)[0]
    output = torch.stack(output) if isinstance(output, list) else output
    output.square().mean().backward()
    # What has no gradient, and what has a gradient of 0, learns nothing.
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in transformer.parameters()]
    return output.detach(), found


class Checkpointed(contextlib.AbstractContextManager):
    """While open, a block keeps nothing for the backward pass, and runs again in it."""

    def __init__(self, block, reentrant):
        self.block, self.reentrant = block, reentrant

    def __enter__(self):
        call = self.block._call_impl

        def run(*args, **kwargs):
            def by_place(*values):  # in which alone one kind of checkpointing sees tensors
                return call(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

            return checkpoint(by_place, *args, *kwargs.values(), use_reentrant=self.reentrant)

        vars(self.block)["_call_impl"] = run

    def __exit__(self, *of_an_error):
        del self.block._call_impl


KEPT = {
    "kept": contextlib.nullcontext,
    "run again": functools.partial(Checkpointed, reentrant=False),
    "run again, without gradients first": functools.partial(Checkpointed, reentrant=True),
}


@pytest.mark.parametrize("how", KEPT)
def test_gradients_through_fused_blocks_are_the_blocks_own(model, how):
    pipe = model.build()
    output, expected = gradients(model, pipe, contextlib.nullcontext)
    assert sum(bool(gradient.any()) for gradient in expected) > 10 * model.blocks
    patch(pipe, model)
    result, found = gradients(model, pipe, KEPT[how])
    assert off(result, output) < 1e-5
    for now, then in zip(found, expected, strict=True):
        assert torch.allclose(now, then, rtol=1e-3, atol=1e-5 * then.abs().max().item() + 1e-8)


def test_without_weights_that_learn_nothing_is_asked_of_the_ops(model):
    """Gradients are recorded, and nothing requires one: a block's own forward, as it would with one."""
    pipe = model.build()
    pipe.transformer.requires_grad_(False)
    block = model.blocks_of(pipe)[-1]
    seen = []
    hook = block.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    latents(pipe)
    hook.remove()
    args, kwargs = seen[0]
    expected = block(*args, **kwargs)
    patch(pipe, model)
    result = block(*args, **kwargs)
    assert all(map(torch.equal, result, expected))
    with torch.inference_mode(), model.all_fused():
        assert off(torch.stack(list(block(*args, **kwargs)[-1])), torch.stack(list(expected[-1]))) < 1e-5


def test_derivatives_that_go_along_are_the_blocks_own(model):
    pipe = model.build()
    block = model.blocks_of(pipe)[-1]
    seen = []
    hook = block.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    pipe.transformer.set_attention_backend("_native_math")  # the other has no derivative of this kind
    latents(pipe)
    hook.remove()
    args, kwargs = seen[0]
    name = next((name for name in ("hidden_states", "x") if name in kwargs), None)

    def derivative():
        x = args[0] if name is None else kwargs[name]

        def run(x):
            given = (x, *args[1:]) if name is None else args
            output = block(*given, **(kwargs if name is None else kwargs | {name: x}))
            return next(t for t in ([output] if isinstance(output, torch.Tensor) else output) if t.shape == x.shape)

        with torch.no_grad():
            return torch.func.jvp(run, (x,), (torch.ones_like(x),))

    expected = derivative()
    assert expected[1].abs().max() > 0
    patch(pipe, model)
    assert all(map(torch.equal, derivative(), expected))


# Attention


def test_attention_backend_that_is_set_after_patching_counts(model, monkeypatch):
    backends = []
    for module in {sys.modules[cls.__module__] for cls in model.classes}:

        def recording(*tensors, dispatch=module.dispatch_attention_fn, **options):
            backends.append(options["backend"])
            return dispatch(*tensors, **options)

        monkeypatch.setattr(module, "dispatch_attention_fn", recording)
    pipe = model.build()
    expected = latents(pipe)
    assert set(backends) == {None}
    patch(pipe, model)
    backends.clear()
    pipe.transformer.set_attention_backend("_native_math")
    with model.all_fused():
        assert off(latents(pipe), expected) < 1e-5
    assert {backend.value for backend in backends} == {"_native_math"}


# Group offload and compiled blocks


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload_keeps_working(model, level, patch_first):
    pipe = model.build()
    expected = latents(pipe)
    if patch_first:
        patch(pipe, model)
    blocks_per_group = {"num_blocks_per_group": 2} if level == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=level, **blocks_per_group)
    if not patch_first:
        omni_kernels.patch(pipe)
    # Hooks on each layer, norms too, have to be heard.
    with model.all_fused() if level == "block_level" else contextlib.nullcontext():
        assert off(latents(pipe), expected) < 1e-5
    omni_kernels.unpatch(pipe)
    assert nothing_of_ours_is_left(pipe)
    assert torch.equal(latents(pipe), expected)


# The rest is asked in the models' own tests.
@pytest.mark.parametrize(
    ("name", "patch_first"),
    [
        ("z_image", True),
        pytest.param("z_image", False, marks=pytest.mark.long),
        ("flux", False),
        ("wan", False),
    ],
)
def test_compiled_blocks_are_fused_and_compiled_once(name, patch_first):
    model = MODELS[name]
    pipe = model.build()
    expected, graphs = latents(pipe), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if patch_first:
        patch(pipe, model)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    if not patch_first:
        patch(pipe, model)
    assert off(latents(pipe), expected) < 1e-5
    warm = len(graphs)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert off(latents(pipe), expected) < 1e-5
    assert len(graphs) == warm > 0
    for graph in graphs:
        assert any("omni_kernels" in str(node.target) for node in graph.graph.nodes)
    omni_kernels.unpatch(pipe)
    assert torch.equal(latents(pipe), expected)
