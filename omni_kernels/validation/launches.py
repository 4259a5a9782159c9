"""Launches of every kernel, at the sizes of a large model, for `aot` to compile: no element is looked at."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from omni_kernels.ops import OPS

TOKENS, CHANNELS = 4096, 3072

Launch = partial[Any]


def _tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _odd() -> torch.Tensor:
    """One element more than divides by 16."""
    return _tensor(1, TOKENS * CHANNELS + 1)


def _batch() -> torch.Tensor:
    """Samples that start at multiples of 16, as those of a model do, and lie apart."""
    return _tensor(2, TOKENS + 1, CHANNELS)[:, :TOKENS]


def _row() -> torch.Tensor:
    return _tensor(1, CHANNELS)


def _attention(
    B: int,
    S: int,
    H: int,
    D: int,
    text: int,
    weighted: int = 0,
    rotated: bool = True,
    tables: bool = False,
    **options: Any,
) -> Launch:
    """A launch on the thirds of a packed projection, into the places of the image behind `text` tokens.

    Rotated by freqs, or by tables of cosines and sines.
    """
    inputs = _tensor(B, S, 3, H, D).unbind(2)
    outputs = [_tensor(B, text + S, H, D)[:, text:] for _ in range(3)]
    options |= {name: _tensor(weighted) for name in ("q_weight", "k_weight") if weighted}
    if rotated:
        options |= (
            {name: torch.empty(S, D) for name in ("cos", "sin")} if tables else {"freqs": torch.empty(S, D // 2, 2)}
        )
    return partial(OPS["qk_norm_rope"].launcher, *inputs, *outputs, **options)


def _chunks(B: int) -> tuple[torch.Tensor, ...]:
    """Scale, shift and gate as views of one projection."""
    return _tensor(B, 6 * CHANNELS).chunk(6, 1)[:3]


def table() -> dict[str, Launch]:
    """Name → what launches, without arguments. The first word of a name is the op; what is not said is in bf16."""
    relative_l1, residual_relative_l1, modulated_relative_l1, linear_forecast = (
        OPS[name].launcher
        for name in ("relative_l1", "residual_relative_l1", "modulated_relative_l1", "linear_forecast")
    )
    ada_layer_norm, gate_residual_norm, rms_norm = (
        OPS[name].launcher for name in ("ada_layer_norm", "gate_residual_norm", "rms_norm")
    )
    gelu, swiglu, cfg_combine, euler_step = (
        OPS[name].launcher for name in ("gelu", "swiglu", "cfg_combine", "euler_step")
    )
    h = _tensor(1, TOKENS - 1, CHANNELS)
    # fp32, one for every token, as views of one projection.
    timesteps = torch.empty(1, TOKENS - 1, 6, CHANNELS).chunk(6, 2)
    per_token = [t.squeeze(2) for t in timesteps[:3]]
    # Which of two modulations a token takes.
    index = torch.empty(2, TOKENS, dtype=torch.int32)
    z_image = _tensor(2, 129, 3840)
    return {
        "relative_l1 odd": partial(relative_l1, _odd(), _odd()),
        "relative_l1 batch": partial(relative_l1, _batch(), _batch()),
        "residual_relative_l1 odd": partial(residual_relative_l1, _odd(), _odd(), _odd()),
        "residual_relative_l1 batch": partial(residual_relative_l1, _batch(), _batch(), _batch()),
        "residual_relative_l1 first": partial(residual_relative_l1, _odd(), _odd(), None),
        "modulated_relative_l1 layer": partial(modulated_relative_l1, h, _row(), _row(), h),
        "modulated_relative_l1 rms": partial(modulated_relative_l1, h, _row(), None, h, norm="rms", weight=_row()[0]),
        "modulated_relative_l1 per token": partial(modulated_relative_l1, h, h, h, h),
        "modulated_relative_l1 batch": partial(modulated_relative_l1, _batch(), _tensor(2, CHANNELS), None, _batch()),
        "ada_layer_norm layer": partial(ada_layer_norm, h, *_chunks(1)[:2]),
        "ada_layer_norm index": partial(ada_layer_norm, _batch(), *_chunks(4)[:2], index),
        "ada_layer_norm rms": partial(ada_layer_norm, z_image, _tensor(2, 1, 3840), norm="rms", weight=_tensor(3840)),
        "ada_layer_norm affine": partial(ada_layer_norm, h, None, weight=_row()[0], bias=_row()[0]),
        "ada_layer_norm per token": partial(ada_layer_norm, h, *per_token[:2]),
        "gate_residual_norm layer": partial(gate_residual_norm, h, h, *_chunks(1)),
        "gate_residual_norm index": partial(gate_residual_norm, _batch(), _batch(), *_chunks(4), index),
        "gate_residual_norm rms": partial(
            gate_residual_norm,
            z_image,
            z_image,
            _tensor(2, 1, 3840),
            _tensor(2, 1, 3840),
            gate_tanh=True,
            x_weight=_tensor(3840),
            norm="rms",
            weight=_tensor(3840),
        ),
        "gate_residual_norm per token": partial(gate_residual_norm, h, h, *per_token),
        "gate_residual_norm h alone": partial(gate_residual_norm, h, h, _chunks(1)[0], norm=None),
        "gate_residual_norm wide": partial(
            gate_residual_norm,
            *(torch.empty(1, 9, 8192) for _ in range(5)),
            gate_tanh=True,
            x_weight=torch.empty(8192),
            weight=torch.empty(8192),
            bias=torch.empty(8192),
        ),
        "rms_norm tokens": partial(rms_norm, h, _row()[0]),
        "rms_norm heads": partial(rms_norm, _tensor(2, TOKENS, 3, 24, 128)[:, :, 1], _tensor(128)),
        "linear_forecast reuse": partial(linear_forecast, _odd(), [_odd()], [1.0]),
        "linear_forecast 3": partial(linear_forecast, _odd(), [_odd(), _odd(), _odd()], [1.0, -2.0, 0.5]),
        "linear_forecast batch": partial(linear_forecast, None, [_batch(), _batch()], [1.0, -2.0]),
        "linear_forecast 8": partial(linear_forecast, _odd(), [_odd() for _ in range(8)], [0.5] * 8),
        "linear_forecast 16": partial(linear_forecast, _odd(), [_odd() for _ in range(16)], [0.5] * 16),
        "linear_forecast tensor": partial(linear_forecast, _odd(), [_odd(), _odd()], torch.empty(2)),
        # Qwen-Image, Z-Image, FLUX, Wan, and what none of them is.
        "qk_norm_rope joint": _attention(1, TOKENS - 1, 24, 128, 37, weighted=128),
        "qk_norm_rope batch": _attention(2, 1023, 30, 128, 0, weighted=128),
        "qk_norm_rope across": _attention(1, 33, 40, 128, 0, weighted=40 * 128, across_heads=True),
        "qk_norm_rope across, small": _attention(1, 33, 12, 128, 0, weighted=12 * 128, across_heads=True),
        "qk_norm_rope across, largest": _attention(1, 9, 64, 128, 0, weighted=64 * 128, across_heads=True),
        "qk_norm_rope half": _attention(1, TOKENS - 1, 24, 128, 37, weighted=128, layout="half"),
        "qk_norm_rope heads of 64": _attention(1, TOKENS - 1, 24, 64, 37, weighted=64),
        "qk_norm_rope heads of 96": _attention(1, TOKENS - 1, 24, 96, 37, weighted=96),
        "qk_norm_rope heads of 256": _attention(1, TOKENS - 1, 24, 256, 37, weighted=256),
        "qk_norm_rope cos and sin": _attention(1, TOKENS - 1, 24, 128, 37, weighted=128, tables=True),
        "qk_norm_rope cos and sin, half": _attention(
            1, TOKENS - 1, 24, 128, 37, weighted=128, tables=True, layout="half"
        ),
        "qk_norm_rope cos and sin, across": _attention(
            1, 33, 40, 128, 0, weighted=40 * 128, tables=True, across_heads=True
        ),
        "qk_norm_rope cos and sin, across, largest": _attention(
            1, 9, 64, 128, 0, weighted=64 * 128, tables=True, across_heads=True
        ),
        "qk_norm_rope no norm": _attention(1, TOKENS - 1, 24, 128, 37),
        "qk_norm_rope no rotation": _attention(1, TOKENS - 1, 24, 128, 37, weighted=128, rotated=False),
        "gelu odd": partial(gelu, _odd()),
        "gelu batch": partial(gelu, _batch()),
        "gelu behind": partial(
            gelu, _tensor(1, TOKENS, 4 * CHANNELS), _tensor(1, TOKENS, 5 * CHANNELS)[..., CHANNELS:]
        ),
        "swiglu odd": partial(swiglu, _odd(), _odd()),
        "swiglu packed": partial(swiglu, *_tensor(1, TOKENS, 2 * 10240).chunk(2, -1)),
        "cfg_combine odd": partial(cfg_combine, _odd(), _odd(), 4.0),
        "cfg_combine token": partial(cfg_combine, _tensor(1, TOKENS - 1, 64), _tensor(1, TOKENS - 1, 64), 4.0, "token"),
        "linear_forecast euler_step": partial(euler_step, torch.empty(1, TOKENS * CHANNELS + 1), _odd(), -0.05),
    }
