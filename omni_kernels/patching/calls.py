"""Regional compilation: each block is compiled separately, and all blocks of a class share one graph.

Code between the blocks, such as a cache that decides which blocks run, is not compiled. A fused block is compiled with
its fused forward, and our kernels are operators in its graph.

With `mode="reduce-overhead"`, torch records each block as a CUDA graph. The block's outputs then lie in memory that a
later forward of the transformer overwrites. So torch must be told where a forward of the transformer begins. Otherwise
each block call counts as a new forward, and the block's inputs are already freed
(`torch._inductor.cudagraph_trees`). Within one forward, torch keeps outputs that are still referenced. Code that keeps
block outputs for longer must copy them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from omni_kernels.patching.changes import InstanceMethod, Patch, PatchConflictError, describe
from omni_kernels.patching.compiled import Compiled
from omni_kernels.patching.structure import components

REGIONAL = "regional"
#: Default arguments of torch.compile: a graph break is an error instead of a slow block.
OPTIONS = {"fullgraph": True}
#: Further ones for blocks under tensor parallelism: with symbolic sizes, Dynamo of torch 2.13 fails on sharded weights.
SHARDED = {"dynamic": False}


def options_of(compile: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The arguments for torch.compile; None if nothing is to be compiled.

    Raises:
        ValueError, TypeError: `compile` is neither "regional", nor a dict of torch.compile arguments, nor None.
    """
    if compile is None:
        return None
    if isinstance(compile, Mapping):
        return OPTIONS | dict(compile)
    if not isinstance(compile, str):
        raise TypeError(f'compile must be "{REGIONAL}", a dict of arguments of torch.compile or None, not {compile!r}')
    if compile != REGIONAL:
        raise ValueError(f'compile={compile!r}: "{REGIONAL}", a dict of arguments of torch.compile or None is allowed')
    return dict(OPTIONS)


def replace_calls(pipe: Any, options: Mapping[str, Any], patch: Patch) -> Compiled:
    """Compile the repeated blocks of the pipeline's transformers, through `patch`.

    Blocks that were already compiled by other code are not compiled again.

    Args:
        options: arguments for torch.compile.

    Returns:
        Which blocks were compiled.

    Raises:
        ValueError: the pipeline has no blocks that diffusers lists as repeated (`_repeated_blocks`).
        PatchConflictError: a transformer is compiled as a whole, or its blocks are already compiled by another patch.
    """
    compiled, blocks = Compiled(), list(_repeated_blocks(pipe))
    for name, model, block in blocks:
        call = block._compiled_call_impl
        if isinstance(call, InstanceMethod):
            raise PatchConflictError(f"{name} is compiled already, through another pipeline that shares it")
        if call is None:
            own = SHARDED | dict(options) if _is_sharded(model) else options
            patch.set_method(block, "_compiled_call_impl", compiled.call_of(name, block, own))
    if not blocks:
        raise ValueError(
            f"diffusers lists no blocks of this {type(pipe).__name__} that can be compiled one by one "
            "(_repeated_blocks of its transformer): leave out compile="
        )
    if makes_cuda_graphs(options):
        for model in {id(model): model for _, model, _ in blocks}.values():
            hooks = model._forward_pre_hooks
            before = dict(hooks)
            model.register_forward_pre_hook(_begins)
            patch.record(model, hooks, before)
    return compiled


def _is_sharded(model: torch.nn.Module) -> bool:
    """Whether the weights of a transformer are shared out among ranks."""
    config = getattr(model, "_parallel_config", None)
    return getattr(config, "tensor_parallel_config", None) is not None


def makes_cuda_graphs(options: Mapping[str, Any]) -> bool:
    """Whether torch.compile with these arguments records CUDA graphs on a GPU."""
    from torch import _inductor
    from torch._inductor import config

    told = _inductor.list_mode_options().get(options.get("mode") or "default", {}) | (options.get("options") or {})
    return options.get("backend") == "cudagraphs" or bool(told.get("triton.cudagraphs", config.triton.cudagraphs))


def _begins(model: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook that tells torch that a transformer's forward begins.

    It is a hook because a cache may have replaced the forward itself.
    """
    torch.compiler.cudagraph_mark_step_begin()


def _repeated_blocks(pipe: Any) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Module]]:
    """(name, transformer, block) of each repeated block."""
    seen: set[int] = set()
    for component, model in components(pipe).items():
        kinds = getattr(model, "_repeated_blocks", None)
        if not (component.startswith("transformer") and isinstance(model, torch.nn.Module) and kinds):
            continue
        whole = getattr(model, "_orig_mod", None) or model._compiled_call_impl
        if whole is not None:
            raise PatchConflictError(f"{component} is compiled as a whole ({describe(whole)}): leave out compile=")
        for name, module in model.named_modules():
            if type(module).__name__ in kinds and id(module) not in seen:
                seen.add(id(module))
                yield f"{component}.{name}", model, module
