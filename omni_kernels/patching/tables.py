"""Bounds the memory of rotary tables, where diffusers keeps the tables of every size that a model was called with.

Qwen-Image-Layered's tables (`QwenEmbedLayer3DRope`) are the only ones without a bound: 2 MB for each layer of a picture
of 1024². They are computed as before, so the pictures keep their bits.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from omni_kernels.patching.changes import Patch

#: As many tables as diffusers keeps for other models.
MOST = 128
#: class → its methods that compute a table for a size
_UNBOUNDED = {"QwenEmbedLayer3DRope": ("_compute_video_freqs", "_compute_condition_freqs")}


def bound(pipe: Any, patch: Patch) -> None:
    """Make the pipeline's transformer keep the last `MOST` tables of each kind. If another patch has, it stays so."""
    transformer = getattr(pipe, "transformer", None)
    for module in transformer.modules() if isinstance(transformer, torch.nn.Module) else ():
        for name in _UNBOUNDED.get(type(module).__name__, ()):
            method: Any = getattr(type(module), name)
            if name not in vars(module) and hasattr(method, "__wrapped__"):
                patch.set_method(module, name, _last(types.MethodType(method.__wrapped__, module)))


def _last(computed: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`computed`, which keeps its last `MOST` tables. As in diffusers, compiled code computes its own."""
    kept = functools.lru_cache(maxsize=MOST)(computed)

    @functools.wraps(computed)
    def table(*args: Any, **kwargs: Any) -> torch.Tensor:
        return computed(*args, **kwargs) if torch.compiler.is_compiling() else kept(*args, **kwargs)

    return table
