"""Transformers that a cache refuses in their present state."""

from __future__ import annotations

import torch

from omni_kernels.patching import PatchConflictError
from omni_kernels.patching.changes import InstanceMethod, describe

#: `omni_runtime.cache.library` sets this attribute on a transformer while it works on it.
LIBRARY_MARK = "_omni_kernels_library"


def refuse_cached(transformer: torch.nn.Module) -> None:
    """Raise PatchConflictError, naming the other cache, if the transformer is already cached."""
    kind = type(transformer).__name__
    if getattr(transformer, "is_cache_enabled", False):
        raise PatchConflictError(f"diffusers' own cache is enabled on this {kind}: transformer.disable_cache() first")
    if LIBRARY_MARK in vars(transformer):
        raise PatchConflictError(
            f"engine 'library' works on this {kind} in a call of another pipeline that is under way: this one cannot "
            "begin within it"
        )
    if getattr(transformer, "_is_cached", False):
        raise PatchConflictError(
            f"the cache-dit library is enabled on this {kind}: cache_dit.disable_cache(pipe) first"
        )


def refuse_compiled(transformer: torch.nn.Module) -> None:
    """Raise PatchConflictError if the transformer is compiled as a whole: none of its blocks can be skipped then."""
    compiled = getattr(transformer, "_compiled_call_impl", None)
    ours = isinstance(compiled, InstanceMethod)  # installed by an outer sampling, within which this one begins
    if (compiled is not None and not ours) or hasattr(transformer, "_orig_mod"):
        raise PatchConflictError(
            f"this {type(transformer).__name__} was compiled as a whole ({describe(compiled or transformer)}): which "
            "blocks run could no longer be decided at run time. Compile its blocks instead: "
            "transformer.compile_repeated_blocks()"
        )


def refuse_parallel(transformer: torch.nn.Module, alone: str | None) -> None:
    """Raise ValueError if several ranks run the transformer and `alone` gives a reason why they may not."""
    config = getattr(transformer, "_parallel_config", None)
    if alone is not None and config is not None:
        kind = "tensor" if config.context_parallel_config is None else "context"
        raise ValueError(
            f"this {type(transformer).__name__} runs under {kind} parallelism, {alone}; omni_kernels.unpatch(pipe) "
            "takes a cache out"
        )
