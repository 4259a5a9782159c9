"""Activations of fp32 values, for kernels."""

from __future__ import annotations

from omni_kernels.ops._triton import tl, triton


@triton.jit
def gelu_of(x):
    """GELU of x in fp32. Uses ½·(1 + tanh(u)) = logistic(2u), which loses no precision where tanh(u) is near −1."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def silu_of(x):
    """silu(x) of x in fp32."""
    return x / (1.0 + tl.exp(-x))
