"""Launches of every kernel, for `aot` to compile. The tensors' values are not used.

`models` has the ops' uses at the sizes of large models, in bf16. `configurations` has the launchers' other choices. A
configuration is what a launcher decides and a kernel is compiled for: its constants, except the caller's own sizes
(D, H), and its warps. Together with the caller's choices (which inputs, of which dtypes) there are millions of
combinations. So not all are compiled, but:

- every BLOCK with the most rows and every number of chunks that it is used with, every K, every layout of pairs, with
  and without a norm across heads, each with all inputs that the kernel can have, all in fp32. With fewer inputs, fewer
  rows or a smaller dtype, a program holds less. Where a smaller dtype means fewer threads, it is compiled as well.
- every number of rows and of warps, the absence of every input, every flag and every dtype of every input, at least
  once.

`tests/ops/test_configurations.py` checks both against what the launchers launch for all widths.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from omni_kernels.ops import OPS, _norms, _samples
from omni_kernels.ops import _chunks as _row_chunks

TOKENS, CHANNELS = 4096, 3072

Launch = partial[Any]


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _odd(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """One element more than a multiple of 16."""
    return _tensor(1, TOKENS * CHANNELS + 1, dtype=dtype)


def _batch() -> torch.Tensor:
    """Samples with a gap between them that start at multiples of 16, as in models."""
    return _tensor(2, TOKENS + 1, CHANNELS)[:, :TOKENS]


def _row() -> torch.Tensor:
    return _tensor(1, CHANNELS)


def attention(
    B: int,
    S: int,
    H: int,
    D: int,
    text: int,
    weighted: int = 0,
    rotated: bool = True,
    tables: torch.dtype | None = None,
    dtype: torch.dtype = torch.bfloat16,
    v: bool = True,
    by_head: bool = False,
    **options: Any,
) -> Launch:
    """A launch on the thirds of a packed projection, which writes the image's part of a sequence after `text` tokens.

    The rotation is by freqs, or by tables of cosines and sines with dtype `tables`, for each sample and head if
    `by_head`. `v` says whether there is a v.
    """
    inputs: list[torch.Tensor | None] = [*_tensor(B, S, 3, H, D, dtype=dtype).unbind(2)]
    outputs: list[torch.Tensor | None] = [_tensor(B, text + S, H, D, dtype=dtype)[:, text:] for _ in range(3)]
    if not v:
        inputs[2] = outputs[2] = None
    options |= {name: _tensor(weighted, dtype=dtype) for name in ("q_weight", "k_weight") if weighted}
    if tables is not None:
        shape = (B, S, H, D) if by_head else (S, D)
        options |= {name: _tensor(*shape, dtype=tables) for name in ("cos", "sin")}
    elif rotated:
        options |= {"freqs": torch.empty(S, D // 2, 2)}
    return partial(OPS["qk_norm_rope"].launcher, *inputs, *outputs, **options)


def _chunks(B: int) -> tuple[torch.Tensor, ...]:
    """Scale, shift and gate as views of one projection."""
    return _tensor(B, 6 * CHANNELS).chunk(6, 1)[:3]


def table() -> dict[str, Launch]:
    """Name → a function without arguments that launches. The first word of a name is the op."""
    return models() | configurations()


def models() -> dict[str, Launch]:
    """The ops' uses, in bf16 unless stated otherwise."""
    relative_l1, residual_relative_l1, modulated_relative_l1, linear_forecast = (
        OPS[name].launcher
        for name in ("relative_l1", "residual_relative_l1", "modulated_relative_l1", "linear_forecast")
    )
    ada_layer_norm, gate_residual_norm, rms_norm = (
        OPS[name].launcher for name in ("ada_layer_norm", "gate_residual_norm", "rms_norm")
    )
    gelu, swiglu, quantize = (OPS[name].launcher for name in ("gelu", "swiglu", "quantize"))
    h = _tensor(1, TOKENS - 1, CHANNELS)
    # fp32 modulations, one for every token, as views of one projection.
    timesteps = torch.empty(1, TOKENS - 1, 6, CHANNELS).chunk(6, 2)
    per_token = [t.squeeze(2) for t in timesteps[:3]]
    # Which of two modulations each token takes.
    index = torch.empty(2, TOKENS, dtype=torch.int32)
    z_image = _tensor(2, 129, 3840)
    return (
        {
            "relative_l1 odd": partial(relative_l1, _odd(), _odd()),
            "relative_l1 batch": partial(relative_l1, _batch(), _batch()),
            "residual_relative_l1 odd": partial(residual_relative_l1, _odd(), _odd(), _odd()),
            "residual_relative_l1 batch": partial(residual_relative_l1, _batch(), _batch(), _batch()),
            "residual_relative_l1 first": partial(residual_relative_l1, _odd(), _odd(), None),
            "modulated_relative_l1 layer": partial(modulated_relative_l1, h, _row(), _row(), h),
            "modulated_relative_l1 rms": partial(
                modulated_relative_l1, h, _row(), None, h, norm="rms", weight=_row()[0]
            ),
            "modulated_relative_l1 per token": partial(modulated_relative_l1, h, h, h, h),
            "modulated_relative_l1 first": partial(modulated_relative_l1, h, _row(), _row(), None),
            "modulated_relative_l1 batch": partial(
                modulated_relative_l1, _batch(), _tensor(2, CHANNELS), None, _batch()
            ),
            "ada_layer_norm layer": partial(ada_layer_norm, h, *_chunks(1)[:2]),
            "ada_layer_norm index": partial(ada_layer_norm, _batch(), *_chunks(4)[:2], index),
            "ada_layer_norm rms": partial(
                ada_layer_norm, z_image, _tensor(2, 1, 3840), norm="rms", weight=_tensor(3840)
            ),
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
            "gate_residual_norm affine": partial(
                gate_residual_norm, h, h, _chunks(1)[0], weight=_row()[0], bias=_row()[0]
            ),
            "gate_residual_norm h alone": partial(gate_residual_norm, h, h, _chunks(1)[0], norm=None),
            "gate_residual_norm no gate": partial(gate_residual_norm, h, h),
            "rms_norm tokens": partial(rms_norm, h, _row()[0]),
            "rms_norm heads": partial(rms_norm, _tensor(2, TOKENS, 3, 24, 128)[:, :, 1], _tensor(128)),
            "rms_norm no weight": partial(rms_norm, h),
            "linear_forecast reuse": partial(linear_forecast, _odd(), [_odd()], [1.0]),
            "linear_forecast 3": partial(linear_forecast, _odd(), [_odd(), _odd(), _odd()], [1.0, -2.0, 0.5]),
            "linear_forecast batch": partial(linear_forecast, None, [_batch(), _batch()], [1.0, -2.0]),
            "linear_forecast 8": partial(linear_forecast, _odd(), [_odd() for _ in range(8)], [0.5] * 8),
            "linear_forecast 16": partial(linear_forecast, _odd(), [_odd() for _ in range(16)], [0.5] * 16),
            "linear_forecast tensor": partial(linear_forecast, _odd(), [_odd(), _odd()], _tensor(2)),
            # Qwen-Image, Z-Image, FLUX, Wan, LTX, and other forms.
            "qk_norm_rope joint": attention(1, TOKENS - 1, 24, 128, 37, weighted=128),
            "qk_norm_rope joint without v": attention(1, TOKENS - 1, 24, 128, 37, weighted=128, v=False),
            "qk_norm_rope batch": attention(2, 1023, 30, 128, 0, weighted=128),
            "qk_norm_rope across": attention(1, 33, 40, 128, 0, weighted=40 * 128, across_heads=True),
            "qk_norm_rope across without v": attention(
                1, 33, 40, 128, 0, weighted=40 * 128, tables=torch.float32, across_heads=True, v=False
            ),
            "qk_norm_rope across, small": attention(1, 33, 12, 128, 0, weighted=12 * 128, across_heads=True),
            "qk_norm_rope across, largest": attention(1, 9, 64, 128, 0, weighted=64 * 128, across_heads=True),
            "qk_norm_rope half": attention(1, TOKENS - 1, 24, 128, 37, weighted=128, layout="half"),
            "qk_norm_rope heads of 64": attention(1, TOKENS - 1, 24, 64, 37, weighted=64),
            "qk_norm_rope heads of 96": attention(1, TOKENS - 1, 24, 96, 37, weighted=96),
            "qk_norm_rope heads of 256": attention(1, TOKENS - 1, 24, 256, 37, weighted=256),
            "qk_norm_rope cos and sin": attention(1, TOKENS - 1, 24, 128, 37, weighted=128, tables=torch.float32),
            "qk_norm_rope cos and sin, half": attention(
                1, TOKENS - 1, 24, 128, 37, weighted=128, tables=torch.float32, layout="half"
            ),
            "qk_norm_rope cos and sin, across": attention(
                1, 33, 40, 128, 0, weighted=40 * 128, tables=torch.float32, across_heads=True
            ),
            "qk_norm_rope cos and sin, across, largest": attention(
                1, 9, 64, 128, 0, weighted=64 * 128, tables=torch.float32, across_heads=True
            ),
            "qk_norm_rope cos and sin by head, across": attention(
                2, 33, 32, 64, 0, weighted=32 * 64, tables=torch.float32, across_heads=True, v=False, by_head=True
            ),
            "qk_norm_rope no norm": attention(1, TOKENS - 1, 24, 128, 37),
            "qk_norm_rope no rotation": attention(1, TOKENS - 1, 24, 128, 37, weighted=128, rotated=False),
            "gelu odd": partial(gelu, _odd()),
            "gelu batch": partial(gelu, _batch()),
            "gelu behind": partial(
                gelu, _tensor(1, TOKENS, 4 * CHANNELS), out=_tensor(1, TOKENS, 5 * CHANNELS)[..., CHANNELS:]
            ),
            "swiglu odd": partial(swiglu, _odd(), _odd()),
            "swiglu packed": partial(swiglu, *_tensor(1, TOKENS, 2 * 10240).chunk(2, -1)),
            "swiglu behind": partial(
                swiglu,
                *_tensor(1, TOKENS, 6 * CHANNELS).chunk(2, -1),
                out=_tensor(1, TOKENS, 4 * CHANNELS)[..., CHANNELS:],
            ),
            "quantize int8": partial(quantize, h, torch.int8),
            "quantize int8 behind": partial(quantize, _tensor(2, TOKENS, 5 * CHANNELS)[..., CHANNELS:], torch.int8),
            "quantize float8_e4m3fn": partial(quantize, h, torch.float8_e4m3fn),
            "quantize float8_e4m3fnuz": partial(quantize, h, torch.float8_e4m3fnuz),
            "quantize float8_e4m3fn mx": partial(quantize, h, torch.float8_e8m0fnu),
        }
        | _in_8_bits(h)
        | _products()
    )


def _in_8_bits(h: torch.Tensor) -> dict[str, Launch]:
    """The ops that write 8 bits themselves, alone and beside h's dtype."""
    fed = _tensor(1, TOKENS, 4 * CHANNELS)
    runs = {
        "ada_layer_norm": (h, *_chunks(1)[:2]),
        "gate_residual_norm": (h, h, *_chunks(1)),
        "rms_norm": (h, _row()[0]),
        "gelu": (fed,),
        "swiglu": _tensor(1, TOKENS, 2 * 10240).chunk(2, -1),
    }
    forms = {str(dtype)[6:]: dtype for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)}
    forms["float8_e4m3fn mx"] = torch.float8_e8m0fnu
    return {
        f"{op} {name}" + (" beside" if beside else ""): partial(
            OPS[op].launcher, *inputs, quantize=dtype, beside=beside
        )
        for op, inputs in runs.items()
        for name, dtype in forms.items()
        for beside in ((False, True) if dtype == torch.int8 else (False,))
    }


def _products() -> dict[str, Launch]:
    """scaled_mm of an image's and a text's tokens: with GELU, to fp32 or 8 bits, with a scale for tokens or groups."""
    run, found = OPS["scaled_mm"].launcher, {}
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        name, one, groups = f"scaled_mm {str(dtype)[6:]}", torch.empty(TOKENS), torch.empty(TOKENS, CHANNELS // 128)
        x, weight = _tensor(TOKENS, CHANNELS, dtype=dtype), _tensor(CHANNELS, CHANNELS, dtype=dtype)
        scale, bias = torch.empty(CHANNELS), torch.empty(CHANNELS)
        options: dict[str, Any] = {"dtype": torch.float32, "gelu": True}
        found[f"{name} gelu"] = partial(run, x, one, weight, scale, bias, **options, quantize=dtype)
        found[f"{name} groups"] = partial(run, x, groups, weight, scale, bias, **options)
        if dtype != torch.int8:
            continue
        found[f"{name} fp32"] = partial(run, x, one, weight, scale, bias, **options)
        found[f"{name} groups, gelu"] = partial(run, x, groups, weight, scale, bias, **options, quantize=dtype)
        found[f"{name} no bias"] = partial(run, x, one, weight, scale)
        found[f"{name} fp16"] = partial(run, x, one, weight, scale, bias.half(), dtype=torch.float16)
        found[f"{name} bf16"] = partial(run, x, one, weight, scale, bias.bfloat16())
        x, one, groups = x[:512], one[:512], groups[:512]
        for form, scales in (("", one), (" groups,", groups)):
            found[f"{name}{form} text"] = partial(run, x, scales, weight, scale, bias, **options)
            found[f"{name}{form} text, gelu"] = partial(run, x, scales, weight, scale, bias, **options, quantize=dtype)
    return found


def configurations() -> dict[str, Launch]:
    """The launchers' other choices."""
    found: dict[str, Launch] = {}
    for block in _powers(_samples.MIN_WIDTH, _norms.MAX_TRITON_CHANNELS):
        # Multiples of 16. With more masked, a row would be cut into chunks.
        D = block - max(16, block // 16) if block >= 64 else block
        found |= {f"{op} fp32, {D} wide": run for op, run in _rows(D, torch.float32).items()}
    for count in _row_chunks.COUNTS[1:]:
        for block in _powers(_row_chunks.MIN_CHUNK, _norms.MAX_TRITON_CHANNELS // count):
            D = count * block - block // 4
            for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
                found |= {f"{op} {name}, {D} wide": run for op, run in _rows(D, dtype).items()}
    found |= {f"{op} fp16": run for op, run in _rows(4000, torch.float16).items()}
    for D in (19456, 22528):
        x, up = (_tensor(1, 9, D) for _ in range(2))
        found[f"gelu int8, {D} wide"] = partial(OPS["gelu"].launcher, x, quantize=torch.int8, beside=True)
        found[f"swiglu int8, {D} wide"] = partial(OPS["swiglu"].launcher, x, up, quantize=torch.int8, beside=True)
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16")):
        x = _odd(dtype)
        for op, inputs in {
            "relative_l1": (x, x),
            "residual_relative_l1": (x, x, x),
            "gelu": (x,),
            "swiglu": (x, x),
            "linear_forecast": (x, [x], _tensor(1, dtype=dtype)),
        }.items():
            found[f"{op} {name}, odd"] = partial(OPS[op].launcher, *inputs)
    x = _odd(torch.float32)
    for K in range(2, _file("linear_forecast").MAX_HISTORY + 1):
        found[f"linear_forecast fp32, {K}"] = partial(OPS["linear_forecast"].launcher, x, [x] * K, torch.empty(K))
    return found | _heads()


def _powers(first: int, last: int) -> list[int]:
    return [1 << k for k in range(first.bit_length() - 1, last.bit_length())]


def _width(block: int) -> int:
    """A number of channels that needs this BLOCK: three quarters of it from 64 on, so that the rest is masked."""
    return block * 3 // 4 if block >= 64 else block


def _file(op: str) -> Any:
    return importlib.import_module(f"omni_kernels.ops.{op}")


def _rows(D: int, dtype: torch.dtype) -> dict[str, Launch]:
    """Each op that holds whole rows and supports this width, with all its inputs and twice the rows of a tile."""
    count, block = _row_chunks.chunks(D)

    def tensors(op: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        S = 2 * max(1, _file(op).TILE // (count * block))
        return [_tensor(*(S if n < 0 else n for n in shape), dtype=dtype) for shape in shapes]

    x, modulation, vector = (2, -1, D), (4, D), (D,)
    both = {"quantize": torch.int8, "beside": True}
    y, gain = tensors("rms_norm", x, vector)
    z, up = tensors("quantize", x, x)
    found = {
        "rms_norm": partial(OPS["rms_norm"].launcher, y, gain, **both),
        "gelu int8": partial(OPS["gelu"].launcher, z, **both),
        "swiglu int8": partial(OPS["swiglu"].launcher, z, up, **both),
    }
    if D <= _file("modulated_relative_l1").MAX_TRITON_CHANNELS:
        h, scale, shift, prev, weight = tensors("modulated_relative_l1", x, (2, D), (2, D), x, vector)
        run = OPS["modulated_relative_l1"].launcher
        found["modulated_relative_l1"] = partial(run, h, scale, shift, prev, weight=weight)
    if D <= _file("ada_layer_norm").MAX_TRITON_CHANNELS:
        h, scale, shift, weight, bias = tensors("ada_layer_norm", x, modulation, modulation, vector, vector)
        index = torch.empty(h.shape[:2], dtype=torch.int64)
        found["ada_layer_norm"] = partial(
            OPS["ada_layer_norm"].launcher, h, scale, shift, index, weight=weight, bias=bias, **both
        )
    if D <= _file("gate_residual_norm").MAX_TRITON_CHANNELS:
        h, y, gate, scale, shift = tensors("gate_residual_norm", x, x, modulation, modulation, modulation)
        x_weight, weight, bias = tensors("gate_residual_norm", vector, vector, vector)
        index = torch.empty(h.shape[:2], dtype=torch.int64)
        found["gate_residual_norm"] = partial(
            OPS["gate_residual_norm"].launcher,
            h,
            y,
            gate,
            scale,
            shift,
            index,
            True,
            x_weight,
            weight=weight,
            bias=bias,
            **both,
        )
    return found


def _heads() -> dict[str, Launch]:
    """qk_norm_rope with norm and tables: every head width, per head and across the longest tokens, every cut."""
    file = _file("qk_norm_rope")
    found: dict[str, Launch] = {}
    for layout in file.LAYOUTS:
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            options: dict[str, Any] = {"tables": torch.float32, "dtype": dtype, "layout": layout}
            for block in _powers(_samples.MIN_WIDTH, file.MAX_HEAD_SIZE):
                D = _width(block)
                rows = file.TILE // block * (1 if layout == "interleaved" else 2)
                chunks, across, most = (
                    file.MAX_CHUNKS[layout], file.MAX_CHUNKS_ACROSS[layout], file.MAX_TRITON_TOKEN // block
                )  # fmt: skip
                found[f"qk_norm_rope {name}, {layout}, heads of {D}"] = attention(
                    1, 9, rows * chunks, D, 0, weighted=D, **options
                )
                for H in {rows * across, rows * across // 2, most}:
                    if 1 < H <= most:
                        found[f"qk_norm_rope {name}, {layout}, across {H} of {D}"] = attention(
                            1, 9, H, D, 0, weighted=H * D, across_heads=True, **options
                        )
    for H in (1, 2, 4, 8, 16, 32, 40, 48, 56):
        found[f"qk_norm_rope {H} heads"] = attention(1, 9, H, 128, 0, weighted=128)
        found[f"qk_norm_rope across {H} heads"] = attention(1, 9, H, 128, 0, weighted=H * 128, across_heads=True)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        found[f"qk_norm_rope tables too in {name}"] = attention(
            1, 9, 24, 128, 0, weighted=128, tables=dtype, dtype=dtype
        )
    return found
