"""What others do to a pipeline before its blocks are fused and after, asked of every model alike.

Caches of diffusers and of the cache-dit library, adapters, attention backends, group offload, compiled blocks.
"""

import contextlib
import functools
import logging
import sys

import cache_dit
import diffusers
import peft
import pytest
import torch
from fused import off
from models import MODELS, latents

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


# Z-Image's transformer has no cache of diffusers'.
CACHED = [(Diffusers, name) for name in MODELS if name != "z_image"] + [(Library, name) for name in MODELS]


@pytest.mark.parametrize("ours_goes_first", [True, False])
@pytest.mark.parametrize(("cache", "name"), CACHED)
def test_users_own_cache_comes_and_goes_in_any_order(cache, name, patch_first, ours_goes_first):
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
    ("name", "patch_first"), [("z_image", True), ("z_image", False), ("flux", False), ("wan", False)]
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
