"""What a block launches and moves outside its GEMMs and attention, counted at the size of the real model.

Tensors on the meta device have shapes and no elements: nothing is computed, and every operator is seen.
"""

from collections import Counter

import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage
from torch.utils._python_dispatch import TorchDispatchMode

from omni_kernels.ops import OPS
from omni_kernels.patching import rules
from omni_kernels.patching.engine import Patch

IMAGE, TEXT, HEADS, HEAD = 4096, 128, 24, 128
D = HEADS * HEAD
H = (IMAGE + TEXT) * D * 2  # bytes of both streams' hidden states in bf16

GEMMS = {"addmm", "mm", "bmm", "linear", "t"}
# Those that make a tensor's description, or memory that somebody else writes.
FREE = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "detach", "slice", "select", "split", "expand",
        "unsqueeze", "permute", "transpose", "view_as_real", "view_as_complex", "alias", "as_strided"}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts launches and bytes, and which of the package's ops were called."""

    def __init__(self):
        super().__init__()
        self.launches = self.gemms = self.bytes = 0
        self.ops = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        if function.namespace == "omni_kernels":
            self.ops[name] += 1
            given = dict(zip((a.name for a in function._schema.arguments), args, strict=True))
            if function._overloadname == "without_norm":
                given["norm"] = None
            self.launches += 1
            self.bytes += OPS[name].bytes_moved(**given)
        elif name in GEMMS:
            self.gemms += name != "t"
        elif name not in FREE:
            self.launches += 1
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


@pytest.fixture
def block(monkeypatch):
    def attend(query, key, value, **options):
        return torch.empty_like(query)

    monkeypatch.setattr(transformer_qwenimage, "dispatch_attention_fn", attend)
    with torch.device("meta"):
        made = transformer_qwenimage.QwenImageTransformerBlock(D, HEADS, HEAD)
    return made.to(torch.bfloat16).eval()


@torch.no_grad()
def traffic(block, B=1):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    rotary = [empty(tokens, HEAD // 2, dtype=torch.complex64) for tokens in (IMAGE, TEXT)]
    with Traffic() as counted:
        text, image = block(empty(B, IMAGE, D), empty(B, TEXT, D), None, empty(B, D), rotary)
    assert image.shape == (B, IMAGE, D)
    assert text.shape == (B, TEXT, D)
    return counted


def test_qwen_image_block_moves_a_quarter_in_a_sixth_of_the_launches(block):
    plain = traffic(block)
    Patch().set_forward(block, rules.RULES["QwenImageTransformerBlock"].forward)
    fused = traffic(block)
    assert fused.ops == {"ada_layer_norm": 2, "qk_norm_rope": 2, "gate_residual_norm": 4, "gelu": 2}
    assert fused.gemms == plain.gemms == 14
    # The ops, and SiLU of the timestep for each stream; with the GEMMs and attention it is 27.
    assert fused.launches == 12
    assert fused.launches + fused.gemms + 1 <= 30
    # 2 for the first norm, 6 for queries, keys and values, 4 for the second norm, 8 for GELU, 3 for the last residual.
    assert 23.0 < fused.bytes / H < 23.1
    # Of diffusers 0.42: 75 launches and 88.4.
    assert not plain.ops
    assert plain.launches >= 6 * fused.launches
    assert plain.bytes > 3.8 * fused.bytes
