"""`omni inspect`: where a model's blocks are, which of them are fused, and which caches work with it.

A modular pipeline is loaded by diffusers, and called without `Omni`.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

import omni_kernels
from omni_kernels.patching import PatchConflictError, handle_of
from omni_runtime.cli.inputs import bar, make_omni, own_prompts, request_arguments, settle, wrong_input
from omni_runtime.cli.listings import SUMMARIES, print_wrapped
from omni_runtime.cli.options import UsageError
from omni_runtime.cli.output import print_json
from omni_runtime.compare import comparison
from omni_runtime.generation import loading
from omni_runtime.generation.omni import Omni

#: So many steps are run with each cache. The first is computed, so the blocks are found in it.
STEPS = 2


def inspect(options: argparse.Namespace) -> None:
    """Run a short request with each cache, and print what was found."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # a modular pipeline's loops have bars of their own
    settle(options)
    options.steps = STEPS
    with wrong_input():
        modular = loading.is_modular(options.model, {"revision": options.revision})
        pipe, run = (_modular if modular else _ordinary)(options)
    caches, found = dict[str, str | None](), None
    for name in SUMMARIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with bar(options, name, STEPS) as on_step:
                    found = run(name, on_step) or found
                caches[name] = None
            except (ValueError, TypeError, RuntimeError, PatchConflictError) as error:
                caches[name] = str(error)
    with omni_kernels.patched(pipe, fuse=True) as handle:
        fused = handle.fused
    about: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(getattr(pipe, "scheduler", None)).__name__,
        "transformer": type(getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)).__name__,
        "blocks": None if found is None else str(found).splitlines(),
        "fused": len(fused.replaced),
        "caches": caches,
    }
    if options.json:
        print_json(about)
        return
    print(f"{about['pipeline']}: {about['transformer']}, {about['scheduler']}")
    print("\nBlocks, as found in the first forward")
    for line in about["blocks"] or ["not found"]:
        print_wrapped(line, "  ", "    ")
    print("\nFused blocks")
    for line in str(fused).splitlines() or ["none"]:
        print_wrapped(line, "  ", "    ")
    print("\nCaches")
    width = max(map(len, caches)) + 2
    for name, reason in caches.items():
        print_wrapped(reason or "works", f"  {name:<{width}}", " " * (width + 2))


#: (name of a cache, function that is called after each step) → the blocks that were found, if any.
Run = Callable[[str, Any], Any]


def _ordinary(options: argparse.Namespace) -> tuple[Any, Run]:
    """The pipeline, and how to make a request with a cache."""
    omni = make_omni(options)
    prompt, image = options.prompt, None
    if prompt is None:
        ((prompt, image),) = own_prompts(options, comparison.prompts_of(options.model, 1)) or [("a cat", None)]
    arguments = request_arguments(options) | ({} if image is None else {"image": image})
    (request,) = omni.prepare(prompt, seed=0, **arguments)
    pipe = omni.pipe
    omni.close()
    pipe.set_progress_bar_config(disable=True)

    def run(name: str, on_step: Any) -> Any:
        with Omni(pipe, cache_backend=name) as omni:
            omni.run(copy.copy(request), on_step)
            handle = handle_of(pipe)
            return handle and handle.blocks

    return pipe, run


def _modular(options: argparse.Namespace) -> tuple[Any, Run]:
    """As `_ordinary`, for a modular pipeline.

    Raises:
        UsageError: it has no component that denoises.
    """
    from diffusers import ModularPipeline

    device = loading.resolve_device(options.device)
    given = {name: getattr(options, name) for name in ("revision", "variant") if getattr(options, name) is not None}
    pipe = ModularPipeline.from_pretrained(options.model, **given)
    pipe.load_components(torch_dtype=loading.resolve_dtype(options.dtype, device))
    if all(getattr(pipe, name, None) is None for name in ("transformer", "unet")):
        raise UsageError(f"{options.model}: none of its components is a transformer")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    arguments = {name: value for name, value in request_arguments(options).items() if value is not None}
    # Asked for an output by name: what all the pipeline's blocks have left behind would be returned otherwise.
    request = {"prompt": options.prompt or "a cat", **arguments, "output": "latents"}

    def run(name: str, on_step: Any) -> Any:
        with omni_kernels.patched(pipe, name) as handle, torch.no_grad():
            handle.on_step = on_step
            pipe(**request, generator=torch.Generator(device).manual_seed(0))
        return handle.blocks

    return pipe, run
