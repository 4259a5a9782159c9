"""What a block launches and moves outside its GEMMs and attention, counted at the size of the real model.

Tensors on the meta device have shapes and no elements: nothing is computed, and every operator is seen. The unit of
what is moved is H, the hidden states of a block's streams, read or written once. What is no H is told apart: rotary
tables (a token's are a twelfth of its states, in bf16) and vectors, as modulation and the weights of norms.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers import (
    transformer_flux,
    transformer_flux2,
    transformer_hunyuan_video,
    transformer_ltx,
    transformer_qwenimage,
    transformer_qwenimage21,
    transformer_wan,
    transformer_z_image,
)
from torch.utils._python_dispatch import TorchDispatchMode

from omni_kernels.ops import OPS
from omni_kernels.patching import activations, rules
from omni_kernels.patching import ltx as fused_ltx
from omni_kernels.patching import wan as fused_wan
from omni_kernels.patching.changes import Patch
from omni_kernels.patching.quantized_linear import QuantizedLinear

IMAGE, TEXT, HEADS, HEAD = 4096, 128, 24, 128
D = HEADS * HEAD

GEMMS = {"addmm", "mm", "bmm", "linear", "t"}
# Those that make a tensor's description, or memory that somebody else writes.
FREE = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "detach", "slice", "select", "split", "unbind",
        "expand", "unsqueeze", "permute", "transpose", "view_as_real", "view_as_complex", "alias",
        "as_strided"}  # fmt: skip


# Arguments of the package's ops that are no hidden states.
TABLES = ("freqs", "cos", "sin")
VECTORS = ("gate", "scale", "shift", "x_weight", "q_weight", "k_weight", "weight", "bias")


class Traffic(TorchDispatchMode):
    """Counts launches and bytes, and which of the package's ops were called.

    Of the bytes, `tables` and `vectors` are told apart where the package's ops read them.
    """

    def __init__(self):
        super().__init__()
        self.launches = self.gemms = self.bytes = self.tables = self.vectors = 0
        self.ops = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        if function.namespace == "omni_kernels":
            given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | (kwargs or {})
            name = name.removesuffix("_into")
            if name == "scaled_mm":
                self.gemms += 1
                return result
            self.ops[name] += 1
            self.launches += 1
            self.bytes += OPS[name].bytes_moved(**given)
            self.tables += sum(memory(given[one]) for one in TABLES if given.get(one) is not None)
            vectors = VECTORS if name != "swiglu" else ()  # whose gate is as large as hidden states
            self.vectors += sum(memory(given[one]) for one in vectors if given.get(one) is not None)
        elif name in GEMMS:
            self.gemms += name != "t"
        elif name not in FREE:
            self.launches += 1
            args = args[1:] if name == "copy_" else args  # written, and not read
            self.bytes += sum(memory(t) for t in [*args, result] if isinstance(t, torch.Tensor))
            self.bytes += sum(memory(t) for listed in args if isinstance(listed, list) for t in listed
                              if isinstance(t, torch.Tensor))  # fmt: skip
        return result


def memory(t):
    """Bytes of what lies in memory: expanded elements are one."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else 1
    return elements * t.element_size()


@pytest.fixture(autouse=True)
def attention_is_not_counted(monkeypatch):
    def attend(query, key, value, **options):
        return torch.empty_like(query)

    for model in (
        transformer_flux, transformer_flux2, transformer_hunyuan_video, transformer_ltx, transformer_qwenimage,
        transformer_qwenimage21, transformer_wan, transformer_z_image,
    ):  # fmt: skip
        monkeypatch.setattr(model, "dispatch_attention_fn", attend)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@torch.no_grad()
def plain_and_fused(block, *given, kept=()):
    """Traffic of a block in bf16 as it is, and fused; the parameters `kept` are fp32."""
    block = block.to(torch.bfloat16).eval()
    for path in kept:
        module, _, name = path.rpartition(".")
        setattr(block.get_submodule(module), name, torch.nn.Parameter(block.get_parameter(path).float()))
    with Traffic() as plain:
        expected = block(*given)
    assert rules.RULES[type(block).__name__].unfit(block) is None
    Patch().set_forward(block, rules.RULES[type(block).__name__].forward)
    with Traffic() as fused:
        results = block(*given)
    assert [t.shape for t in results] == [t.shape for t in expected]
    assert not plain.ops
    assert fused.gemms == plain.gemms
    return plain, fused


def test_qwen_image_block_moves_a_quarter_in_a_sixth_of_the_launches():
    with torch.device("meta"):
        block = transformer_qwenimage.QwenImageTransformerBlock(D, HEADS, HEAD)
    rotary = [meta(tokens, HEAD // 2, dtype=torch.complex64) for tokens in (IMAGE, TEXT)]
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), meta(1, TEXT, D), None, meta(1, D), rotary)
    assert fused.ops == {"ada_layer_norm": 2, "qk_norm_rope": 2, "gate_residual_norm": 4, "gelu": 2}
    # The ops, and SiLU of the timestep for each stream; with the GEMMs and attention it is 27.
    assert fused.launches == 12
    assert fused.launches + fused.gemms + 1 == 27
    # 2 for the first norm, 4 for queries and keys, 4 for the second norm, 8 for GELU, 3 for the last residual.
    H = (IMAGE + TEXT) * D * 2  # bytes of both streams' hidden states
    assert 21.0 < fused.bytes / H < 21.1
    # Of diffusers 0.42: 75 launches and 88.4.
    assert plain.launches >= 6 * fused.launches
    assert plain.bytes > 4.1 * fused.bytes


@torch.no_grad()
def test_qwen_image_blocks_in_a_row_move_less_than_22_in_30_launches_each():
    """Of 60 blocks: 20 H each but the first, with 22, and the last, with 19; that is 20 · 60 + 1 in all.

    A block's norms are each made in the pass that wrote their input: the first block's first norm has no such pass and
    reads what it would have found there, and the last block has no norm to make. Beside the hidden states, a block
    reads the rotary tables once, 0.083 H, and vectors, 0.005 H.

    The unfused block's 90 launches are counted here as well: 75, 14 GEMMs, attention. Its 93 H were added up by hand,
    operator by operator; counted they are 88.4, with what is expanded read once.
    """
    LAYERS = 60
    with torch.device("meta"):
        blocks = torch.nn.ModuleList(
            transformer_qwenimage.QwenImageTransformerBlock(D, HEADS, HEAD) for _ in range(LAYERS)
        )
    blocks = blocks.to(torch.bfloat16).eval()
    rotary = [meta(tokens, HEAD // 2, dtype=torch.complex64) for tokens in (IMAGE, TEXT)]
    x, text, temb = meta(1, IMAGE, D), meta(1, TEXT, D), meta(1, D)
    H = (IMAGE + TEXT) * D * 2
    with Traffic() as plain:
        blocks[0](x, text, None, temb, rotary)
    assert plain.launches + plain.gemms + 1 == 90
    assert 88.3 < plain.bytes / H < 88.4

    transformer = torch.nn.Module()
    transformer.transformer_blocks = blocks
    assert len(rules.fuse(SimpleNamespace(transformer=transformer), Patch()).replaced) == LAYERS
    each = []
    for block in blocks:
        with Traffic() as traffic:
            text, x = block(x, text, None, temb, rotary)
        each.append(traffic)

    silu = 2 * 2 * D * 2  # read and written, for each stream's modulation: a block's own, or the next one's
    silus = [2, *[1] * (LAYERS - 2), 0]
    moved = [one.bytes - one.tables - one.vectors - n * silu for one, n in zip(each, silus, strict=True)]
    assert moved == [22 * H, *[20 * H] * (LAYERS - 2), 19 * H]
    assert sum(moved) == (20 * LAYERS + 1) * H
    assert sum(one.bytes for one in each) / H / LAYERS < 20.2  # and with the first, the last and all vectors and tables
    for one in each:
        assert one.tables == (IMAGE + TEXT) * HEAD * 4
        assert one.tables / H == 1 / 12
        assert (one.vectors + silu) / H < 0.005

    middle = {"qk_norm_rope": 2, "gate_residual_norm": 4, "gelu": 2}
    assert [one.ops for one in each] == [Counter(middle | {"ada_layer_norm": 2}), *[Counter(middle)] * (LAYERS - 1)]
    launches = [one.launches + one.gemms + 1 for one in each]
    assert launches[1:-1] == [25] * (LAYERS - 2)
    assert sum(launches) == 25 * LAYERS + 2
    assert sum(launches) / LAYERS <= 30


def in_8_bits(block, *but):
    """Replace the block's linear layers by quantised ones, but the modulation and those at these paths."""
    for path, layer in [*block.named_modules()]:
        if type(layer) is torch.nn.Linear and "mod" not in path and not path.startswith(but):
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, QuantizedLinear(layer, torch.int8))
    return block


@torch.no_grad()
@pytest.mark.parametrize(
    ("but", "activates", "expected"),
    [((), False, 18.5), ((), True, 12.5), (("img_mlp", "txt_mlp"), True, 21.0)],
    ids=["all", "all, GELU with the product", "without feed-forwards"],
)
def test_quantised_qwen_image_blocks_write_8_bits_in_the_same_passes(monkeypatch, but, activates, expected):
    """Of blocks in a row. Where bf16 moves 20, each of two norms writes half a hidden state less, and GELU 2 less.

    GELU can also be part of the product, as on a GPU in int8: then it moves nothing. Only attention's output is
    quantised in a pass of its own, of 1.5.
    """
    monkeypatch.setattr(activations, "has_kernel", lambda weight: activates)
    with torch.device("meta"):
        blocks = torch.nn.ModuleList(transformer_qwenimage.QwenImageTransformerBlock(D, HEADS, HEAD) for _ in range(4))
    transformer = torch.nn.Module()
    transformer.transformer_blocks = blocks.to(torch.bfloat16).eval()
    for block in blocks:
        in_8_bits(block, *but)
    assert len(rules.fuse(SimpleNamespace(transformer=transformer), Patch()).replaced) == 4
    rotary = [meta(tokens, HEAD // 2, dtype=torch.complex64) for tokens in (IMAGE, TEXT)]
    x, text, temb, each = meta(1, IMAGE, D), meta(1, TEXT, D), meta(1, D), []
    for block in blocks:
        with Traffic() as traffic:
            text, x = block(x, text, None, temb, rotary)
        each.append(traffic)
    H, scales = (IMAGE + TEXT) * D * 2, (IMAGE + TEXT) * 4
    middle = each[1]
    gelus = 0 if activates and not but else 2
    assert middle.ops == Counter({"qk_norm_rope": 2, "gate_residual_norm": 4, "quantize": 2, "gelu": gelus})
    assert middle.gemms == 14
    moved = middle.bytes - middle.tables - middle.vectors
    assert expected < moved / H < expected + 10 * scales / H
    assert middle.launches + middle.gemms + 1 == 25 + gelus


@torch.no_grad()
def test_both_branches_of_guidance_read_qwen_images_modulation():
    """Of one timestep, which gives both the same: 13.6 GB of weights that the second forward reads once more."""
    LAYERS = 60
    with torch.device("meta"):
        block = transformer_qwenimage.QwenImageTransformerBlock(D, HEADS, HEAD).to(torch.bfloat16).eval()
    Patch().set_forward(block, rules.RULES[type(block).__name__].forward)
    rotary = [meta(tokens, HEAD // 2, dtype=torch.complex64) for tokens in (IMAGE, TEXT)]
    temb, read = meta(1, D), []
    for part in (block.img_mod, block.txt_mod):
        part[1].register_forward_pre_hook(lambda linear, args: read.append(sum(map(memory, linear.parameters()))))
    for _ in ("cond", "uncond"):
        block(meta(1, IMAGE, D), meta(1, TEXT, D), None, temb, rotary)
    assert read == [2 * (6 * D * D + 6 * D)] * 4, "both streams, both branches: weights and biases, in bytes"
    assert 13.5e9 < LAYERS * sum(read) / 2 < 13.7e9


def test_z_image_block_moves_a_seventh_in_a_twelfth_of_the_launches():
    D, HEADS = 3840, 30
    with torch.device("meta"):
        block = transformer_z_image.ZImageTransformerBlock(0, D, HEADS, HEADS, norm_eps=1e-5, qk_norm=True)
    rotary = meta(1, IMAGE, HEAD // 2, dtype=torch.complex64)
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), None, rotary, meta(1, 256))
    assert fused.ops == {"ada_layer_norm": 1, "qk_norm_rope": 1, "gate_residual_norm": 2, "swiglu": 1}
    assert fused.launches == 5
    # As Qwen-Image's, with 8 for SwiGLU of 2⅔ times the channels.
    H = IMAGE * D * 2
    assert 21.0 < fused.bytes / H < 21.1
    # Of diffusers 0.42: 66 launches and 149.7.
    assert plain.launches >= 12 * fused.launches
    assert plain.bytes > 7 * fused.bytes


def real_tables(tokens):
    return tuple(meta(tokens, HEAD, dtype=torch.float32) for _ in range(2))


def test_flux_double_block_moves_a_sixth_in_a_sixth_of_the_launches():
    with torch.device("meta"):
        block = transformer_flux.FluxTransformerBlock(D, HEADS, HEAD)
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), meta(1, TEXT, D), meta(1, D), real_tables(IMAGE + TEXT))
    # As Qwen-Image's.
    assert fused.ops == {"ada_layer_norm": 2, "qk_norm_rope": 2, "gate_residual_norm": 4, "gelu": 2}
    assert fused.launches == 12
    H = (IMAGE + TEXT) * D * 2
    assert 21.1 < fused.bytes / H < 21.2
    # Of diffusers 0.42: 80 launches and 127.5.
    assert plain.launches >= 6 * fused.launches
    assert plain.bytes > 6 * fused.bytes


def test_flux_single_block_moves_a_fifth_in_a_sixth_of_the_launches():
    with torch.device("meta"):
        block = transformer_flux.FluxSingleTransformerBlock(D, HEADS, HEAD)
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), meta(1, TEXT, D), meta(1, D), real_tables(IMAGE + TEXT))
    # The ops, SiLU of the timestep, and where text and image, and attention and feed-forward, are put together.
    assert fused.ops == {"ada_layer_norm": 1, "qk_norm_rope": 1, "gate_residual_norm": 1, "gelu": 1}
    assert fused.launches == 7
    # 2 to join the streams, 2 for the norm, 4 for queries and keys, 2 and 8 for the output layer's input, 3 for the
    # residual.
    H = (IMAGE + TEXT) * D * 2
    assert 21.1 < fused.bytes / H < 21.2
    # Of diffusers 0.42: 42 launches and 122.5.
    assert plain.launches >= 6 * fused.launches
    assert plain.bytes > 5 * fused.bytes


WAN_OPS = {"ada_layer_norm": 1, "qk_norm_rope": 1, "gate_residual_norm": 3, "rms_norm": 2, "gelu": 1}


def wan(heads, ffn, image=0, by_token=False):
    """Traffic of a block of Wan, plain and fused, and the bytes of its hidden states."""
    D = heads * HEAD
    with torch.device("meta"):
        block = transformer_wan.WanTransformerBlock(
            D, ffn, heads, cross_attn_norm=True, added_kv_proj_dim=D if image else None
        )
    temb = meta(1, IMAGE, 6, D) if by_token else meta(1, 6, D)
    rotary = tuple(t[None, :, None] for t in real_tables(IMAGE))
    given = meta(1, IMAGE, D), meta(1, image + 512, D), temb, rotary
    kept = ("scale_shift_table", "norm2.weight", "norm2.bias")  # by diffusers, in fp32
    return *plain_and_fused(block, *given, kept=kept), IMAGE * D * 2


def test_wan_block_moves_a_seventh_in_an_eighth_of_the_launches():
    plain, fused, H = wan(40, 13824)
    # The ops, and the sum of the timestep's modulation and the block's.
    assert fused.ops == WAN_OPS
    assert fused.launches == 9
    # 2 for the first norm, 4 for queries and keys, 4 each for the second and the third, 2 for the queries that ask the
    # text, 5.4 for GELU of 2.7 times the channels, 3 for the residual.
    assert 24.7 < fused.bytes / H < 24.8
    # Of diffusers 0.42: 76 launches and 175.1.
    assert plain.launches >= 8 * fused.launches
    assert plain.bytes > 7 * fused.bytes


def test_wan_block_with_an_image_has_two_launches_more():
    plain, fused, H = wan(40, 13824, image=257)
    # The image's keys are normed, and what it gives is added to what the text gives.
    assert fused.ops == WAN_OPS | {"rms_norm": 3}
    assert fused.launches == 11
    assert 27.8 < fused.bytes / H < 27.9
    # Of diffusers 0.42: 85 launches and 179.4.
    assert plain.launches >= 7 * fused.launches
    assert plain.bytes > 6 * fused.bytes


def test_wan_block_with_a_modulation_for_each_token_moves_a_quarter():
    plain, fused, H = wan(24, 14336, by_token=True)
    assert fused.ops == WAN_OPS
    assert fused.launches == 9
    # 18 for the sum, 12 of it written in fp32, and 12 where the ops read that.
    assert 58.7 < fused.bytes / H < 58.8
    # Of diffusers 0.42: 82 launches and 265.2.
    assert plain.launches >= 9 * fused.launches
    assert plain.bytes > 4 * fused.bytes


def test_wan_block_with_two_timesteps_moves_as_little_as_with_one(monkeypatch):
    """As in image-to-video, found from the values, which tensors here do not have."""
    D = 24 * HEAD
    monkeypatch.setattr(fused_wan, "two_rows", lambda temb: (meta(2, 6, D), meta(1, IMAGE, dtype=torch.bool)))
    plain, fused, H = wan(24, 14336, by_token=True)
    assert fused.ops == WAN_OPS
    assert 28.7 < fused.bytes / H < 28.9
    assert plain.bytes > 9 * fused.bytes


def in_a_row(blocks, call, attribute="transformer_blocks"):
    """Traffic of each of these blocks of one transformer, fused. `call` calls a block with what it returned before."""
    transformer, state, each = torch.nn.Module(), None, []
    setattr(transformer, attribute, torch.nn.ModuleList(blocks))
    transformer = transformer.to(torch.bfloat16).eval()
    assert len(rules.fuse(SimpleNamespace(transformer=transformer), Patch()).replaced) == len(blocks)
    with torch.no_grad():
        for block in blocks:
            with Traffic() as traffic:
                state = call(block, state)
            each.append(traffic)
    return each


def test_flux_2_double_block_moves_a_sixth_in_an_eighth_of_the_launches():
    D, HEADS = 6144, 48
    with torch.device("meta"):
        block, *others = (transformer_flux2.Flux2TransformerBlock(D, HEADS, HEAD) for _ in range(4))
    x, text, tables = meta(1, IMAGE, D), meta(1, TEXT, D), real_tables(IMAGE + TEXT)
    mod, t_mod = meta(1, 6 * D), meta(1, 6 * D)
    plain, fused = plain_and_fused(block, x, text, mod, t_mod, tables)
    assert fused.ops == {"ada_layer_norm": 2, "qk_norm_rope": 2, "gate_residual_norm": 4, "swiglu": 2}
    assert fused.launches == 10
    # 2 for the first norm, 4 for queries and keys, 4 for the second norm, 9 for SwiGLU, 3 for the last residual.
    H = (IMAGE + TEXT) * D * 2
    assert 22.0 < fused.bytes / H < 22.1
    # Of diffusers 0.42: 80 launches and 134.4.
    assert plain.launches >= 8 * fused.launches
    assert plain.bytes > 6 * fused.bytes

    def call(block, state):
        return block(*(state or (text, x))[::-1], mod, t_mod, tables)

    each = in_a_row(others, call)
    assert [one.launches for one in each] == [10, 8, 8]
    assert [one.bytes - one.tables - one.vectors for one in each] == [23 * H, 21 * H, 20 * H]


def test_flux_2_single_block_moves_a_sixth_in_an_eighth_of_the_launches():
    D, HEADS, S = 6144, 48, IMAGE + TEXT
    with torch.device("meta"):
        block, *others = (transformer_flux2.Flux2SingleTransformerBlock(D, HEADS, HEAD) for _ in range(4))
    x, mod, tables = meta(1, S, D), meta(1, 3 * D), real_tables(S)
    plain, fused = plain_and_fused(block, x, None, mod, tables)
    # The ops, and where attention and feed-forward are put together.
    assert fused.ops == {"ada_layer_norm": 1, "qk_norm_rope": 1, "gate_residual_norm": 1, "swiglu": 1}
    assert fused.launches == 5
    # 2 for the norm, 4 for queries and keys, 2 and 9 for the output layer's input, 3 for the residual.
    H = S * D * 2
    assert 20.0 < fused.bytes / H < 20.1
    # Of diffusers 0.42: 42 launches and 134.4.
    assert plain.launches >= 8 * fused.launches
    assert plain.bytes > 6 * fused.bytes
    each = in_a_row(others, lambda block, state: block(x if state is None else state, None, mod, tables))
    assert [one.launches for one in each] == [5, 4, 4]
    assert [one.bytes - one.tables - one.vectors for one in each] == [21 * H, 19 * H, 18 * H]


@pytest.mark.parametrize(("by_token", "theirs", "ours"), [(False, 179.7, 30.1), (True, 201.7, 48.1)])
def test_ltx_block_moves_a_fourth_at_most_in_an_eighth_of_the_launches(by_token, theirs, ours):
    D, HEADS, size = 2048, 32, 64
    with torch.device("meta"):
        block = transformer_ltx.LTXVideoTransformerBlock(D, HEADS, size, D)
    temb = meta(1, IMAGE if by_token else 1, 6 * D)
    tables = [meta(1, IMAGE, D, dtype=torch.float32) for _ in range(2)]
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), meta(1, TEXT, D), temb, tables)
    # The ops, and the sum of the timestep's modulation and the block's.
    assert fused.ops == {"ada_layer_norm": 1, "qk_norm_rope": 1, "gate_residual_norm": 3, "rms_norm": 2, "gelu": 1}
    assert fused.launches == 9
    # 2 for the first norm, 4 for queries and keys and 4 for the angles of every head, 3 for the first residual, 2 for
    # the queries that ask the text, 4 for the second norm, 8 for GELU, 3 for the last residual. With a modulation for
    # each token, 12 for the sum, and 6 where the ops read it.
    H = IMAGE * D * 2
    assert ours - 0.1 < fused.bytes / H < ours
    # Of diffusers 0.42: 75 launches.
    assert plain.launches >= 8 * fused.launches
    assert theirs - 0.1 < plain.bytes / H < theirs


def test_ltx_block_with_two_timesteps_moves_as_little_as_with_one(monkeypatch):
    D, HEADS, size = 2048, 32, 64
    with torch.device("meta"):
        block = transformer_ltx.LTXVideoTransformerBlock(D, HEADS, size, D)
    monkeypatch.setattr(fused_ltx, "two_rows", lambda temb: (meta(2, 6 * D), meta(1, IMAGE, dtype=torch.bool)))
    tables = [meta(1, IMAGE, D, dtype=torch.float32) for _ in range(2)]
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), meta(1, TEXT, D), meta(1, IMAGE, 6 * D), tables)
    H = IMAGE * D * 2
    assert 30.0 < fused.bytes / H < 30.2
    assert plain.bytes > 6 * fused.bytes


def kept(tokens, D):
    """What a first step keeps of so many tokens."""
    cache = transformer_qwenimage21.QwenImage21KVLayerCache()
    cache.store(*(meta(1, tokens, D // HEAD, HEAD) for _ in range(2)))
    return cache


def test_qwen_image_21_block_moves_a_quarter_in_a_fifth_of_the_launches():
    D, HEADS = 4096, 32
    with torch.device("meta"):
        block, *others = (transformer_qwenimage21.QwenImage21TransformerBlock(D, HEADS, HEAD) for _ in range(4))
    target = meta(IMAGE, dtype=torch.bool)
    given = (meta(2, 4 * D), meta(IMAGE, HEAD // 2, dtype=torch.complex64), None, target, kept(TEXT, D), "cached")
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), *given)
    # The ops, the rows of the modulation, and where kept keys and values are copied.
    assert fused.ops == {"ada_layer_norm": 1, "qk_norm_rope": 1, "gate_residual_norm": 2, "swiglu": 1}
    assert fused.launches == 8
    # 2 for the first norm, 4 for queries and keys, 0.1 for the kept ones, 4 for the second norm, 9 for SwiGLU, 3 for
    # the residual.
    H = IMAGE * D * 2
    assert 22.1 < fused.bytes / H < 22.2
    # Of diffusers 0.42: 42 launches and 105.4.
    assert plain.launches >= 5 * fused.launches
    assert plain.bytes > 4 * fused.bytes

    each = in_a_row(others, lambda block, x: block(meta(1, IMAGE, D) if x is None else x, *given))
    assert [one.launches for one in each] == [8, 6, 6]
    copied = 4 * TEXT * D * 2
    index = (2 + 1, 2, 1)  # reads of a byte for each token
    moved = [one.bytes - one.tables - one.vectors - copied - n * IMAGE for one, n in zip(each, index, strict=True)]
    assert [round(one / H, 2) for one in moved] == [23, 21, 20]


def test_hunyuan_video_double_block_moves_a_fifth_in_a_sixth_of_the_launches():
    with torch.device("meta"):
        block = transformer_hunyuan_video.HunyuanVideoTransformerBlock(HEADS, HEAD, 4)
    mask = meta(1, 1, 1, IMAGE + TEXT, dtype=torch.bool)
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), meta(1, TEXT, D), meta(1, D), mask, real_tables(IMAGE))
    # As Qwen-Image's.
    assert fused.ops == {"ada_layer_norm": 2, "qk_norm_rope": 2, "gate_residual_norm": 4, "gelu": 2}
    assert fused.launches == 12
    H = (IMAGE + TEXT) * D * 2
    assert 21.1 < fused.bytes / H < 21.2
    # Of diffusers 0.42: 79 launches and 118.9.
    assert plain.launches > 6 * fused.launches
    assert plain.bytes > 5 * fused.bytes


def test_hunyuan_video_single_block_moves_a_fifth_in_a_fifth_of_the_launches():
    with torch.device("meta"):
        block = transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock(HEADS, HEAD)
    mask = meta(1, 1, 1, IMAGE + TEXT, dtype=torch.bool)
    plain, fused = plain_and_fused(block, meta(1, IMAGE, D), meta(1, TEXT, D), meta(1, D), mask, real_tables(IMAGE))
    # As FLUX's, where video and text are not rotated alike.
    assert fused.ops == {"ada_layer_norm": 1, "qk_norm_rope": 2, "gate_residual_norm": 1, "gelu": 1}
    assert fused.launches == 8
    H = (IMAGE + TEXT) * D * 2
    assert 21.1 < fused.bytes / H < 21.2
    # Of diffusers 0.42: 46 launches and 122.9.
    assert plain.launches > 5 * fused.launches
    assert plain.bytes > 5 * fused.bytes
