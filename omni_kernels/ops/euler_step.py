"""euler_step: one step of the probability-flow ODE, in one pass.

    out = sample + dt·velocity        sample, velocity, out: [B, ...]      dt: σ of the next step − σ of this one

What FlowMatchEulerDiscreteScheduler.step computes without stochastic sampling: in fp32, returned in velocity's dtype.
(There, dt·velocity is rounded to velocity's dtype before it is added; here nothing is rounded before the end.) It is a
weighted sum, and a call of `linear_forecast`. Moves the bytes of sample, velocity and out, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omni_kernels.ops._checks import DTYPES, alike, unlike
from omni_kernels.ops.linear_forecast import launch as launch_forecast
from omni_kernels.ops.linear_forecast import linear_forecast
from omni_kernels.ops.linear_forecast import reference as reference_forecast
from omni_kernels.registration import nbytes


def euler_step(sample: torch.Tensor, velocity: torch.Tensor, dt: float | torch.Tensor) -> torch.Tensor:
    """sample + dt·velocity, in fp32 until it is stored.

    Args:
        sample: [B, ...], fp32, fp16 or bf16, any strides: the latents.
        velocity: as sample, the model's output; the dtype may differ.
        dt: a number, or a tensor of no dimensions on the device of the others, which is not read to the host.

    Returns:
        A new contiguous tensor in sample's shape and velocity's dtype.

    Raises:
        ValueError: shapes or devices differ, a dtype is not allowed, or sample has no dimensions.
    """
    if not alike(sample, velocity):
        raise unlike("euler_step", sample=sample, velocity=velocity)
    if isinstance(dt, torch.Tensor) and (dt.dim() or dt.device != sample.device or dt.dtype not in DTYPES):
        raise unlike("euler_step", **{"a number of sample's": sample.new_empty(())}, dt=dt)
    return linear_forecast(sample, [velocity], _weights(dt), out=_out(sample, velocity))


def bytes_moved(sample: torch.Tensor, velocity: torch.Tensor, dt: float | torch.Tensor) -> int:
    """Bytes read and written."""
    return nbytes((sample, velocity, velocity)) + 4


def _weights(dt: float | torch.Tensor) -> Sequence[float] | torch.Tensor:
    return dt.reshape(1) if isinstance(dt, torch.Tensor) else [float(dt)]


def _out(sample: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor | None:
    """What linear_forecast has to be given, for it makes outputs in the dtype of its base."""
    return None if velocity.dtype == sample.dtype else velocity.new_empty(velocity.shape)


def reference(sample: torch.Tensor, velocity: torch.Tensor, dt: float | torch.Tensor) -> torch.Tensor:
    """In plain torch."""
    return reference_forecast(sample.float(), [velocity], _weights(dt)).to(velocity.dtype)


def launch(sample: torch.Tensor, velocity: torch.Tensor, dt: float | torch.Tensor) -> torch.Tensor:
    """With linear_forecast's Triton kernel."""
    return launch_forecast(sample, [velocity], _weights(dt), _out(sample, velocity))
