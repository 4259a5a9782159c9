"""Hidden states in 8 bits, on their way from a fused op to the quantised layers that take them.

An op that makes the input of quantised layers writes it in 8 bits itself. That saves the layers a pass over it each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from omni_kernels.ops._quantized import expanded
from omni_kernels.ops.scaled_mm import GROUP
from omni_kernels.patching.structure import any_hook, hooked


class Quantized(NamedTuple):
    """Hidden states that an op has quantised.

    Attributes:
        q: [..., D], int8 or fp8.
        scale: [...], fp32; in MXFP8 as `omni_kernels.ops.quantize` returns it.
        dtype: that of the results of the layers that take them.
        beside: the states in `dtype`, for layers that are not quantised; None if all are.
    """

    q: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
    beside: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the states."""
        return self.q.shape


def takes(layer: Any) -> bool:
    """Whether a layer takes `Quantized` states. One with hooks does not: they expect tensors."""
    return getattr(type(layer), "takes_8_bits", False) and not hooked(layer) and not any_hook()


def activates(first: Any, then: Any) -> bool:
    """Whether the product of a layer should also compute GELU and the 8 bits that the next layer takes.

    That saves a pass over the widest states of a block. It pays where our product is used anyway: in int8 on GPUs.
    torch's product in fp8 has no GELU, and gains more by its speed.
    """
    return (
        takes(first)
        and takes(then)
        and first.weight.dtype == then.weight.dtype == torch.int8
        and first.out_features % GROUP == 0
        and has_kernel(first.weight)
    )


def has_kernel(weight: torch.Tensor) -> bool:
    """Whether `scaled_mm` with these weights runs our kernel."""
    return weight.is_cuda


def for_layers(
    layers: Sequence[Any], op: Callable[..., Any], x: torch.Tensor, *args: Any, beside: bool = False, **options: Any
) -> Any:
    """The result of an op, of which these layers take the last part: as `Quantized` if some of them can.

    Args:
        layers: the layers that will be called with it.
        op: an op that can quantise its last result.
        x: the op's first argument; its dtype is that of the result.
        beside: whether the result is also needed in x's dtype.
    """
    taking = [layer for layer in layers if takes(layer)]
    if not taking:
        return op(x, *args, **options)
    beside = beside or len(taking) < len(layers)
    *others, q, scale, y = op(x, *args, quantize=taking[0].form, beside=beside, **options) + (() if beside else (None,))
    made = Quantized(q, scale, x.dtype, y)
    return (*others, made) if others else made


def project(layer: Any, x: Any) -> Any:
    """Call a layer with the result of `for_layers`. One that got a hook since then gets what the 8 bits hold."""
    if isinstance(x, Quantized) and not takes(layer):
        x = expanded(x.q, x.scale).to(x.dtype) if x.beside is None else x.beside
    return layer(x)
