"""Launches of every kernel, at the sizes of a large model, for tests/aot.py to compile: no element is looked at."""

from functools import partial

import torch
import triton
import triton.language as tl

from omni_kernels.ops import OPS

TOKENS, CHANNELS = 4096, 3072


def tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def odd() -> torch.Tensor:
    """One element more than divides by 16."""
    return tensor(1, TOKENS * CHANNELS + 1)


def batch() -> torch.Tensor:
    """Samples that start at multiples of 16, as those of a model do, and lie apart."""
    return tensor(2, TOKENS + 1, CHANNELS)[:, :TOKENS]


def row() -> torch.Tensor:
    return tensor(1, CHANNELS)


relative_l1, residual_relative_l1, modulated_relative_l1, linear_forecast = (
    OPS[name].launcher for name in ("relative_l1", "residual_relative_l1", "modulated_relative_l1", "linear_forecast")
)
h = tensor(1, TOKENS - 1, CHANNELS)


@triton.jit
def control_kernel(p_x, p_out, n, stride, BLOCK: tl.constexpr):
    """What no kernel of the package does: a mask on every block, a product of 32 bits, a floating-point atomic."""
    o = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.atomic_add(p_out, tl.sum(tl.load(p_x + o, mask=o < n, other=0.0).to(tl.float32)))


def control() -> None:
    x = odd()
    control_kernel[(1,)](x, torch.empty(1), x.numel(), 4096, BLOCK=4096, enable_fp_fusion=True)


# The first word is the op.
LAUNCHES = {
    "control": control,
    "relative_l1 odd": partial(relative_l1, odd(), odd()),
    "relative_l1 batch": partial(relative_l1, batch(), batch()),
    "residual_relative_l1 odd": partial(residual_relative_l1, odd(), odd(), odd()),
    "residual_relative_l1 batch": partial(residual_relative_l1, batch(), batch(), batch()),
    "residual_relative_l1 first": partial(residual_relative_l1, odd(), odd(), None),
    "modulated_relative_l1 layer": partial(modulated_relative_l1, h, row(), row(), h),
    "modulated_relative_l1 rms": partial(modulated_relative_l1, h, row(), None, h, norm="rms", weight=row()[0]),
    "modulated_relative_l1 per token": partial(modulated_relative_l1, h, h, h, h),
    "modulated_relative_l1 batch": partial(modulated_relative_l1, batch(), tensor(2, CHANNELS), None, batch()),
    "linear_forecast reuse": partial(linear_forecast, odd(), [odd()], [1.0]),
    "linear_forecast 3": partial(linear_forecast, odd(), [odd(), odd(), odd()], [1.0, -2.0, 0.5]),
    "linear_forecast batch": partial(linear_forecast, None, [batch(), batch()], [1.0, -2.0]),
    "linear_forecast 8": partial(linear_forecast, odd(), [odd() for _ in range(8)], [0.5] * 8),
    "linear_forecast 16": partial(linear_forecast, odd(), [odd() for _ in range(16)], [0.5] * 16),
    "linear_forecast tensor": partial(linear_forecast, odd(), [odd(), odd()], torch.empty(2)),
}
