"""`patch`, `unpatch` and `patched`: one pipeline instance, or the cache-dit library, patched and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, overload

from omni_kernels.patching import backends, calls, rules
from omni_kernels.patching.cache_dit import LibraryHandle
from omni_kernels.patching.compiled import Compiled
from omni_kernels.patching.engine import HANDLE, Patch, PatchConflictError
from omni_kernels.patching.graphs import Graphs
from omni_kernels.patching.reuse import Reuse, compute_once


class PatchHandle:
    """One patch of one pipeline.

    Attributes:
        cache_backend: the backend's name, None without a cache.
        cache_config: its complete configuration, defaults filled in.
        fuse: whether blocks were to be fused.
        compile: what torch.compile was told for the blocks; None where they were not to be compiled.
        fused: which blocks were replaced, and which were left alone and why; prints as lines.
        compiled: the names of the blocks that were compiled; prints as lines, with what is compiled no more and why.
        reuse: whether what is not changed was to be computed once.
        graphs: which blocks were recorded as CUDA graphs, what they hold, and why others were not; prints as lines.
            None where none were to be.
        reused: what is computed once where the model would compute it again, and what was left alone and why; prints as
            lines. None where nothing was to be.
    """

    def __init__(
        self,
        pipe: Any,
        cache_backend: str | None,
        cache_config: dict[str, Any],
        fuse: bool,
        compile: dict[str, Any] | None = None,
        graphs: Graphs | None = None,
        reuse: bool = False,
    ) -> None:
        self.cache_backend = cache_backend
        self.cache_config = cache_config
        self.fuse = fuse
        self.compile = compile
        self.fused = rules.Fusion()
        self.compiled = Compiled()
        self.graphs = graphs
        self.reuse = reuse
        self.reused: Reuse | None = None
        self._pipe = pipe
        self._patch = Patch()
        self._installed: backends.InstalledBackend | None = None

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        blocks = f"{len(self.fused.replaced)} blocks fused" if self.fuse else "blocks not fused"
        blocks += f", {len(self.compiled)} compiled" if self.compiled else ""
        blocks += f", {len(self.graphs.recorded)} recorded" if self.graphs is not None else ""
        blocks += ", reuse" if self.reuse else ""
        return (
            f"PatchHandle(cache_backend={self.cache_backend!r}, cache_config={self.cache_config!r}, {blocks}, {state})"
        )

    def __reduce__(self) -> Any:
        # A copied or pickled pipeline is not patched, so it has no handle.
        return type(None), ()

    @property
    def active(self) -> bool:
        """Whether the pipeline still runs under this patch."""
        return vars(self._pipe).get(HANDLE) is self

    @property
    def report(self) -> Any:
        """What the last request computed and skipped (a `CacheReport`); None before the first and without a cache."""
        return None if self._installed is None else self._installed.report

    @property
    def reports(self) -> list[Any]:
        """What each denoising loop of the last call did: a pipeline may run several (videos in segments)."""
        return [] if self._installed is None else list(getattr(self._installed, "reports", ()))

    def sampling(self) -> contextlib.AbstractContextManager[object]:
        """While open, a denoising loop of your own counts as a call of the pipeline: the cache is at work in it.

            with handle.sampling():
                pipe.scheduler.set_timesteps(50)
                for t in pipe.scheduler.timesteps:
                    ...

        A backend without a `sampling` of its own follows loops by itself.
        """
        own = getattr(self._installed, "sampling", None)
        return contextlib.nullcontext() if own is None else own()

    @property
    def on_step(self) -> Callable[[Any], None] | None:
        """Called with a `StepEvent` whenever a step closes; None for nobody."""
        return None if self._installed is None else self._installed.on_step

    @on_step.setter
    def on_step(self, listener: Callable[[Any], None] | None) -> None:
        if self._installed is not None:
            self._installed.on_step = listener

    def rehearsal(self) -> contextlib.AbstractContextManager[object]:
        """While open, requests compute and skip steps by turns, whatever the cache would decide (see `warmup`).

        A backend without a `rehearsal` of its own decides as ever.
        """
        own = getattr(self._installed, "rehearsal", None)
        return contextlib.nullcontext() if own is None else own()

    def undo(self) -> None:
        """Put the pipeline back exactly as it was. Undoing twice does nothing.

        Raises:
            PatchConflictError: somebody else replaced what was installed; nothing is changed then.
        """
        if not self.active:
            return
        self._patch.undo()
        if self._installed is not None:
            self._installed.close()
        if self.graphs is not None:
            self.graphs.close()
        del vars(self._pipe)[HANDLE]

    def _install(self, backend: backends.CacheBackend | None) -> None:
        try:
            if self.fuse:
                self.fused = rules.fuse(self._pipe, self._patch)
            if self.compile is not None or self.graphs is not None:
                self.compiled = calls.replace_calls(self._pipe, self.compile, self.graphs, self._patch)
            if self.reuse:
                self.reused = compute_once(self._pipe, self._patch)
            if backend is not None:
                self._installed = backend.install(self._pipe, self.cache_config, self._patch)
        except BaseException:
            self._patch.undo()
            raise


@overload
def patch(pipe: ModuleType) -> LibraryHandle: ...


@overload
def patch(
    pipe: Any,
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
    graphs: bool | Graphs = False,
    reuse: bool = False,
) -> PatchHandle: ...


def patch(
    pipe: Any,
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
    graphs: bool | Graphs = False,
    reuse: bool = False,
) -> PatchHandle | LibraryHandle:
    """Fuse, compile or record the blocks of one diffusers pipeline, install a cache, or all; others are left alone.

    Fused blocks compute what the model's own do, up to rounding. Which blocks there is a fused forward for, and what
    was left alone and why, is in `.fused` of what is returned; where nothing fits, nothing is changed.

    `patch(cache_dit)` takes that library's module instead: what it decides and forecasts is then computed by our
    kernels, for every pipeline that it caches (`omni_kernels.patching.cache_dit`).

    Args:
        pipe: a loaded diffusers pipeline; or the module `cache_dit`, with nothing else.
        cache_backend: a registered backend's name ("tea_cache", "cache_dit", ...); None and "none" mean no cache.
        cache_config: the backend's keys; what is left out takes its default, or what a calibration has left for it in
            the directory that the pipeline was loaded from.
        fuse: whether to fuse blocks. None: without a backend yes, with one no, so that a cache alone changes no bit of
            a computed step.
        compile: "regional" compiles each block by itself, without breaks in its graph, fused or not, under any cache;
            a dict does so with these arguments of torch.compile. Compiled blocks compute the same up to rounding. Where
            Dynamo's limit of graphs is passed by far, others run uncompiled; `.compiled` says so.
        graphs: whether blocks are recorded as CUDA graphs, once per shape, and replayed. What cannot be recorded runs
            as ever; `.graphs` says why. See `omni_kernels.patching.graphs`.
        reuse: whether what a model computes again, of the same input, is computed once and kept: the modulation of a
            timestep for both branches of guidance (Qwen-Image), the refined caption of a request (Z-Image). The same
            bits, for a little memory; `.reused` says what. See `omni_kernels.patching.reuse`.

    Returns:
        The handle: `.fused` tells which blocks were replaced, `.report` what the last request did, `.undo()` takes the
        patch out. Patching again in the same way returns the handle that is there.

    Raises:
        ValueError, TypeError: unknown backend or key, value out of range, a pipeline that the backend cannot serve; a
            version of the library that the kernels do not fit, another module.
        PatchConflictError: the pipeline is patched otherwise already, or somebody else holds a slot that is needed.
    """
    if isinstance(pipe, ModuleType):
        given = (cache_backend, cache_config, fuse, compile, graphs or None, reuse or None)
        if any(one is not None for one in given):
            raise TypeError(f"patch({pipe.__name__}) takes nothing else: a cache is installed on a pipeline")
        return handle_of(pipe) or LibraryHandle(pipe)
    name = None if cache_backend in (None, "none") else cache_backend
    if name is None and cache_config:
        raise ValueError(f"cache_config {dict(cache_config)!r} was given without a cache_backend")
    backend = None if name is None else backends.get(name)
    config = {}
    if backend is not None:
        backend.check(cache_config)
        config = backend.check(backends.with_own(backend, cache_config, getattr(pipe, "name_or_path", None)))
    fuse = name is None if fuse is None else bool(fuse)
    options = calls.options_of(compile, bool(graphs), reuse)
    present = handle_of(pipe)
    if present is not None:
        asked = (name, config, fuse, options, bool(graphs), bool(reuse))
        recorded = present.graphs is not None
        there = (
            present.cache_backend, present.cache_config, present.fuse, present.compile, recorded, present.reuse,
        )  # fmt: skip
        if there == asked:
            return present
        raise PatchConflictError(
            f"this {type(pipe).__name__} is already patched with {present.cache_backend or 'no cache'} "
            f"{present.cache_config}, fuse={present.fuse}, compile={present.compile}, graphs={recorded} and "
            f"reuse={present.reuse}: unpatch(pipe) first"
        )
    recorder = Graphs() if graphs is True else graphs or None
    handle = PatchHandle(pipe, name, config, fuse, options, recorder, bool(reuse))
    handle._install(backend)
    vars(pipe)[HANDLE] = handle
    return handle


@overload
def handle_of(pipe: ModuleType) -> LibraryHandle | None: ...


@overload
def handle_of(pipe: Any) -> PatchHandle | None: ...


def handle_of(pipe: Any) -> PatchHandle | LibraryHandle | None:
    """The patch that `pipe` runs under, if any."""
    return getattr(pipe, "__dict__", {}).get(HANDLE)


def unpatch(pipe: Any) -> None:
    """Undo the patch of `pipe`; does nothing where there is none. Raises what the handle's `undo` raises.

    `unpatch(cache_dit)` puts the library's functions back, where no pipeline is patched that runs on them.
    """
    handle = handle_of(pipe)
    if handle is not None:
        handle.undo()


@overload
def patched(pipe: ModuleType) -> contextlib.AbstractContextManager[LibraryHandle]: ...


@overload
def patched(
    pipe: Any,
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
    graphs: bool | Graphs = False,
    reuse: bool = False,
) -> contextlib.AbstractContextManager[PatchHandle]: ...


@contextlib.contextmanager
def patched(
    pipe: Any,
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
    graphs: bool | Graphs = False,
    reuse: bool = False,
) -> Iterator[Any]:
    """`patch` for the length of a with-block. Inside a like block, the outer one keeps the patch."""
    outer = handle_of(pipe)
    handle = patch(pipe, cache_backend, cache_config, fuse=fuse, compile=compile, graphs=graphs, reuse=reuse)
    try:
        yield handle
    finally:
        if handle is not outer:
            handle.undo()
