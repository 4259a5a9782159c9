"""What `make bench` and `make gpu` measure: every case, at every shape, with every provider.

In addition to the cases of `omni_kernels.validate`, this times the variants in Qwen-Image's blocks, and each case at
the shapes that it has there: GELU on 4 · 3072 channels, and the blocks' ops on the prompt's tokens, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.providers import PROVIDERS, unavailable
from omni_kernels.device import device_count
from omni_kernels.validation import measurement
from omni_kernels.validation.cases import CASES, Case, Inputs, Values
from omni_kernels.validation.measurement import Row
from omni_kernels.validation.shapes import CPU_DIVISOR, QWEN_IMAGE, QWEN_IMAGE_EDIT, Shape, shapes_for
from omni_kernels.validation.uses import USES


def _variant(name: str, eager: Callable[[Inputs], Values], values: Callable[[Any], Values]) -> Case:
    return Case(**vars(USES[name]), eager=eager, values=values)


def _by_index(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select one of two rows for each token, as Qwen-Image-Edit-2511's blocks do."""
    first, second = rows.unsqueeze(1).chunk(2)
    return torch.where(index.unsqueeze(-1) == 0, first, second)


def _normed(x: torch.Tensor, i: Inputs) -> torch.Tensor:
    shift, scale = (_by_index(i[name], i["index"]) for name in ("shift", "scale"))
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _gated_by_index(i: Inputs) -> Values:
    h = i["residual"] + _by_index(i["gate"], i["index"]) * i["x"]
    return h, _normed(h, i)


VARIANTS = (
    _variant("ada_layer_norm index", lambda i: (_normed(i["x"], i),), lambda out: (out,)),
    _variant("gate_residual_norm index", _gated_by_index, lambda out: out),
    _variant(
        "gate_residual_norm h alone",
        lambda i: (i["residual"] + i["gate"].unsqueeze(1) * i["x"],),
        lambda out: out[:1],
    ),
)
#: The timed cases, by name.
TIMED: dict[str, Case] = CASES | {case.name: case for case in VARIANTS}

QWEN_TEXT = Shape("qwen-image-text", 1, 128, QWEN_IMAGE.D, QWEN_IMAGE.dtype)
QWEN_FEED_FORWARD = Shape("qwen-image-1024-ffn", 1, QWEN_IMAGE.S, 4 * QWEN_IMAGE.D, QWEN_IMAGE.dtype)
_STREAMS = (QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_TEXT)
#: Case → Qwen-Image's shapes, if they differ from those of the hidden states.
QWEN_SHAPES: dict[str, tuple[Shape, ...]] = {
    "gelu": (QWEN_FEED_FORWARD, Shape("qwen-image-text-ffn", 1, 128, 4 * QWEN_IMAGE.D, QWEN_IMAGE.dtype)),
    "ada_layer_norm index": (QWEN_IMAGE_EDIT,),
    "gate_residual_norm index": (QWEN_IMAGE_EDIT,),
    "ada_layer_norm layer": _STREAMS,
    "gate_residual_norm layer": _STREAMS,
    "gate_residual_norm h alone": _STREAMS,
    "qk_norm_rope": _STREAMS,
    "qk_norm_rope without v": _STREAMS,
}


def shapes_of(case: Case, device: torch.device) -> list[Shape]:
    """The shapes at which a case is measured on `device`."""
    shapes = list(shapes_for(device))
    if case.name not in QWEN_SHAPES:
        return shapes
    own = QWEN_SHAPES[case.name]
    if device.type == "cpu":
        own = tuple(dataclasses.replace(shape, S=max(shape.S // CPU_DIVISOR, 16)) for shape in own)
    return [*own, *(shape for shape in shapes if shape.name not in (QWEN_IMAGE.name, QWEN_IMAGE_EDIT.name))]


def of_qwen_image(row: Row) -> bool:
    """Whether a row is of a shape of Qwen-Image."""
    return row.shape.startswith("qwen-image")


def device_here() -> torch.device:
    """The GPU, if there is one, else the CPU."""
    return torch.device("cuda" if device_count("cuda") else "cpu")


def measure(case: Case, shape: Shape, provider: str, device: torch.device) -> Row:
    """Check and time one combination, if it is available."""
    reason = unavailable(provider, shape, device)
    if reason is not None:
        return Row(case.name, str(shape), provider, 0, None, None, None, reason)
    return measurement.measure(case, shape, provider, PROVIDERS[provider](case), device)


def combinations(device: torch.device) -> list[tuple[Case, Shape, str]]:
    """Everything that is measured on `device`; the providers of a case and shape are consecutive."""
    return [(case, shape, p) for case in TIMED.values() for shape in shapes_of(case, device) for p in PROVIDERS]
