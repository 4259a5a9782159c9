"""Our cache backends in the form of vLLM-Omni's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from omni_kernels.patching import api, backends
from omni_runtime.cache.report import StepEvent
from omni_runtime.cache.schedulers import check_scheduler

#: vLLM-Omni has a handler for the loggers below its name.
logger = logging.getLogger("vllm_omni.omni_kernels")


def made(name: str, config: Any) -> Any:
    """A `Backend` that is a `CacheBackend` of vLLM-Omni, too. Arguments and errors are the backend's."""
    base = import_module("vllm_omni.diffusion.cache.base").CacheBackend
    return type("OmniBackend", (Backend, base), {"__doc__": Backend.__doc__})(name, config)


class Backend:
    """One of our caches, or fused blocks, on one pipeline of vLLM-Omni.

    A request begins where the scheduler's timesteps are set, and ends with the pipeline's `forward`, however that
    ends. So a request starts clean even if vLLM-Omni leaves out `refresh`, as it does for names that it does not know
    where a request names no number of steps.

    Args:
        name: one of `omni_runtime.vllm_omni.NAMES`.
        config: vLLM-Omni's configuration, or the keys: those of the cache, and `fuse` (bool).

    Attributes:
        handle: what `omni_kernels.patch` returns for the pipeline: `.report`, `.fused`; None before `enable`.

    Raises:
        ValueError, TypeError: an unknown key, or a value out of range.
    """

    def __init__(self, name: str, config: Any) -> None:
        if isinstance(config, Mapping):
            config = import_module("vllm_omni.diffusion.data").DiffusionCacheConfig.from_dict(dict(config))
        self.config, self.enabled = config, False
        given = _given(config)
        self.handle: api.PatchHandle | None = None
        self._cached = None if name == "fused_blocks" else name
        self._fuse = self._cached is None or given.pop("fuse", False)
        if self._cached is not None:
            backend = backends.get(self._cached)
            if not isinstance(self._fuse, bool):
                raise TypeError(f"{name}: fuse must be True or False, not {self._fuse!r}")
            self._checked = backends.checked(backend, given)
        elif given:
            raise ValueError(f"fused_blocks takes no keys, but got {', '.join(map(repr, sorted(given)))}")

    def enable(self, pipeline: Any) -> None:
        """Install the cache on the pipeline, and fuse its blocks if that is asked for.

        Raises:
            ValueError, PatchConflictError: the pipeline, or how it is run, is not supported; the message says why.
        """
        if self.handle is not None and self.handle.active:
            raise ValueError("this backend is enabled already: disable it first")
        options = getattr(pipeline, "od_config", None)
        if self._cached is not None:
            _refuse(self._cached, options)
        pipe = getattr(pipeline, "_pipeline", pipeline)  # its adapter holds a pipeline of diffusers
        config: dict[str, Any] = {}
        if self._cached is not None:
            config = backends.complete(backends.get(self._cached), self._checked, getattr(options, "model", None))
            if self._cached == "auto" and pipe is pipeline:
                check_scheduler(pipe.scheduler)  # with others, `auto` would be a cache of blocks
        self.handle = api.install(pipe, self._cached, config, fuse=self._fuse)
        self.handle.on_step = self._told
        self.enabled = True
        if self._fuse:
            logger.info("omni-kernels: %s", self.handle.fused)

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Check the keys against a request's number of steps, before it runs. There is no state to clear.

        Raises:
            ValueError: they do not fit: `budget` is more than there are steps.
        """
        if self._cached is not None and num_inference_steps:
            check: Any = backends.get(self._cached).check
            check(self._checked, None, num_inference_steps)

    def disable(self, pipeline: Any) -> None:
        """Restore the pipeline exactly as it was. A second call does nothing.

        Raises:
            PatchConflictError: other code has replaced something that was installed. Nothing is changed then.
        """
        if self.handle is not None:
            self.handle.undo()
        self.enabled = False

    def _told(self, event: StepEvent) -> None:
        """Log which steps a request has computed: vLLM-Omni's outputs have no place for it."""
        if event.step == event.steps - 1 and self.handle is not None:
            report = self.handle.report
            notes = "".join(f"; {note}" for note in report.notes)
            logger.info("%s skipped %d of %d steps%s", self._cached, len(report.skipped), report.steps, notes)


def _given(config: Any) -> dict[str, Any]:
    """The keys that the user has given. Those of vLLM-Omni's other caches show by a value that is not the default."""
    plain = type(config)()
    named = [field.name for field in dataclasses.fields(config) if not field.name.startswith("_")]
    changed = {name: getattr(config, name) for name in named if getattr(config, name) != getattr(plain, name)}
    extra: dict[str, Any] = config._extra_params
    return changed | extra


def _refuse(name: str, options: Any) -> None:
    """Raise ValueError for ways to run a pipeline in which no whole steps can be skipped."""
    if getattr(options, "step_execution", False) or getattr(options, "streaming_output", False):
        raise ValueError(
            f"{name} does not work in vLLM-Omni's step mode (step_execution, streaming_output): one call there is "
            "made for several requests, which are at different steps, so a skipped step of one is not a skipped call"
        )
    parallel = getattr(options, "parallel_config", None)
    if getattr(parallel, "pipeline_parallel_size", 1) > 1:
        raise ValueError(
            f"{name} does not work with pipeline parallelism: only the last stage has the model output. Use tensor, "
            "sequence or CFG parallelism"
        )
