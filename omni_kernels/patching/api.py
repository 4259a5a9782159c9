"""`patch`, `unpatch` and `patched`: one pipeline instance, or the cache-dit library, patched and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, overload

from omni_kernels.patching import backends, calls, rules
from omni_kernels.patching.cache_dit import LibraryHandle
from omni_kernels.patching.changes import HANDLE, Patch, PatchConflictError
from omni_kernels.patching.compiled import Compiled


class PatchHandle:
    """One patch of one pipeline.

    Attributes:
        cache_backend: the backend's name, None without a cache.
        cache_config: its complete configuration, defaults filled in.
        fuse: whether blocks were to be fused.
        compile: what torch.compile was told for the blocks; None where they were not to be compiled.
        fused: which blocks were replaced, and which were left alone and why; prints as lines.
        compiled: the names of the blocks that were compiled; prints as lines, with what is compiled no more and why.
    """

    def __init__(
        self,
        pipe: Any,
        cache_backend: str | None,
        cache_config: dict[str, Any],
        fuse: bool,
        compile: dict[str, Any] | None = None,
    ) -> None:
        self.cache_backend = cache_backend
        self.cache_config = cache_config
        self.fuse = fuse
        self.compile = compile
        self.fused = rules.Fusion()
        self.compiled = Compiled()
        self._pipe = pipe
        self._patch = Patch()
        self._installed: backends.InstalledBackend | None = None

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        blocks = f"{len(self.fused.replaced)} blocks fused" if self.fuse else "blocks not fused"
        blocks += f", {len(self.compiled)} compiled" if self.compiled else ""
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

    def patches(self, pipe: Any) -> bool:
        """Whether this is the patch of that very pipeline."""
        return self._pipe is pipe

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

        A backend without a `sampling` of its own follows loops by itself. To be left in the thread and the context in
        which it was entered: not across the `yield` of a generator.

        Raises:
            RuntimeError: the patch was undone.
        """
        if not self.active:
            raise RuntimeError("this patch was undone: there is no cache to run a loop under")
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
        del vars(self._pipe)[HANDLE]

    def _install(self, backend: backends.CacheBackend | None) -> None:
        try:
            if self.fuse:
                self.fused = rules.fuse(self._pipe, self._patch)
            if self.compile is not None:
                self.compiled = calls.replace_calls(self._pipe, self.compile, self._patch)
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
) -> PatchHandle: ...


def patch(
    pipe: Any,
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
) -> PatchHandle | LibraryHandle:
    """Fuse or compile the blocks of one diffusers pipeline, install a cache, or all; other pipelines are left alone.

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
            Dynamo's limit of graphs is passed by far, others run uncompiled; `.compiled` says so. With
            {"mode": "reduce-overhead"} they are CUDA graphs; see `omni_kernels.patching.calls`.

    Returns:
        The handle: `.fused` tells which blocks were replaced, `.report` what the last request did, `.undo()` takes the
        patch out. Patching again in the same way returns the handle that is there.

    Raises:
        ValueError, TypeError: unknown backend or key, value out of range, a pipeline that the backend cannot serve; a
            version of the library that the kernels do not fit, another module.
        PatchConflictError: the pipeline is patched otherwise already, or somebody else holds a slot that is needed.
    """
    if isinstance(pipe, ModuleType):
        if any(one is not None for one in (cache_backend, cache_config, fuse, compile)):
            raise TypeError(f"patch({pipe.__name__}) takes nothing else: a cache is installed on a pipeline")
        return handle_of(pipe) or LibraryHandle(pipe)
    if fuse is not None and not isinstance(fuse, bool):
        raise TypeError(f"fuse must be True, False or None, not {fuse!r}")
    name = None if cache_backend in (None, "none") else cache_backend
    if name is None and not isinstance(cache_config, Mapping | None):
        raise TypeError(f"cache_config must be a dict or None, and goes with a cache_backend, not {cache_config!r}")
    if name is None and cache_config:
        raise ValueError(f"cache_config {dict(cache_config)!r} was given without a cache_backend")
    backend = None if name is None else backends.get(name)
    config = {}
    if backend is not None:
        config = backends.complete(backend, cache_config, getattr(pipe, "name_or_path", None))
    fuse = name is None if fuse is None else fuse
    options = calls.options_of(compile)
    present = handle_of(pipe)
    if present is not None:
        there = present.cache_backend, present.cache_config, present.fuse, present.compile
        if there == (name, config, fuse, options):
            return present
        raise PatchConflictError(
            f"this {type(pipe).__name__} is already patched with {present.cache_backend or 'no cache'} "
            f"{present.cache_config}, fuse={present.fuse} and compile={present.compile}: unpatch(pipe) first"
        )
    handle = PatchHandle(pipe, name, config, fuse, options)
    handle._install(backend)
    vars(pipe)[HANDLE] = handle
    return handle


@overload
def handle_of(pipe: ModuleType) -> LibraryHandle | None: ...


@overload
def handle_of(pipe: Any) -> PatchHandle | None: ...


def handle_of(pipe: Any) -> PatchHandle | LibraryHandle | None:
    """The patch that `pipe` runs under, if any: its own, and not that of a pipeline that it is a copy of."""
    handle: PatchHandle | LibraryHandle | None = getattr(pipe, "__dict__", {}).get(HANDLE)
    return handle if handle is not None and handle.patches(pipe) else None


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
) -> contextlib.AbstractContextManager[PatchHandle]: ...


@contextlib.contextmanager
def patched(
    pipe: Any,
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    """`patch` for the length of a with-block. Inside a like block, the outer one keeps the patch."""
    outer = handle_of(pipe)
    handle = patch(pipe, cache_backend, cache_config, fuse=fuse, compile=compile)
    try:
        yield handle
    finally:
        if handle is not outer:
            handle.undo()
