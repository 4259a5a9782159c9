"""`omni inspect`: where a model's blocks are, which of them are fused, and which caches work with it."""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import omni_kernels
from omni_kernels.patching import PatchConflictError, handle_of
from omni_runtime.cli.inputs import bar, make_omni, own_prompts, request_arguments, settle, wrong_input
from omni_runtime.cli.listings import SUMMARIES, print_wrapped
from omni_runtime.cli.output import print_json
from omni_runtime.compare import comparison
from omni_runtime.generation.omni import Omni

#: So many steps are run with each cache. The first is computed, so the blocks are found in it.
STEPS = 2


def inspect(options: argparse.Namespace) -> None:
    """Run a short request with each cache, and print what was found."""
    settle(options)
    with wrong_input():
        omni = make_omni(options)
        prompt, image = options.prompt, None
        if prompt is None:
            ((prompt, image),) = own_prompts(options, comparison.prompts_of(options.model, 1)) or [("a cat", None)]
        options.steps = STEPS
        arguments = request_arguments(options) | ({} if image is None else {"image": image})
        (request,) = omni.prepare(prompt, seed=0, **arguments)
        pipe = omni.pipe
    omni.close()
    pipe.set_progress_bar_config(disable=True)
    caches, found = dict[str, str | None](), None
    for name in SUMMARIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Omni(pipe, cache_backend=name) as omni, bar(options, name, STEPS) as on_step:
                    omni.run(copy.copy(request), on_step)
                    handle = handle_of(pipe)
                    found = found or (handle and handle.blocks)
                caches[name] = None
            except (ValueError, TypeError, RuntimeError, PatchConflictError) as error:
                caches[name] = str(error)
    with omni_kernels.patched(pipe, fuse=True) as handle:
        fused = handle.fused
    about: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "transformer": type(pipe.transformer).__name__,
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
