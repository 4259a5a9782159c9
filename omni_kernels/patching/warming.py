"""All that a first request would wait for, done before it: kernels compiled, blocks compiled."""

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

#: Of a rehearsal every third step is computed: so many steps are enough for forecasts of order 2, corrected.
STEPS = 10


@dataclass
class Warmup:
    """What a warm-up took; prints as lines.

    Attributes:
        seconds: of the whole rehearsal.
        compiled: which of Triton's kernels were compiled meanwhile.
    """

    seconds: float
    compiled: Compilations

    def __str__(self) -> str:
        return f"warmed up in {self.seconds:.1f} s\n{self.compiled}"


def warmup(pipe: Any, *, steps: int = STEPS, **arguments: Any) -> Warmup:
    """Run one short request, so that later ones of the same sizes find everything compiled.

    It computes and skips by turns, whatever the cache's thresholds say, and leaves nothing behind in it. Another size,
    batch or dtype may need other variants of the kernels: each kind of request has a warm-up of its own.

    Args:
        pipe: a diffusers pipeline, patched or not.
        steps: denoising steps; 3 n + 4 for a cache that forecasts with order n.
        arguments: of the pipeline's call (height, width, image, ...). Without a prompt, it is empty; without a
            generator, the images' noise is of one seed, and torch's own random numbers stay as they were.

    Raises:
        ValueError: fewer than two steps.
        Exception: whatever the pipeline's call raises.
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: a warm-up computes one step and skips one, at least")
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
