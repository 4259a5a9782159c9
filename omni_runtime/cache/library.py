"""The cache_dit backend with engine 'library': the installed cache-dit library runs the blocks, with our kernels.

The library is enabled on the pipeline's transformers through its own adapter for the pipeline's class. So it also
supports models that have no row in `omni_runtime.cache.models`. The scheduler seam supplies what the library does not
know: when a request begins and ends, how many steps it has, and which transformer calls belong to the same step. The
library tells the CFG branches apart by call parity: it takes every second call for the other branch. If a step has
only one call, its call counter is advanced by one more.

Everything that the library writes into the pipeline is recorded and put back. Its contexts exist only during a
request. Without a context, the library computes every block.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from omni_kernels.patching import Patch
from omni_kernels.patching.backends import nearest
from omni_kernels.patching.cache_dit import NAME, Library, use_kernels
from omni_kernels.patching.changes import describe
from omni_runtime.cache.gates import Verdict
from omni_runtime.cache.lifecycle import CURRENT, Request, Sampling, turn
from omni_runtime.cache.refusals import LIBRARY_MARK, refuse_cached, refuse_compiled, refuse_parallel
from omni_runtime.cache.session import GRADIENT, Args, CacheSession, Kwargs, differentiates

#: Our forecasters that the library has → the class that configures its calibrator. None: the residual is reused.
CALIBRATORS = {
    None: None,
    "reuse": None,
    "taylorseer": "TaylorSeerCalibratorConfig",
    "foca": "FoCaCalibratorConfig",
    "dmd": "DMDCalibratorConfig",
}
#: Keys of cache_dit that switch a forecaster on → its name.
ENABLES = {"enable_taylorseer": "taylorseer", "enable_foca": "foca", "enable_dmd": "dmd"}
#: Pipelines that the library accepts but cannot run: start of the class name → the reason.
REFUSED = {
    "LTX2": "it fails on blocks that take and return sound besides the video",
    "Flux2KleinKV": "it changes the image there, and skips nothing",
    "SkyReelsV2DiffusionForcing": "there each frame has steps of its own, and the library counts steps by calls",
}
#: Pipelines that the library cannot run with a ControlNet, by the start of the class name.
REFUSED_WITH_CONTROLNET = ("QwenImage", "StableDiffusion3", "HunyuanDiT")
_ADAPTER = "caching.cache_adapters.CachedAdapter"
_MANAGER = "caching.cache_contexts.CachedContextManager"
_CONTEXT = "caching.cache_contexts.CachedContext"

#: The members of the library's classes that are used here.
_USED = {
    _ADAPTER: ("apply",),
    _MANAGER: ("reset_context", "get_context", "clear_contexts"),
    _CONTEXT: (
        "executed_steps",
        "transformer_executed_steps",
        "is_separate_cfg_step",
        "get_current_step",
        "get_cached_steps",
        "get_cfg_cached_steps",
        "get_residual_diffs",
        "get_cfg_residual_diffs",
        "get_calibrators",
        "get_cfg_calibrators",
    ),
}


def installed() -> bool:
    """Whether the library is installed. It is not imported."""
    return importlib.util.find_spec(NAME) is not None


def check(config: Mapping[str, Any]) -> None:
    """Check that the library is installed and supports these settings of the cache_dit backend.

    Raises:
        ModuleNotFoundError: the library is not installed.
        ValueError: a setting that the library does not support.
    """
    if not installed():
        raise ModuleNotFoundError(
            "engine 'library' runs on the cache-dit library, which is not installed: pip install cache-dit"
        )
    if config["decision"] != "measure":
        raise ValueError("engine 'library' measures in each request: decision must be 'measure'")
    if config["force_refresh_step_hint"] is not None:
        raise ValueError("engine 'library' cannot begin anew within a request: force_refresh_step_hint needs 'own'")
    if config["forecaster"] not in CALIBRATORS:
        known = ", ".join(repr(name) for name in CALIBRATORS)
        raise ValueError(f"engine 'library' has no forecaster {config['forecaster']!r}: it has {known}")


def forecaster_of(config: Mapping[str, Any]) -> tuple[str | None, int]:
    """The forecaster that the keys of cache_dit ask for, None for reuse, and its order."""
    name = next((name for key, name in ENABLES.items() if config[key]), config["forecaster"])
    return name, config["taylorseer_order" if config["enable_taylorseer"] else "forecaster_order"]


def _load() -> Library:
    """Import the installed library.

    Raises:
        ValueError: its version lacks something that is used here.
    """
    with _quiet():
        library = Library(importlib.import_module(NAME))
    for path, names in _USED.items():
        owner = library.find(path)
        for name in names:
            if not hasattr(owner, name):
                raise library.lacking(f"no {owner.__name__}.{name}")
    return library


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, suppress the library's log messages, which it prints to the standard output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _configurations(module: ModuleType, config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate our settings into the library's configuration objects."""
    forecaster, order = forecaster_of(config)
    calibrator = CALIBRATORS[forecaster]
    if forecaster == "taylorseer":
        made = module.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    else:
        made = None if calibrator is None else getattr(module, calibrator)()
    same = (
        "Fn_compute_blocks",
        "Bn_compute_blocks",
        "residual_diff_threshold",
        "max_warmup_steps",
        "warmup_interval",
        "max_cached_steps",
        "max_continuous_cached_steps",
    )
    cache = module.DBCacheConfig(
        **{key: config[key] for key in same},
        steps_computation_policy=config["scm_steps_policy"],
        enable_separate_cfg=True,
    )
    return {"cache_config": cache} | ({} if made is None else {"calibrator_config": made})


def _refuse(pipe: Any) -> None:
    """Raise ValueError for a pipeline that the library is known not to run (cache-dit 1.5.3)."""
    kind = type(pipe).__name__
    reasons = [reason for begin, reason in REFUSED.items() if kind.startswith(begin)]
    if getattr(pipe, "controlnet", None) is not None and kind.startswith(REFUSED_WITH_CONTROLNET):
        reasons.append("it fails where a ControlNet adds residuals between the blocks")
    if reasons:
        raise ValueError(f"engine 'library' cannot serve {kind}: {reasons[0]}. Try engine 'own', or velocity_cache")


class _NotCopied:
    """Put on a transformer while the library works on it. Forbids copying: a copy would use the original's blocks."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "the cache-dit library works on this transformer: it cannot be copied during a call of the pipeline"
        )


class _Order:
    """The order of a module's children. The library changes it each time it exchanges a child for a forward."""

    held = True

    def __init__(self, owner: torch.nn.Module) -> None:
        self.owner = owner
        self._names = tuple(owner._modules)

    def conflict(self) -> str:
        return ""

    def restore(self) -> None:
        children = self.owner._modules
        for name in (*self._names, *(name for name in children if name not in self._names)):
            if name in children:
                children[name] = children.pop(name)


@dataclass(frozen=True)
class _Blocks:
    """A block list as the library caches it.

    Attributes:
        context: the name of the library's context, which holds its state.
        count: the number of blocks.
        settings: the arguments for a fresh context.
    """

    context: str
    count: int
    settings: dict[str, Any]


class LibrarySession(CacheSession):
    """The library's DBCache, installed on one pipeline.

    The library is enabled when a call begins and taken out when it ends.

    Args:
        name: the backend's name.
        config: all of its settings.
        mask: request → its steps computation mask, or None; raises ValueError if no mask fits the request.

    Raises:
        ValueError, PatchConflictError: the library does not support the pipeline; the message says why.
    """

    alone = (
        "where engine 'library' would average its distances over all ranks, even those that work on another request, "
        "and as if all shards had the same length: engine 'own' does neither"
    )

    def __init__(
        self,
        name: str,
        pipe: Any,
        config: Mapping[str, Any],
        mask: Callable[[Request], tuple[int, ...] | None],
    ) -> None:
        super().__init__(name, pipe)
        _refuse(pipe)
        self._config = config
        self._mask = mask
        self._library = _load()
        self._manager: Any = None
        self._blocks: dict[torch.nn.Module, list[_Blocks]] = {}
        self._serving: Request | None = None

    def install(self, patch: Patch) -> None:
        """See `CacheSession.install`. The library uses our kernels until the patch is undone."""
        use_kernels(self._library.module, patch)
        super().install(patch)

    def take(self, sampling: Sampling, seams: Patch) -> None:
        """Enable the library on the pipeline's transformers, and install the seams."""
        for transformer in self.transformers:
            refuse_cached(transformer)
            refuse_compiled(transformer)
            refuse_parallel(transformer, self.alone)
            seams.add(_Order(transformer))
        self._enable(self._library, seams)
        for transformer in self.transformers:
            self.take_calls(sampling, transformer, seams)

    def _enable(self, library: Library, patch: Patch) -> None:
        kind, module = type(self.pipe).__name__, library.module
        adapter_class = library.find(_ADAPTER)
        # The library changes `__call__` of the pipeline's class. So it is given a stand-in with a class of its own,
        # and other pipelines of the real class are not changed.
        seat = type(kind, (), {"__call__": lambda self: None, "transformer": self.transformer})()
        before = [(owner, mapping, dict(mapping)) for owner, mapping in self._namespaces()]
        try:
            with _quiet():
                adapter = module.get_adapter(self.pipe)
                if adapter is None:
                    _, known = module.supported_pipelines()
                    raise ValueError(f"{NAME} {library.version} knows no {kind}: {nearest(kind, known)}")
                adapter.pipe = seat
                adapter = adapter_class.apply(adapter, **_configurations(module, self._config))
            for transformer in self.transformers:
                vars(transformer)[LIBRARY_MARK] = _NotCopied()
        except AssertionError as error:
            raise ValueError(f"{NAME} {library.version} cannot serve this {kind}: {error}") from error
        finally:
            for owner, mapping, former in before:
                patch.record(owner, mapping, former)
        self._manager = seat._context_manager
        self.transformers = list(adapter.transformer)
        lists = zip(adapter.transformer, adapter.unique_blocks_name, adapter.blocks, strict=True)
        for transformer, contexts, blocks in lists:
            self._blocks[transformer] = [
                _Blocks(context, len(one), one._context_kwargs)
                for context, one in zip(contexts, blocks, strict=True)
            ]  # fmt: skip
        self.blocks = sum(one.count for one in self._blocks[self.transformer])
        self._check_blocks(adapter.blocks_name[0])
        self.notes = [f"decided by {NAME} {library.version}"]
        if len(adapter.blocks_name[0]) > 1:
            self.notes.append(
                f"{' and '.join(adapter.blocks_name[0])} were each decided alone: a step counts as computed if one of "
                "them ran, with the largest distance"
            )

    def _namespaces(self) -> Iterator[tuple[object, MutableMapping[str, Any]]]:
        """The namespaces that the library may write to."""
        yield self.pipe, vars(self.pipe)
        for transformer in self.transformers:
            for module in transformer.modules():
                yield module, vars(module)
                yield module, module._modules

    def _check_blocks(self, names: list[str]) -> None:
        first, last = self._config["Fn_compute_blocks"], self._config["Bn_compute_blocks"]
        for name, one in zip(names, self._blocks[self.transformer], strict=True):
            if first + last >= one.count:
                raise ValueError(
                    f"Fn_compute_blocks + Bn_compute_blocks is {first} + {last}: of the {one.count} blocks in {name} "
                    "at least one must be left to skip"
                )
        masked = self._config["steps_computation_mask"] or self._config["scm_steps_mask_policy"]
        if masked and len(self._blocks) > 1:
            raise ValueError(
                f"{type(self.pipe).__name__} has {len(self._blocks)} transformers, each of which the library gives "
                "steps of its own: a steps computation mask would be misplaced"
            )

    def held_tensors(self) -> list[torch.Tensor]:
        """All tensors that the library's contexts hold for the request under way."""
        held: list[torch.Tensor] = []
        for context in self._contexts() if self._serving is not None else ():
            held += [value for value in context.buffers.values() if isinstance(value, torch.Tensor)]
            for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
                for state in getattr(calibrator, "states", {}).values():
                    held += [
                        value for rungs in getattr(state, "state", {}).values() for value in rungs if value is not None
                    ]
        return held

    def _contexts(self) -> list[Any]:
        return [self._manager.get_context(one.context) for lists in self._blocks.values() for one in lists]

    def _begin(self, request: Request) -> None:
        """Make fresh contexts for the request."""
        mask = self._mask(request)
        for lists in self._blocks.values():
            for one in lists:
                settings = copy.deepcopy(one.settings)
                settings["cache_config"].steps_computation_mask = None if mask is None else list(mask)
                self._manager.reset_context(one.context, **settings)
        self._serving = request
        request.on_end = functools.partial(self._end, request)

    def _end(self, request: Request) -> None:
        """Free the contexts and what they hold. Without contexts, the library computes every block."""
        if self._serving is not request:
            return
        self._serving = None
        for context in self._contexts():
            # The manager still refers to the context that it used last, so its calibrators are emptied too.
            for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
                if calibrator is not None:
                    calibrator.reset_cache()
        self._manager.clear_contexts()

    def call_of_another(self, call: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """See `CacheSession.call_of_another`. A call from another thread waits: the transformer is changed."""
        with turn(self.transformers), _quiet():  # the library logs for each block list that it has no context
            if self._serving is not None and CURRENT.get() is None:  # called in this thread, from a callback
                raise ValueError(
                    f"the transformer of this {type(self.pipe).__name__} was called from a callback: the library would "
                    "count it as one of the pipeline's own calls"
                )
            return call(*args, **kwargs)

    def call(
        self, sampling: Sampling, request: Request, transformer: Any, call: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """See `CacheSession.call`."""
        if request is not self._serving:
            self._begin(request)
        if request.calls > 1:
            raise ValueError(
                f"{type(self.pipe).__name__} calls its transformer more than twice in a step: the library knows two "
                "guidance branches"
            )
        branch = request.branch(sampling.context)
        if differentiates(transformer, args, kwargs):
            raise ValueError(f"{GRADIENT}, which the cache-dit library does not support: engine 'own' computes it")
        lists = self._blocks[transformer]
        contexts = [self._manager.get_context(one.context) for one in lists]
        if not request.calls:
            for context in contexts:
                context.transformer_executed_steps = 2 * context.executed_steps
        taken = [context.transformer_executed_steps for context in contexts]
        output = call(*args, **kwargs)
        if taken == [context.transformer_executed_steps for context in contexts]:
            self._lost(transformer, request)
        request.calls += 1
        computed, distances = False, []
        for one, context in zip(lists, contexts, strict=True):
            skipped, distance = _decided(context)
            computed |= not skipped
            always = self._config["Fn_compute_blocks"] + self._config["Bn_compute_blocks"]
            request.blocks_run += always if skipped else one.count
            request.blocks_total += one.count
            if distance is not None:
                distances.append(distance)
        distance = max(distances, default=None)
        branch.decide(Verdict(computed, self._reason(computed, distance), distance))
        return output

    def _lost(self, transformer: torch.nn.Module, request: Request) -> None:
        """Warn, once per request, that a transformer call did not reach the library."""
        holder = describe(vars(transformer).get("forward", type(transformer).forward))
        note = (
            f"{NAME} is no longer called: the transformer's forward is {holder}, which was set during the pipeline's "
            "call; nothing is cached"
        )
        if note not in request.notes:
            request.notes.append(note)
            warnings.warn(note, stacklevel=4)

    def _reason(self, computed: bool, distance: float | None) -> str:
        """The reason for the report, from the distance. The library does not say when one of its limits decided."""
        if distance is None or computed == (distance < self._config["residual_diff_threshold"]):
            return "the library's decision"
        return "above threshold" if computed else "below threshold"


def _decided(context: Any) -> tuple[bool, float | None]:
    """Whether the library skipped in the last call, and the distance that it measured, if any."""
    step = context.get_current_step()
    if context.is_separate_cfg_step():
        steps, distances = context.get_cfg_cached_steps(), context.get_cfg_residual_diffs()
    else:
        steps, distances = context.get_cached_steps(), context.get_residual_diffs()
    distance = distances.get(str(step))
    if distance is None or math.copysign(1.0, distance) < 0:  # both mean "not measured"
        return step in steps, None
    return step in steps, distance
