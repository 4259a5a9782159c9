"""torch_npu's fused operators: which ones are used, how they are called, and whether they are available.

| operator | computes | in which precision | used for |
|---|---|---|---|
| `npu_rms_norm` | x / √(mean(x²) + ε) · γ, and 1 / √(…) | fp32, rounded once [1] | `rms_norm`, every norm "rms" |
| `npu_rotary_mul` | x·cos + rotated(x)·sin | its arguments' one dtype [2]: called in fp32 | `qk_norm_rope` |
| `npu_swiglu` | silu(first half)·second half | bf16: fp32, rounded once [3]; fp16 unknown: called in fp32 | `swiglu` |
| `npu_gelu` | GELU, by its tanh approximation if asked | as torch's own gelu on an NPU [4] | `gelu` |

Not used: `npu_fast_gelu` is a different function, x / (1 + exp(−1.702·x)) [5]; `npu_apply_rotary_pos_emb` supports only
the "half" layout on most products, and overwrites its inputs [5]; `npu_add_rms_norm` has no gate in the sum.

[1] CANN's kernels: github.com/hicann/ops-nn, norm/rms_norm/op_kernel. γ in x's dtype: torch_npu's documentation.
[2] github.com/hicann/ops-transformer, posembedding/rotary_position_embedding/docs/aclnnRotaryPositionEmbedding.md
[3] CANN's kernel swi_glu_bf16.hpp; that it takes contiguous tensors: hicann/ops-nn, activation/swi_glu/docs
[4] In fp32, rounded once, on Ascend 950 (hicann/ops-nn, activation/gelu_v2/op_kernel/arch35); the source for other
    products is not available. On an NPU, torch's own `aten::gelu` may ignore `approximate` and always compute the tanh
    approximation (torch_npu's documentation of `npu_gelu`).
[5] torch_npu 2.13.0, torch_npu/_op_plugin_docs.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

#: Our calls, as schemas with only the arguments that we pass. Positional arguments may have other names in torch_npu.
CALLS = {
    "npu_rms_norm": "npu_rms_norm(Tensor input, Tensor gamma, float epsilon) -> (Tensor, Tensor)",
    "npu_rotary_mul": "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode) -> Tensor",
    "npu_swiglu": "npu_swiglu(Tensor input, int dim) -> Tensor",
    "npu_gelu": "npu_gelu(Tensor input, *, str approximate) -> Tensor",
}


@functools.cache
def fused(name: str) -> Callable[..., Any] | None:
    """torch_npu's operator if it exists and accepts our call, else None. Cached."""
    found = getattr(getattr(torch.ops.npu, name, None), "default", None)
    return found if found is not None and takes(found._schema, CALLS[name]) else None


def present() -> list[str]:
    """The names of the available operators."""
    return [name for name in CALLS if fused(name) is not None]


def takes(schema: Any, call: str) -> bool:
    """Whether an operator with this schema accepts a call, and returns the expected types."""
    wanted: Any = torch._C.parse_schema(call)
    places = [argument for argument in schema.arguments if not argument.kwarg_only]
    keywords = {argument.name: argument for argument in schema.arguments if argument.kwarg_only}
    passed = []
    for place, ours in enumerate(wanted.arguments):
        theirs = keywords.get(ours.name) if ours.kwarg_only else places[place] if place < len(places) else None
        if theirs is None or str(theirs.type) != str(ours.type):
            return False
        passed.append(theirs.name)
    rest = [argument for argument in schema.arguments if argument.name not in passed]
    returned, expected = ([str(value.type) for value in one.returns] for one in (schema, wanted))
    return returned == expected and all(argument.has_default_value() for argument in rest)
