"""`quantize=`: linear layers of blocks in 8 bits, what is said of them, and what is put back."""

import copy
import importlib

import diffusers
import pytest
import tiny
import torch
from fused import off
from models import MODELS, latents

import omni_kernels
from omni_kernels import ops
from omni_kernels.device import Device, pretend
from omni_kernels.ops._quantized import MX, expanded
from omni_kernels.patching import PatchConflictError, activations, quantised, quantized_linear
from omni_kernels.patching.quantised import options_of
from omni_kernels.patching.quantized_linear import QuantizedLinear
from omni_runtime import Omni, embedded_pipeline

#: All layers of the tiny models are narrower than those that are quantised by default.
INT8 = {"dtype": "int8", "min_width": 0}
FP8 = {"dtype": "fp8", "min_width": 0}
MXFP8 = {"dtype": "mxfp8", "min_width": 0}


def linear(inputs=48, outputs=40, bias=True):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias)


def dequantized(x, dtype, limit):
    """x as 8 bits hold it, with a scale for each row, in fp64."""
    scale = x.double().abs().amax(-1, keepdim=True) / limit
    y = x.double() / scale
    return (y.round() if dtype == "int8" else y.float().to(torch.float8_e4m3fn).double()) * scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "dtype", "limit"), [("int8", torch.int8, 127), ("fp8", torch.float8_e4m3fn, 448)])
def test_a_layer_multiplies_what_8_bits_hold(name, dtype, limit, x_dtype, bias):
    layer = linear(bias=bias)
    made = QuantizedLinear(layer, dtype)
    x = torch.randn(2, 7, 48).to(x_dtype)
    x[0, 0], x[1, 1] = 0.0, x[1, 1] * 1000
    with torch.no_grad():
        y = made(x)
        exact = dequantized(x, name, limit).nan_to_num() @ dequantized(layer.weight, name, limit).T
        exact += 0 if layer.bias is None else layer.bias.double()
        assert (y.dtype, y.shape) == (x_dtype, (2, 7, 40))
        # Values in the middle between two of 8 bits may be rounded either way.
        assert off(y, exact) < (4e-3 if x_dtype == torch.bfloat16 or name == "fp8" else 1e-3)
        assert 1e-3 < off(y, layer(x.float())) < 0.1


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_in_mxfp8_multiplies_what_that_holds(x_dtype):
    layer = torch.nn.Linear(96, 32)
    made, x = QuantizedLinear(layer, MX), torch.randn(2, 7, 96).to(x_dtype)
    held = [expanded(*ops.quantize(one, MX)) for one in (x, layer.weight.detach())]
    with torch.no_grad():
        y = made(x)
        assert (y.dtype, y.shape, made.form) == (x_dtype, (2, 7, 32), MX)
        assert off(y, torch.nn.functional.linear(*held, layer.bias)) < (4e-3 if x_dtype == torch.bfloat16 else 1e-5)
        assert 1e-3 < off(y, layer(x.float())) < 0.1
        expected = y.clone()
        made.to(torch.bfloat16)
        assert made.weight_scale.dtype == MX
        made.bias.data = made.bias.data.to(torch.float32)
        assert off(made(x), expected) < 4e-3


def test_layers_whose_sizes_mxfp8_does_not_take_are_left():
    model = MODELS["qwen_image"]
    pipe = model.build(**model.options)
    block = pipe.transformer.transformer_blocks[0]
    block.attn.to_q = torch.nn.Linear(block.attn.to_q.in_features, 24)
    with omni_kernels.patched(pipe, quantize=MXFP8, fuse=False) as handle:
        left = handle.quantised.left_alone["transformer.transformer_blocks.0.attn.to_q"]
    assert left == "MXFP8 takes multiples of 32 input and 16 output features"


def test_a_spoilt_token_spoils_no_other():
    made, x = QuantizedLinear(linear(), torch.int8), torch.randn(1, 4, 48)
    with torch.no_grad():
        expected = made(x)
        x[0, 1, 3] = float("nan")
        y = made(x)
    assert y[0, 1].isnan().all()
    assert torch.equal(y[0, [0, 2, 3]], expected[0, [0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_conversions_and_moves_leave_8_bits(dtype):
    made = QuantizedLinear(linear(), dtype)
    weight, scale = made.weight.clone(), made.weight_scale.clone()
    made.to(torch.bfloat16)
    assert (made.weight.dtype, made.weight_scale.dtype, made.bias.dtype) == (dtype, torch.float32, torch.bfloat16)
    assert torch.equal(made.weight.float(), weight.float())
    assert torch.equal(made.weight_scale, scale)
    assert made.to("meta").weight.is_meta
    other = QuantizedLinear(linear(), dtype)
    other.load_state_dict(copy.deepcopy(other).state_dict())


def test_a_layer_is_compiled_without_graph_breaks():
    torch._dynamo.reset()
    made, x = QuantizedLinear(linear(), torch.int8), torch.randn(2, 7, 48)
    with torch.no_grad():
        assert torch.equal(torch.compile(made, backend="aot_eager", fullgraph=True)(x), made(x))


@pytest.mark.parametrize("how", [INT8, FP8, MXFP8], ids=["int8", "fp8", "mxfp8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_runs_in_8_bits_and_gets_its_weights_back(name, how):
    model = MODELS[name]
    pipe = model.build(**model.options)
    layers = {path: layer for path, layer in pipe.transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    plain = latents(pipe)
    handle = omni_kernels.patch(pipe, quantize=how, fuse=False)
    replaced = handle.quantised.replaced
    assert len(replaced) >= 2 * model.blocks
    for path in replaced:
        assert isinstance(pipe.transformer.get_submodule(path.removeprefix("transformer.")), QuantizedLinear)
    assert not [one for one in replaced if "norm" in one or "mod" in one]
    bits = latents(pipe)
    assert 1e-5 < off(bits, plain) < 0.2
    assert torch.equal(latents(pipe), bits)
    handle.undo()
    assert layers == {
        path: layer for path, layer in pipe.transformer.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("name", MODELS)
def test_fused_blocks_call_quantised_layers(name):
    model = MODELS[name]
    pipe = model.build(**model.options)
    with omni_kernels.patched(pipe, quantize=INT8, fuse=False):
        expected = latents(pipe)
    with omni_kernels.patched(pipe, quantize=INT8) as handle, model.all_fused():
        assert len(handle.fused.replaced) == model.blocks
        # What is up to rounding the same before it is quantised is so only to a step of 8 bits after.
        assert off(latents(pipe), expected) < 0.02


def test_fused_blocks_quantise_in_the_ops_they_have(qwen_pipe, monkeypatch):
    """Only attention's outputs are quantised by the layers themselves: two in each of the four blocks."""
    calls, quantize = [], quantized_linear.ops.quantize
    monkeypatch.setattr(quantized_linear.ops, "quantize", lambda x, dtype: calls.append(x.shape) or quantize(x, dtype))
    counts = {}
    for fuse in (False, True):
        with omni_kernels.patched(qwen_pipe, quantize=INT8 | {"include": ["img_mlp"]}, fuse=fuse):
            calls.clear()
            latents(qwen_pipe, num_inference_steps=3, true_cfg_scale=1.0)
            counts[fuse] = len(calls) / 3 / 4
    assert counts == {False: 12, True: 2}


def test_layers_that_stay_get_the_states_beside(qwen_pipe):
    """Of the three projections two are quantised; the third computes what it does without."""
    how = INT8 | {"exclude": ["attn.to_v", "add_q_proj"]}
    with omni_kernels.patched(qwen_pipe, quantize=how, fuse=False):
        expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, quantize=how) as handle:
        assert len(handle.fused.replaced) == 4
        assert off(latents(qwen_pipe), expected) < 0.02


def test_a_hook_on_a_quantised_layer_gets_a_tensor(qwen_pipe):
    seen = []
    with omni_kernels.patched(qwen_pipe, quantize=INT8):
        expected = latents(qwen_pipe)
        layer = qwen_pipe.transformer.transformer_blocks[1].attn.to_q
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
        assert off(latents(qwen_pipe), expected) < 0.02
        hook.remove()
    assert {*seen} == {torch.Tensor}


def test_a_hook_on_all_modules_gets_tensors(qwen_pipe):
    seen = set()
    with omni_kernels.patched(qwen_pipe, quantize=INT8):
        expected = latents(qwen_pipe)
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: seen.add(type(args[0])) if isinstance(module, QuantizedLinear) else None
        )
        try:
            assert off(latents(qwen_pipe), expected) < 0.02
        finally:
            hook.remove()
    assert seen == {torch.Tensor}


def test_a_layer_that_is_hooked_after_its_states_were_made_gets_what_they_hold():
    layer, x = QuantizedLinear(linear(), torch.int8), torch.randn(1, 4, 48)
    with torch.no_grad():
        states = activations.Quantized(*quantized_linear.ops.quantize(x), x.dtype)
        expected = layer(states)
        seen = []
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        assert off(activations.project(layer, states), expected) < 1e-5
    assert type(seen[0]) is torch.Tensor


@pytest.mark.parametrize("backend", ["first_block_cache", "velocity_cache", "tea_cache", "cache_dit"])
def test_caches_decide_and_skip_on_quantised_layers(backend, qwen_pipe):
    config = {"velocity_cache": {"budget": 4}, "cache_dit": {"residual_diff_threshold": 0.5}}
    config |= {"first_block_cache": {"threshold": 0.5}, "tea_cache": {"rel_l1_thresh": 0.5}}
    with omni_kernels.patched(qwen_pipe, quantize=INT8, fuse=False):
        full = latents(qwen_pipe, num_inference_steps=8)
    with omni_kernels.patched(qwen_pipe, backend, config[backend], quantize=INT8) as handle:
        cached = latents(qwen_pipe, num_inference_steps=8)
        assert handle.report.skipped
        assert off(cached, full) < 0.2
        assert torch.equal(latents(qwen_pipe, num_inference_steps=8), cached)


def test_what_was_done_is_told(qwen_pipe):
    how = INT8 | {"exclude": ["attn.to_q"], "include": ["img_mod.1"]}
    with omni_kernels.patched(qwen_pipe, quantize=how) as handle:
        left = handle.quantised.left_alone
        assert left["transformer.transformer_blocks.0.attn.to_q"] == "excluded"
        assert left["transformer.transformer_blocks.1.img_mlp.net.2"] == "known to hurt the picture in this model"
        assert left["transformer.transformer_blocks.0.txt_mod.1"] == "modulation, norms and embeddings stay as they are"
        assert "transformer.transformer_blocks.0.img_mod.1" in handle.quantised.replaced
        text = str(handle.quantised)
        assert "transformer.transformer_blocks.*.attn.to_q: 4 left alone: excluded" in text
        assert "transformer.transformer_blocks.*.attn.to_k: 4 quantised" in text
        weights = [qwen_pipe.transformer.get_submodule(path[12:]) for path in handle.quantised.replaced]
        assert handle.quantised.freed == sum(3 * one.weight.numel() - 4 * one.out_features for one in weights) > 0
        assert f"{len(weights)} layers quantised" in repr(handle)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("int4", ValueError, "quantize must be 'int8', 'fp8' or 'mxfp8', not 'int4'"),
        (True, ValueError, "quantize must be 'int8', 'fp8' or 'mxfp8', not True"),
        ({"dtype": "int8", "exlude": []}, ValueError, "quantize has no key 'exlude': did you mean 'exclude'"),
        ({"exclude": []}, ValueError, "quantize must be 'int8', 'fp8' or 'mxfp8', not None"),
        ({"dtype": "int8", "include": 3}, TypeError, "include must be a list of layers' names, not 3"),
        ({"dtype": "int8", "min_width": -1}, ValueError, "min_width must be a number of features from 0 on, not -1"),
        ({"dtype": "int8", "keep": "disk"}, ValueError, "keep must be 'host', 'reload' or 'none', not 'disk'"),
        (INT8 | {"exclude": ["attn.to_w"]}, ValueError, "no linear layer of a transformer block fits 'attn.to_w'"),
        ("int8", ValueError, "quantize='int8' has nothing to do on this QwenImagePipeline: .*narrower than 512"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(qwen_pipe, how, error, message):
    before = [*map(id, qwen_pipe.transformer.modules())]
    with pytest.raises(error, match=message):
        omni_kernels.patch(qwen_pipe, quantize=how)
    assert [*map(id, qwen_pipe.transformer.modules())] == before
    assert omni_kernels.patching.handle_of(qwen_pipe) is None


def test_a_cache_that_is_refused_leaves_the_own_weights(qwen_pipe):
    before = [*map(id, qwen_pipe.transformer.modules())]
    qwen_pipe.scheduler = diffusers.HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="Heun"):
        omni_kernels.patch(qwen_pipe, "velocity_cache", quantize=INT8 | {"keep": "none"})
    assert [*map(id, qwen_pipe.transformer.modules())] == before
    assert all(parameter.numel() for parameter in qwen_pipe.transformer.parameters())


def test_without_own_weights_there_is_no_way_back(qwen_pipe):
    layer = qwen_pipe.transformer.transformer_blocks[0].attn.to_q
    handle = omni_kernels.patch(qwen_pipe, quantize=INT8 | {"keep": "none"})
    assert layer.weight.numel() == 0
    latents(qwen_pipe)
    with pytest.raises(PatchConflictError, match="keep='none', so the layers' own weights are gone"):
        handle.undo()
    assert handle.active


def test_weights_are_read_again_from_the_models_files():
    pipe = embedded_pipeline("emoji-qwen-image")
    how = {"dtype": "int8", "min_width": 64, "keep": "reload"}
    before = {name: one.clone() for name, one in pipe.transformer.state_dict().items()}
    handle = omni_kernels.patch(pipe, quantize=how)
    layer = handle.quantised.replaced[0]
    assert "weight_scale" in dict(pipe.transformer.get_submodule(layer.partition(".")[2]).named_buffers())
    handle.undo()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())
    parameter = pipe.transformer.transformer_blocks[1].attn.to_q.weight
    parameter.data += 1e-3  # as fusing an adapter does
    with pytest.raises(ValueError, match=r"keep='reload' cannot put back .*\.1\.attn\.to_q: .* holds other weights"):
        omni_kernels.patch(pipe, quantize=how)
    assert all(one.numel() for one in pipe.transformer.parameters())
    assert not any(isinstance(one, QuantizedLinear) for one in pipe.transformer.modules())


def test_weights_that_are_in_no_file_cannot_be_read_again(qwen_pipe):
    with pytest.raises(ValueError, match=r"keep='reload' cannot put back .* holds no such weights"):
        omni_kernels.patch(qwen_pipe, quantize=INT8 | {"keep": "reload"})


def test_an_omni_without_own_weights_can_be_closed():
    how = {"dtype": "int8", "min_width": 64, "keep": "none"}
    with Omni("emoji-qwen-image", cache_backend=None, quantize=how) as omni:
        assert omni.generate("red apple", num_inference_steps=4, seed=0)[0].images
        assert not omni._handle.undoable


def test_another_quantisation_is_another_patch(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, quantize=INT8)
    assert omni_kernels.patch(qwen_pipe, quantize=dict(INT8)) is handle
    with pytest.raises(PatchConflictError, match="quantize='int8'"):
        omni_kernels.patch(qwen_pipe, quantize=FP8)
    handle.undo()


def test_an_adapter_keeps_its_layer(qwen_pipe):
    model = MODELS["qwen_image"]
    model.add_lora(qwen_pipe)
    plain = latents(qwen_pipe)
    with pytest.raises(ValueError, match="an adapter is on it"):
        omni_kernels.patch(qwen_pipe, quantize=INT8 | {"exclude": ["txt_mod", "add_v_proj"]})
    assert torch.equal(latents(qwen_pipe), plain)


def test_an_adapter_after_it_is_refused_by_name(qwen_pipe):
    with (
        omni_kernels.patched(qwen_pipe, quantize=INT8),
        pytest.raises(ValueError, match="Target module QuantizedLinear"),
    ):
        MODELS["qwen_image"].add_lora(qwen_pipe)


def test_a_hook_on_a_layer_keeps_it(qwen_pipe):
    qwen_pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *_: None)
    with omni_kernels.patched(qwen_pipe, quantize=INT8) as handle:
        assert handle.quantised.left_alone["transformer.transformer_blocks.1.attn.to_q"] == "it has a hook"
        assert "transformer.transformer_blocks.0.attn.to_q" in handle.quantised.replaced


def test_omni_keeps_a_quantisation_that_is_there(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, quantize=INT8, fuse=False)
    with Omni(qwen_pipe, cache_backend=None) as omni:
        assert omni._handle is handle
    assert handle.active
    handle.undo()


def test_omni_takes_it(qwen_pipe):
    with Omni(qwen_pipe, cache_backend=None, quantize=INT8) as omni:
        assert omni._handle.quantised.replaced
        again = copy.copy(omni)
        assert again._arguments["quantize"] == INT8
    with pytest.raises(ValueError, match="quantize must be"):
        Omni("emoji-qwen-image", quantize="int3")


@pytest.mark.parametrize(
    ("vendor", "arch", "dtype"),
    [
        ("nvidia", "sm_86", None),
        ("nvidia", "sm_89", torch.float8_e4m3fn),
        ("nvidia", "sm_120", torch.float8_e4m3fn),
        ("amd", "gfx942", torch.float8_e4m3fnuz),
        ("amd", "gfx950", torch.float8_e4m3fn),
        ("amd", "gfx1100", None),
    ],
)
def test_fp8_is_what_the_device_multiplies_or_refused(vendor, arch, dtype):
    device = torch.device("cuda:0")
    with pretend("cuda", Device(vendor, arch, f"{vendor} {arch}")):
        assert quantised.dtype_on("int8", device) == torch.int8
        if arch in ("sm_120", "gfx950"):
            assert quantised.dtype_on("mxfp8", device) == MX
        else:
            with pytest.raises(ValueError, match=f"quantize='mxfp8' needs a GPU .*{vendor} {arch} does not"):
                quantised.dtype_on("mxfp8", device)
        if dtype is not None:
            assert quantised.dtype_on("fp8", device) == dtype
            return
        with pytest.raises(
            ValueError, match=f"quantize='fp8' needs a GPU that multiplies fp8 .*{vendor} {arch} does not"
        ):
            quantised.dtype_on("fp8", device)


@pytest.mark.parametrize("name", ["qwen_image", "flux"])
def test_gelu_in_the_product_gives_the_picture_of_gelu_after_it(name, monkeypatch):
    model = MODELS[name]
    pipe = model.build(**model.options)
    how = INT8 | ({"include": ["img_mlp"]} if name == "qwen_image" else {})
    with omni_kernels.patched(pipe, quantize=how, fuse=False):
        expected = latents(pipe)
    monkeypatch.setattr(activations, "GROUP", 1)  # whatever the width; the op itself has its own
    monkeypatch.setattr(activations, "has_kernel", lambda weight: True)
    monkeypatch.setattr(importlib.import_module("omni_kernels.ops.scaled_mm"), "GROUP", 16)
    called = []
    gelu = QuantizedLinear.gelu
    monkeypatch.setattr(QuantizedLinear, "gelu", lambda layer, x: called.append(layer) or gelu(layer, x))
    with omni_kernels.patched(pipe, quantize=how):
        assert off(latents(pipe), expected) < 0.02
    assert called


def test_options_are_complete():
    assert options_of(None) is None
    assert options_of("fp8") == quantised.Options("fp8")
    assert options_of(INT8 | {"exclude": "to_q"}).exclude == ("to_q",)


def test_tiny_is_what_these_tests_take_it_for():
    layers = [layer for layer in tiny.qwen_image().transformer.modules() if type(layer) is torch.nn.Linear]
    assert max(layer.in_features for layer in layers) < 512
