"""Quantised linear layers under fused blocks: called as the black boxes that they are, whoever made them.

Weights alone are quantised here. Where activations are, too (torchao's int8 dynamic), the rounding of a block's norms
decides what they are quantised to, and what is up to rounding the same before is so only to a step of that grid after.
"""

import pytest
import torch
from fused import off
from models import MODELS, latents

import omni_kernels


def linears(transformer):
    """(parent, name, layer) of those in blocks and outside whose widths the libraries' kernels take."""
    for parent in list(transformer.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear) and layer.in_features % 64 == layer.out_features % 64 == 0:
                yield parent, name, layer


def torchao_int8(transformer):
    torchao = pytest.importorskip("torchao")
    chosen = {layer for _, _, layer in linears(transformer)}
    torchao.quantize_(
        transformer, torchao.quantization.Int8WeightOnlyConfig(), filter_fn=lambda layer, name: layer in chosen
    )


def bitsandbytes_nf4(transformer):
    bnb = pytest.importorskip("bitsandbytes")
    replace(transformer, bnb.nn.Linear4bit, compute_dtype=torch.float32, quant_type="nf4")


def bitsandbytes_int8(transformer):
    bnb = pytest.importorskip("bitsandbytes")
    replace(transformer, bnb.nn.Linear8bitLt, has_fp16_weights=False)


def replace(transformer, cls, **options):
    """As diffusers does when it loads: the weights are quantised when they are brought to their device."""
    for parent, name, layer in linears(transformer):
        quantised = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
        quantised.load_state_dict(layer.state_dict())
        setattr(parent, name, quantised.to("cpu"))


def is_quantised(module):
    weight = getattr(module, "weight", None)
    kinds = (type(weight), type(getattr(weight, "data", None)))
    return any("torchao" in kind.__module__ for kind in kinds) or (
        "bitsandbytes" in type(module).__module__ and weight.dtype in (torch.int8, torch.uint8)
    )


@pytest.mark.parametrize("quantise", [torchao_int8, bitsandbytes_nf4, bitsandbytes_int8])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_quantised_layers_are_fused_and_agree(name, quantise):
    model = MODELS[name]
    pipe = model.build(**model.options)
    whole = latents(pipe)
    layers = [sum(isinstance(m, torch.nn.Linear) for m in block.modules()) for block in model.blocks_of(pipe)]
    quantise(pipe.transformer)
    quantised = [sum(map(is_quantised, block.modules())) for block in model.blocks_of(pipe)]
    assert len(quantised) == model.blocks
    assert all(count >= min(6, there) for count, there in zip(quantised, layers, strict=True))
    expected = latents(pipe)
    assert off(expected, whole) > 1e-4, "quantised in earnest"
    handle = omni_kernels.patch(pipe)
    assert len(handle.fused.replaced) == model.blocks
    assert handle.fused.left_alone == {}
    with model.all_fused():
        assert off(latents(pipe), expected) < 1e-5
    handle.undo()
    assert torch.equal(latents(pipe), expected)
