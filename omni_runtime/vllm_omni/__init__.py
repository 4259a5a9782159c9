"""A plug-in for vLLM-Omni: `auto` and `velocity_cache` as `cache_backend` there, and fused blocks.

vLLM-Omni calls `register` in each of its processes, by the entry-point group `vllm_omni.general_plugins`. It has no
table of cache backends, but one function that makes them, `get_cache_backend`. That is replaced by one that makes ours
(`omni_runtime.vllm_omni.backend`) and asks the former for all other names. Its adapter for pipelines of diffusers
refuses every cache; ours are let in there.

Nothing of vLLM-Omni is imported before `register` is called.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from omni_kernels.patching import Patch

#: The values of `cache_backend` that the plug-in adds: ours → what it installs, for listings.
NAMES = {
    "auto": "whole steps are skipped as `quality`, `speedup` or `psnr` asks; the key `fuse` fuses blocks, too",
    "velocity_cache": "whole steps are skipped on a schedule; the key `fuse` fuses blocks, too",
    "fused_blocks": "no cache, only fused blocks",
}
_SELECTOR = "vllm_omni.diffusion.cache.selector"
_RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
_ADAPTER = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter"
#: (module, what it must have, the parameters that this must take): what was read in vLLM-Omni 0.30.0
SEAMS = (
    (_SELECTOR, "get_cache_backend", ("cache_backend", "cache_config")),
    ("vllm_omni.diffusion.cache.base", "CacheBackend.enable", ("self", "pipeline")),
    ("vllm_omni.diffusion.cache.base", "CacheBackend.refresh", ("self", "pipeline", "num_inference_steps", "verbose")),
    (
        "vllm_omni.diffusion.distributed.cfg_parallel",
        "CFGParallelMixin.predict_noise_maybe_with_cfg",
        ("self", "do_true_cfg", "true_cfg_scale", "positive_kwargs", "negative_kwargs"),
    ),
    (
        "vllm_omni.diffusion.distributed.cfg_parallel",
        "CFGParallelMixin.predict_noise_with_multi_branch_cfg",
        ("self", "do_true_cfg", "true_cfg_scale", "branches_kwargs"),
    ),
    (_ADAPTER, "DiffusersAdapterPipeline._raise_unsupported_features", ("self",)),
)

#: vLLM-Omni has a handler for the loggers below its name.
logger = logging.getLogger("vllm_omni.omni_kernels")
_installed: Patch | None = None


def register() -> None:
    """Add our cache backends to vLLM-Omni in this process. A second call does nothing.

    If this vLLM-Omni is put together differently, nothing is added, and a warning names its version and what is
    missing: vLLM-Omni must start even so.
    """
    global _installed
    if _installed is not None:
        return
    lacking = list(_lacking())
    if lacking:
        version = getattr(sys.modules.get("vllm_omni"), "__version__", "of an unknown version")
        logger.warning(
            "omni-kernels adds no cache backends to this vLLM-Omni %s, which is put together differently: %s",
            version,
            "; ".join(lacking),
        )
        return
    patch = Patch()
    selector = import_module(_SELECTOR)
    own = selector.get_cache_backend
    made = functools.wraps(own)(functools.partial(_cache_backend, own))
    patch.set_attribute(selector, "get_cache_backend", made)
    runner = sys.modules.get(_RUNNER)  # has imported the function by its name, or will import ours
    if getattr(runner, "get_cache_backend", None) is own:
        patch.set_attribute(runner, "get_cache_backend", made)
    adapter = import_module(_ADAPTER).DiffusersAdapterPipeline
    patch.set_function(adapter, "_raise_unsupported_features", _letting_in(adapter._raise_unsupported_features))
    _installed = patch


def unregister() -> None:
    """Undo `register` in this process. Backends that vLLM-Omni has already made stay.

    Raises:
        PatchConflictError: other code has replaced the same functions since. Nothing is changed then.
    """
    global _installed
    if _installed is not None:
        _installed.undo()
        _installed = None


def _cache_backend(own: Callable[..., Any], cache_backend: str | None, cache_config: Any) -> Any:
    """Make one of our backends, or have vLLM-Omni's own function make one of its own."""
    if cache_backend not in NAMES:
        return own(cache_backend, cache_config)
    from omni_runtime.vllm_omni import backend  # only where it is asked for

    return backend.made(cache_backend, cache_config)


def _letting_in(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The adapter's check of its options, which does not see a cache backend of ours."""

    @functools.wraps(check)
    def let_in(adapter: Any) -> None:
        name = adapter.od_config.cache_backend
        if name not in NAMES:
            return check(adapter)
        adapter.od_config.cache_backend = None
        try:
            return check(adapter)
        finally:
            adapter.od_config.cache_backend = name

    return let_in


def _lacking() -> Iterator[str]:
    """What vLLM-Omni lacks of `SEAMS`, in words."""
    for name, path, parameters in SEAMS:
        try:
            found: Any = import_module(name)
            for part in path.split("."):
                found = getattr(found, part)
            taken = tuple(inspect.signature(found).parameters)[: len(parameters)]
        except (ImportError, AttributeError) as error:
            yield f"{name} has no {path} ({error})"
            continue
        if taken != parameters:
            yield f"{path} takes {', '.join(taken)}, not {', '.join(parameters)}"
    runner = sys.modules.get(_RUNNER)
    selector: ModuleType | None = sys.modules.get(_SELECTOR)
    imported = getattr(runner, "get_cache_backend", None)
    if runner is not None and imported is not getattr(selector, "get_cache_backend", None):
        yield f"{_RUNNER} does not call the get_cache_backend of {_SELECTOR}"
