"""A linear layer with 8-bit weights, which quantises its input, or takes what an op has quantised.

y = (q · weightᵀ) · scale · weight_scale + bias        q: x in 8 bits, with a scale for each token (or MXFP8)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omni_kernels import ops
from omni_kernels.ops._quantized import MX
from omni_kernels.patching.activations import Quantized


class QuantizedLinear(torch.nn.Module):
    """A linear layer with 8-bit weights, which quantises its input.

    Moving it moves its weights; converting it to another dtype leaves them in 8 bits.

    Attributes:
        weight: [N, K], int8 or fp8.
        weight_scale: [N], fp32; in MXFP8 as `omni_kernels.ops.quantize` returns it.
        bias: [N], or None.
        own: layers that move and are converted with this one; they are not its children.
    """

    takes_8_bits = True
    weight: torch.Tensor
    weight_scale: torch.Tensor
    own: tuple[torch.nn.Linear, ...] = ()

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        self._hold(*ops.quantize(linear.weight.detach(), dtype), linear.bias)
        self.train(linear.training)

    @classmethod
    def holding(
        cls, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.nn.Parameter | None
    ) -> QuantizedLinear:
        """A layer with these 8-bit weights [N, K], scales [N] and bias [N], which are not copied."""
        self = cls.__new__(cls)
        self._hold(weight, weight_scale, bias)
        return self

    def _hold(self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("weight_scale", weight_scale)
        self.bias = bias

    @property
    def form(self) -> torch.dtype:
        """The dtype by which ops quantise for this layer."""
        return MX if self.weight_scale.dtype == MX else self.weight.dtype

    def forward(self, x: torch.Tensor | Quantized, out: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output, in x's dtype. States that are quantised already are taken as they are.

        Args:
            x: [..., K].
            out: where to write, [..., N]; None for a new tensor.
        """
        made: torch.Tensor = self._multiply(x, out=out)
        return made

    def gelu(self, x: torch.Tensor | Quantized) -> Quantized:
        """GELU of the layer's output, in 8 bits with a scale for each token and group of 128 channels."""
        q, scale = self._multiply(x, gelu=True, quantize=self.weight.dtype)
        return Quantized(q, scale, x.dtype)

    def _multiply(self, x: torch.Tensor | Quantized, **options: Any) -> Any:
        q, scale = (x.q, x.scale) if isinstance(x, Quantized) else ops.quantize(x, self.form)
        run = ops.trusted(q)
        return run.scaled_mm(q, scale, self.weight, self.weight_scale, self.bias, dtype=x.dtype, **options)

    def extra_repr(self) -> str:
        """Sizes and dtype, for printing."""
        return f"{self.in_features}, {self.out_features}, {str(self.weight.dtype)[6:]}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        own = {name: self._buffers.pop(name) for name in ("weight", "weight_scale")}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(own)
        for name, t in own.items():
            assert t is not None
            # As integers, which a conversion to another floating-point dtype does not change.
            bits = fn(t.view(torch.int8 if t.element_size() == 1 else torch.int32))
            self._buffers[name] = bits.view(t.dtype)
        for layer in self.own:
            layer._apply(fn, recurse)
        return self
