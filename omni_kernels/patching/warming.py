"""Warm-up: compiles kernels and blocks before the first request, which would otherwise wait for it."""

from __future__ import annotations

import contextlib
import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.compilations import Compilations, following
from omni_kernels.device import synchronize
from omni_kernels.patching.api import handle_of

#: A rehearsal computes every third step. 10 steps are enough for forecasts of order 2 with correction.
STEPS = 10


@dataclass
class Warmup:
    """The result of a warm-up; printable.

    Attributes:
        seconds: duration of the whole warm-up request.
        compiled: the Triton kernels that were compiled.
    """

    seconds: float
    compiled: Compilations

    def __str__(self) -> str:
        return f"warmed up in {self.seconds:.1f} s\n{self.compiled}"


def warmup(pipe: Any, *, steps: int = STEPS, **arguments: Any) -> Warmup:
    """Run one short request, so that everything is compiled for later requests of the same sizes.

    With a cache, some steps are computed and some skipped, whatever its thresholds are. No state stays in the cache.
    Another size, batch or dtype may need other variants of the kernels. So warm up once for each kind of request.

    Args:
        pipe: a diffusers pipeline, patched or not.
        steps: number of denoising steps; 3n + 4 for a cache that forecasts with order n.
        arguments: arguments of the pipeline's call (height, width, image, ...). The default prompt is empty. The
            default generator has a fixed seed, so torch's global random state is unchanged.

    Raises:
        ValueError: fewer than two steps.
        Exception: whatever the pipeline's call raises.
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: a warm-up needs at least two steps, to compute one and skip one")
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"num_inference_steps": steps} | arguments
    if "prompt" in takes and "prompt_embeds" not in given:
        given.setdefault("prompt", "")
    if "generator" in takes:
        given.setdefault("generator", torch.Generator().manual_seed(0))
    handle = handle_of(pipe)
    with following() as compiled, contextlib.nullcontext() if handle is None else handle.rehearsal():
        start = time.perf_counter()
        pipe(**given)
        synchronize(pipe._execution_device)
    return Warmup(time.perf_counter() - start, compiled)
