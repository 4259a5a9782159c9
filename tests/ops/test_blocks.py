"""The ops in place of what the blocks of diffusers do between attention and feed-forward.

Each block runs with a stand-in for both, which keeps what it was given and returns tensors made beforehand; the ops,
given the block's own modulation, have to come to the same.
"""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21TransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

from omni_kernels.validation import oracle
from omni_kernels.validation.tolerances import assert_near

B, S, D = 2, 7, 24
SIZES = {"num_attention_heads": 2, "attention_head_dim": 12}


class Given(torch.nn.Module):
    """Returns what it was made with, and keeps its last first argument."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs, self.seen = outputs, None

    def forward(self, first=None, *args, hidden_states=None, **kwargs):
        self.seen = hidden_states if first is None else first
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def ops(implementation):
    """The ops, taking and returning tensors of the CPU, where the blocks are."""

    def on_device(name):
        def run(*args, **kwargs):
            moved = [t if t is None else t.to(implementation.device) for t in args]
            named = {k: v.to(implementation.device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            result = implementation[name](*moved, **named)
            return tuple(t if t is None else t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()

        return run

    return {name: on_device(name) for name in ("ada_layer_norm", "gate_residual_norm", "rms_norm")}


def hidden(count=1):
    made = [torch.randn(B, S, D) for _ in range(count)]
    return made if count > 1 else made[0]


def random_(module):
    """Weights of a norm are 1, and tables small, until someone trains them."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def assert_same(ours, block, magnitude):
    """Two results in fp32. What is off in an h whose terms cancel shows in y, hence the largest magnitude of a row."""
    assert_near(ours, block, magnitude.double().amax(-1, keepdim=True).expand(ours.shape))


def assert_normed(ours, block, h, scale, shift=None, **options):
    assert_same(ours, block, oracle.modulated(h, scale, shift, **options)[1])


@pytest.mark.parametrize("with_index", [True, False], ids=["zero_cond_t", "plain"])
def test_qwen_image(ops, with_index):
    block = QwenImageTransformerBlock(dim=D, zero_cond_t=with_index, **SIZES)
    x, text, attended, attended_text, fed, fed_text = hidden(6)
    block.attn, block.img_mlp, block.txt_mlp = Given(attended, attended_text), Given(fed), Given(fed_text)
    temb = torch.randn(2 * B if with_index else B, D)
    index = (torch.arange(B * S).reshape(B, S) % 3 == 0).int() if with_index else None
    _, out = block(x, text, None, temb, modulate_index=index)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.img_mod(temb).chunk(6, -1)
    y = ops["ada_layer_norm"](x, scale1, shift1, index=index)
    assert_normed(y, block.attn.seen, x, scale1, shift1, index=index)
    h, y = ops["gate_residual_norm"](x, attended, gate1, scale2, shift2, index=index)
    assert_normed(y, block.img_mlp.seen, h, scale2, shift2, index=index)
    h, nothing = ops["gate_residual_norm"](h, fed, gate2, index=index, norm=None)
    assert nothing is None
    assert_same(h, out, 1 + out.abs())


def test_flux(ops):
    block = FluxTransformerBlock(dim=D, **SIZES)
    x, text, attended, attended_text, fed, fed_text = hidden(6)
    block.attn, block.ff, block.ff_context = Given(attended, attended_text), Given(fed), Given(fed_text)
    temb = torch.randn(B, D)
    _, out = block(x, text, temb)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.norm1.linear(block.norm1.silu(temb)).chunk(6, 1)
    y = ops["ada_layer_norm"](x, scale1, shift1)
    assert_normed(y, block.attn.seen, x, scale1, shift1)
    h, y = ops["gate_residual_norm"](x, attended, gate1, scale2, shift2)
    assert_normed(y, block.ff.seen, h, scale2, shift2)
    h, _ = ops["gate_residual_norm"](h, fed, gate2, norm=None)
    assert_same(h, out, 1 + out.abs())


@pytest.mark.parametrize("modulation", [True, False], ids=["modulated", "plain"])
def test_z_image(ops, modulation):
    eps = 1e-5
    block = ZImageTransformerBlock(0, D, 2, 2, norm_eps=eps, qk_norm=True, modulation=modulation)
    for norm in (block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2):
        random_(norm)
    x, attended, fed = hidden(3)
    block.attention, block.feed_forward = Given(attended), Given(fed)
    temb = torch.randn(B, D)
    out = block(x, None, None, temb)
    scale1, gate1, scale2, gate2 = block.adaLN_modulation(temb).chunk(4, 1) if modulation else [None] * 4
    options = {"norm": "rms", "weight": block.attention_norm1.weight, "eps": eps}
    y = ops["ada_layer_norm"](x, scale1, **options)
    assert_normed(y, block.attention.seen, x, scale1, **options)
    gated = {"gate_tanh": modulation, "x_weight": block.attention_norm2.weight, "x_eps": eps}
    options["weight"] = block.ffn_norm1.weight
    h, y = ops["gate_residual_norm"](x, attended, gate1, scale2, **gated, **options)
    assert_normed(y, block.feed_forward.seen, h, scale2, **options)
    h, _ = ops["gate_residual_norm"](h, fed, gate2, **gated | {"x_weight": block.ffn_norm2.weight}, norm=None)
    assert_same(h, out, 4 + out.abs())
    if not modulation:
        assert_normed(ops["rms_norm"](x, block.attention_norm1.weight, eps=eps), block.attention.seen, x, None,
                      norm="rms", weight=block.attention_norm1.weight, eps=eps)  # fmt: skip


@pytest.mark.parametrize("per_token", [True, False], ids=["ti2v", "one timestep"])
def test_wan(ops, per_token):
    block = WanTransformerBlock(D, 2 * D, 2, cross_attn_norm=True)
    random_(block.norm2)
    x, attended, crossed, fed = hidden(4)
    block.attn1, block.attn2, block.ffn = Given(attended), Given(crossed), Given(fed)
    temb = torch.randn(B, S, 6, D) if per_token else torch.randn(B, 6, D)
    out = block(x, None, temb, None)
    table = block.scale_shift_table.unsqueeze(0) if per_token else block.scale_shift_table
    chunks = (table + temb).chunk(6, -2)
    shift1, scale1, gate1, shift3, scale3, gate3 = (t.squeeze(2) if per_token else t for t in chunks)
    y = ops["ada_layer_norm"](x, scale1, shift1)
    assert_normed(y, block.attn1.seen, x, scale1, shift1)
    affine = {"weight": block.norm2.weight, "bias": block.norm2.bias}
    h, y = ops["gate_residual_norm"](x, attended, gate1, **affine)
    assert_normed(y, block.attn2.seen, h, None, **affine)
    assert_normed(ops["ada_layer_norm"](h, None, **affine), block.attn2.seen, h, None, **affine)
    h, y = ops["gate_residual_norm"](h, crossed, None, scale3, shift3)
    assert_normed(y, block.ffn.seen, h, scale3, shift3)
    h, _ = ops["gate_residual_norm"](h, fed, gate3, norm=None)
    assert_same(h, out, 1 + out.abs())


@pytest.mark.parametrize("with_index", [True, False], ids=["causal", "one modulation"])
def test_qwen_image_21(ops, with_index):
    block = QwenImage21TransformerBlock(D, **SIZES)
    x, attended, fed = hidden(3)
    block.attn, block.img_mlp = Given(attended), Given(fed)
    modulation = torch.randn(B + with_index, 4 * D)
    target = torch.arange(S) % 3 == 0 if with_index else None
    out = block(x, modulation, target_token_mask=target)
    if with_index:  # the last row is that of the tokens that are not the target's
        modulation, index = torch.cat([modulation[-1:].expand(B, -1), modulation[:-1]]), target.expand(B, -1)
    else:
        index = None
    scale1, gate1, scale2, gate2 = modulation.chunk(4, -1)
    assert_normed(ops["ada_layer_norm"](x, scale1, index=index), block.attn.seen, x, scale1, index=index)
    gated = {"gate_tanh": True, "index": index}
    h, y = ops["gate_residual_norm"](x, attended, gate1, scale2, **gated)
    assert_normed(y, block.img_mlp.seen, h, scale2, index=index)
    h, _ = ops["gate_residual_norm"](h, fed, gate2, **gated, norm=None)
    assert_same(h, out, 1 + out.abs())


@pytest.mark.parametrize("per_token", [True, False], ids=["image to video", "one timestep"])
def test_ltx(ops, per_token):
    block = LTXVideoTransformerBlock(D, *SIZES.values(), cross_attention_dim=D)
    x, attended, crossed, fed = hidden(4)
    block.attn1, block.attn2, block.ff = Given(attended), Given(crossed), Given(fed)
    temb = torch.randn(B, S if per_token else 1, 6 * D)
    out = block(x, None, temb)
    shift1, scale1, gate1, shift2, scale2, gate2 = (temb.unflatten(2, (6, D)) + block.scale_shift_table).unbind(2)
    y = ops["ada_layer_norm"](x, scale1, shift1, norm="rms")
    assert_normed(y, block.attn1.seen, x, scale1, shift1, norm="rms")
    h, _ = ops["gate_residual_norm"](x, attended, gate1, norm=None)
    assert_same(h, block.attn2.seen, 1 + h.abs())
    h, y = ops["gate_residual_norm"](h, crossed, None, scale2, shift2, norm="rms")
    assert_normed(y, block.ff.seen, h, scale2, shift2, norm="rms")
    h, _ = ops["gate_residual_norm"](h, fed, gate2, norm=None)
    assert_same(h, out, 1 + out.abs())
