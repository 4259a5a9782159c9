"""Linear layers that torchao has quantised, with activations that it quantises as they come.

Their 8-bit weights and scales are taken as they are, bit by bit and without a copy. Only the activations' scales are
computed by our kernel. They differ by up to 0.4%, so the results are equal up to a step of the activations' grid: for
int8, torchao divides a token's largest magnitude by 127.5, and we by 127; for fp8, both divide by the dtype's largest
value, but torchao rounds the scale to the activations' dtype.

torchao is not imported: its tensors are known by their class (`Int8Tensor` and `Float8Tensor`, torchao 0.14 or newer).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

#: Class of torchao's weights → dtype of its 8-bit values, and what `quantize` calls it.
KINDS = {"Int8Tensor": (torch.int8, "int8"), "Float8Tensor": (torch.float8_e4m3fn, "fp8")}


class Weights(NamedTuple):
    """A layer's weights as torchao holds them.

    Attributes:
        name: "int8" or "fp8".
        values: [N, K], int8 or fp8.
        scale: [N], fp32.
    """

    name: str
    values: torch.Tensor
    scale: torch.Tensor


def weights_of(layer: torch.nn.Linear) -> Weights | str | None:
    """What torchao has made of a layer's weights.

    Returns:
        Its weights; or why they cannot be taken over; None if torchao did not quantise the layer.
    """
    weight: Any = layer.weight.data
    kind = type(weight)
    if not kind.__module__.startswith("torchao"):
        return None
    why = _why_not(weight)
    if why is not None:
        return f"quantised by torchao ({kind.__name__}) {why}"
    scale = weight.scale.detach().float().flatten()
    return Weights(KINDS[kind.__name__][1], weight.qdata.detach(), scale.expand(weight.shape[0]).contiguous())


def _why_not(weight: Any) -> str | None:
    """Why a layer of torchao stays as it is; None if its weights can be taken over."""
    dtype, _ = KINDS.get(type(weight).__name__, (None, None))
    if dtype is None:
        return "in a way of its own"
    activations = getattr(weight, "act_quant_kwargs", None)
    if activations is None:
        return "with weights alone"
    if any(getattr(weight, name, None) is not None for name in ("act_quant_scale", "act_pre_scale")):
        return "with fixed scales of the activations"
    if "ASYMMETRIC" in str(getattr(activations, "mapping_type", "")):
        return "with asymmetric activations"
    if getattr(activations, "reduce_range", None) or _bounded(activations):
        return "with activations of a smaller range"
    rows = activations.granularity
    if type(rows).__name__ != "PerRow" or getattr(rows, "dim", -1) != -1:
        return "with one scale for all tokens"
    if weight.qdata.dtype != dtype or getattr(activations, "float8_dtype", dtype) != dtype:
        return f"in {str(weight.qdata.dtype)[6:]}"
    if list(weight.block_size) not in ([1, weight.shape[1]], list(weight.shape)):
        return "in groups"
    return None


def _bounded(activations: Any) -> bool:
    return any(getattr(activations, name, None) is not None for name in ("hp_value_lb", "hp_value_ub"))
