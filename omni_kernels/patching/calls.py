"""Block by block: regional compilation, one graph shared by all blocks of a class, and recording (`graphs`).

What runs between the blocks, caches above all, stays as it is: which blocks run is decided outside. A block whose
forward is fused is compiled with it, our kernels as operators in its graph; a compiled block is recorded as it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from omni_kernels.patching.compiled import Compiled
from omni_kernels.patching.engine import InstanceMethod, Patch, PatchConflictError, describe
from omni_kernels.patching.graphs import Graphs

REGIONAL = "regional"
#: What torch.compile is told where the caller says nothing else: a break in a graph is an error, not a slow block.
OPTIONS = {"fullgraph": True}


def options_of(compile: str | Mapping[str, Any] | None, graphs: bool, reuse: bool = False) -> dict[str, Any] | None:
    """What torch.compile is to be told; None where nothing is to be compiled.

    Raises:
        ValueError, TypeError: neither "regional", nor arguments of torch.compile, nor None; or arguments that do not go
            with `graphs`, the recording of CUDA graphs; or either with `reuse`.
    """
    if reuse and (graphs or compile is not None):
        kind = "recorded" if graphs else "compiled"
        raise ValueError(f"reuse=True does not go with {kind} blocks: each computes all that is in it")
    if compile is None:
        return None
    if graphs and isinstance(compile, Mapping) and not {"mode", "options"}.isdisjoint(compile):
        raise ValueError(f"graphs=True with compile={compile!r}: a mode of torch.compile may record graphs of its own")
    if isinstance(compile, Mapping):
        return OPTIONS | dict(compile)
    if not isinstance(compile, str):
        raise TypeError(f'compile must be "{REGIONAL}", a dict of arguments of torch.compile or None, not {compile!r}')
    if compile != REGIONAL:
        raise ValueError(f'compile={compile!r}: "{REGIONAL}", a dict of arguments of torch.compile or None is allowed')
    return dict(OPTIONS)


def replace_calls(pipe: Any, options: Mapping[str, Any] | None, graphs: Graphs | None, patch: Patch) -> Compiled:
    """Compile the repeated blocks of the pipeline's transformers, or record them, or both, through `patch`.

    Blocks that somebody has compiled already are not compiled again.

    Args:
        options: what torch.compile is told; None compiles nothing.
        graphs: what records; None for nothing.

    Returns:
        Which blocks were compiled; which were recorded, `graphs` will tell.

    Raises:
        ValueError: the pipeline has no blocks of which diffusers knows that they repeat.
        PatchConflictError: a transformer is compiled as a whole, or its blocks are patched so already.
    """
    compiled, found = Compiled(), False
    for name, block in _repeated_blocks(pipe):
        found = True
        call: Callable[..., Any] | None = block._compiled_call_impl
        if isinstance(call, InstanceMethod):
            raise PatchConflictError(f"{name} is compiled or recorded already, through another pipeline that shares it")
        if options is not None and call is None:
            call = compiled.call_of(name, block, options)
        if graphs is not None:
            call = graphs.call_of(name, block, call or block._call_impl)
        if call is not None and call is not block._compiled_call_impl:
            patch.set_method(block, "_compiled_call_impl", call)
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no transformer with blocks that repeat: nothing to work on")
    return compiled


def _repeated_blocks(pipe: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    seen: set[int] = set()
    for component, model in (getattr(pipe, "components", None) or vars(pipe)).items():
        kinds = getattr(model, "_repeated_blocks", None)
        if not (component.startswith("transformer") and isinstance(model, torch.nn.Module) and kinds):
            continue
        whole = getattr(model, "_orig_mod", None) or model._compiled_call_impl
        if whole is not None:
            raise PatchConflictError(f"{component} is compiled as a whole ({describe(whole)}): its blocks need not be")
        for name, module in model.named_modules():
            if type(module).__name__ in kinds and id(module) not in seen:
                seen.add(id(module))
                yield f"{component}.{name}", module
