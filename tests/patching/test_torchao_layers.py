"""Pipelines that torchao has quantised with dynamic activations: the same 8-bit weights, and our activations."""

import re

import pytest
import torch
from fused import off
from models import MODELS, latents

import omni_kernels
from omni_kernels.patching import torchao_layers
from omni_kernels.patching.quantized_linear import QuantizedLinear

torchao = pytest.importorskip("torchao")

from torchao.float8.inference import Float8MMConfig  # noqa: E402
from torchao.quantization import (  # noqa: E402
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    MappingType,
    PerRow,
    PerTensor,
)
from torchao.quantization.quantize_.workflows import (  # noqa: E402
    Float8Tensor,
    QuantizeTensorToFloat8Kwargs,
)

HOW = {"dtype": "int8", "min_width": 0}
DYNAMIC = Int8DynamicActivationInt8WeightConfig()


def quantise(model, config=DYNAMIC, only=""):
    def chosen(layer, name):
        wide = isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == layer.out_features % 32 == 0
        return wide and bool(re.search(r"\.\d+\.", name)) and only in name

    torchao.quantize_(model, config, filter_fn=chosen)
    return model


def linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return torch.nn.Linear(96, 64, bias=bias, dtype=dtype)


def in_fp8(dtype=torch.float32, granularity=None, **activations):
    """A layer as Float8DynamicActivationFloat8WeightConfig makes it, which torchao does not allow on a CPU."""
    layer, config = linear(dtype), Float8MMConfig(use_fast_accum=True)
    rows = granularity or PerRow()
    how = QuantizeTensorToFloat8Kwargs(granularity=rows, mm_config=config, **activations)
    weight = Float8Tensor.from_hp(layer.weight.data, granularity=rows, mm_config=config, act_quant_kwargs=how)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", [PerRow(), [PerRow(), PerTensor()]], ids=["rows", "one scale of the weight"])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_has_torchaos_weights_and_its_result(dtype, granularity, bias):
    plain = linear(dtype, bias)
    layer = linear(dtype, bias)
    torchao.quantize_(layer, Int8DynamicActivationInt8WeightConfig(granularity=granularity))
    there = torchao_layers.weights_of(layer)
    made = QuantizedLinear.holding(there.values, there.scale, layer.bias)
    assert made.weight.data_ptr() == layer.weight.qdata.data_ptr(), "no copy"
    assert (there.name, made.weight_scale.shape) == ("int8", (64,))
    x = torch.randn(3, 50, 96, dtype=dtype)
    with torch.no_grad():
        expected, ours = layer(x), made(x)
        weights_alone = torch.nn.functional.linear(
            x.double(), layer.weight.dequantize().double(), plain.bias if plain.bias is None else plain.bias.double()
        )
    theirs = off(expected, weights_alone)  # what quantising the activations costs
    assert ours.dtype == expected.dtype
    assert off(ours, weights_alone) < 1.05 * theirs
    assert off(ours, expected) < 1.5 * theirs < 0.02


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=str)
def test_fp8_has_torchaos_weights_and_its_result(dtype, most):
    """In bf16, torchao rounds a token's scale to bf16, too: that is another grid of 8 bits."""
    layer = in_fp8(dtype)
    there = torchao_layers.weights_of(layer)
    made = QuantizedLinear.holding(there.values, there.scale, layer.bias)
    x = torch.randn(3, 50, 96, dtype=dtype)
    with torch.no_grad():
        assert there.name == "fp8"
        assert off(made(x), layer(x)) < most
        assert off(made(x), linear(dtype)(x)) > 0.02


@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_is_met_and_its_tensors_come_back(name):
    model = MODELS[name]
    pipe = model.build(**model.options)
    whole = latents(pipe)
    quantise(pipe.transformer)
    layers = {id(one): one.weight for one in pipe.transformer.modules() if isinstance(one, torch.nn.Linear)}
    expected = latents(pipe)
    handle = omni_kernels.patch(pipe, quantize=HOW, fuse=False)
    met = [path for path in handle.quantised.replaced if "mod" not in path]
    assert len(met) >= 2 * model.blocks
    assert off(latents(pipe), expected) < 1.5 * off(expected, whole)
    handle.undo()
    after = {id(one): one.weight for one in pipe.transformer.modules() if isinstance(one, torch.nn.Linear)}
    assert after.keys() == layers.keys()
    assert all(after[one] is weight for one, weight in layers.items())
    assert torch.equal(latents(pipe), expected)


def test_layers_that_torchao_left_are_quantised_too(qwen_pipe):
    quantise(qwen_pipe.transformer, only="attn.to_")
    weight = qwen_pipe.transformer.transformer_blocks[0].attn.to_q.weight
    with omni_kernels.patched(qwen_pipe, quantize=HOW) as handle:
        block = qwen_pipe.transformer.transformer_blocks[0]
        assert block.attn.to_q.weight.data_ptr() == weight.qdata.data_ptr()
        assert isinstance(block.attn.add_q_proj, QuantizedLinear)
        freed = {one.name.split("transformer_blocks.0.")[-1]: one.freed for one in handle.quantised}
        assert freed["attn.to_q"] == 0 < freed["attn.add_q_proj"]


def test_rules_of_quality_are_torchaos(qwen_pipe):
    quantise(qwen_pipe.transformer, only="img_m")
    with omni_kernels.patched(qwen_pipe, quantize=HOW | {"exclude": ["img_mlp.net.2"]}) as handle:
        left = handle.quantised.left_alone
        assert "transformer.transformer_blocks.0.img_mlp.net.0.proj" in handle.quantised.replaced
        assert "transformer.transformer_blocks.0.img_mod.1" in handle.quantised.replaced
        assert left["transformer.transformer_blocks.0.img_mlp.net.2"] == "excluded"


def test_memory_is_shared_until_it_is_moved_and_undo_works_for_all_keeps(qwen_pipe):
    quantise(qwen_pipe.transformer, only="attn.to_q")
    layer = qwen_pipe.transformer.transformer_blocks[0].attn.to_q
    weight = layer.weight
    with omni_kernels.patched(qwen_pipe, quantize=HOW | {"exclude": ["attn.to_k"], "keep": "host"}):
        qwen_pipe.transformer.to(torch.bfloat16)
        assert qwen_pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.int8
    assert qwen_pipe.transformer.transformer_blocks[0].attn.to_q is layer
    assert layer.weight is weight
    omni_kernels.patch(qwen_pipe, quantize=HOW | {"keep": "none"})
    assert layer.weight.qdata.numel() == 64 * 64, "torchao's weights are those in use"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "fp8"}, r"quantize='fp8', but torchao has quantised .*\.0\.img_mod\.1 to int8: ask for 'int8'"),
        (
            {"edge_steps": (1, 1)},
            r"edge_steps needs .* and torchao has quantised those of .*\.0\.img_mod\.1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(qwen_pipe, how, message):
    quantise(qwen_pipe.transformer)
    before = [*map(id, qwen_pipe.transformer.modules())]
    with pytest.raises(ValueError, match=message):
        omni_kernels.patch(qwen_pipe, quantize=HOW | how)
    assert [*map(id, qwen_pipe.transformer.modules())] == before


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Int8WeightOnlyConfig(), "quantised by torchao (Int8Tensor) with weights alone"),
        (Float8WeightOnlyConfig(), "quantised by torchao (Float8Tensor) with weights alone"),
        (
            Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
            "quantised by torchao (Int8Tensor) with asymmetric activations",
        ),
        (
            Int8DynamicActivationInt8WeightConfig(reduce_range=True),
            "quantised by torchao (Int8Tensor) with activations of a smaller range",
        ),
        (
            Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()),
            "quantised by torchao (Int8Tensor) with one scale for all tokens",
        ),
        (
            Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
            "quantised by torchao (IntxUnpackedToInt8Tensor) in a way of its own",
        ),
    ],
    ids=lambda one: type(one).__name__ if not isinstance(one, str) else "",
)
def test_other_kinds_stay_and_are_named(qwen_pipe, config, why):
    quantise(qwen_pipe.transformer, config, only="attn.to_q")
    layer = qwen_pipe.transformer.transformer_blocks[0].attn.to_q
    assert type(layer.weight.data) is not torch.Tensor
    with omni_kernels.patched(qwen_pipe, quantize=HOW) as handle:
        assert handle.quantised.left_alone["transformer.transformer_blocks.0.attn.to_q"] == why
        assert qwen_pipe.transformer.transformer_blocks[0].attn.to_q is layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: in_fp8(granularity=PerTensor()), "with one scale for all tokens"),
        (lambda: in_fp8(hp_value_ub=3.0), "with activations of a smaller range"),
        (lambda: in_fp8(float8_dtype=torch.float8_e5m2), "in float8_e4m3fn"),
    ],
)
def test_other_kinds_of_fp8_stay(layer, why):
    assert torchao_layers.weights_of(layer()) == f"quantised by torchao (Float8Tensor) {why}"


def test_plain_layers_are_not_torchaos():
    assert torchao_layers.weights_of(linear()) is None
