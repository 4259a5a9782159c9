"""`patch`, `unpatch` and `patched`: patch one pipeline instance, or the cache-dit library, and undo it."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, overload

from omni_kernels.patching import backends, calls, quantised, rules, tables
from omni_kernels.patching.cache_dit import LibraryHandle
from omni_kernels.patching.changes import HANDLE, Patch, PatchConflictError
from omni_kernels.patching.compiled import Compiled


class PatchHandle:
    """One patch of one pipeline.

    Attributes:
        cache_backend: the name of the cache backend; None without a cache.
        cache_config: its complete configuration, with defaults filled in.
        fuse: whether block fusion was requested.
        compile: the torch.compile arguments for the blocks; None if compilation was not requested.
        fused: which blocks were replaced, and which were not and why; printable.
        compiled: the names of the compiled blocks; printable, with the classes that get no more graphs and why.
        quantize: the options of quantisation; None if it was not requested.
        quantised: which linear layers run in 8 bits, which do not and why, and the memory freed; printable.
    """

    def __init__(
        self,
        pipe: Any,
        cache_backend: str | None,
        cache_config: dict[str, Any],
        fuse: bool,
        compile: dict[str, Any] | None = None,
        quantize: quantised.Options | None = None,
    ) -> None:
        self.cache_backend = cache_backend
        self.cache_config = cache_config
        self.fuse = fuse
        self.compile = compile
        self.quantize = quantize
        self.quantised = quantised.Quantisation()
        self.fused = rules.Fusion()
        self.compiled = Compiled()
        self._pipe = pipe
        self._patch = Patch()
        self._installed: backends.InstalledBackend | None = None

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        blocks = f"{len(self.fused.replaced)} blocks fused" if self.fuse else "blocks not fused"
        blocks += f", {len(self.compiled)} compiled" if self.compiled else ""
        blocks += f", {len(self.quantised.replaced)} layers quantised" if self.quantised else ""
        return f"PatchHandle(cache_backend={self.cache_backend!r}, {_short(self.cache_config)}, {blocks}, {state})"

    def __reduce__(self) -> Any:
        # A copied or unpickled pipeline is not patched, so it has no handle.
        return type(None), ()

    @property
    def active(self) -> bool:
        """Whether this patch is still installed on the pipeline."""
        return vars(self._pipe).get(HANDLE) is self

    @property
    def undoable(self) -> bool:
        """Whether `undo` can put everything back: not if quantisation has dropped the layers' own weights for good."""
        return self.quantize is None or self.quantize.keep != "none"

    def patches(self, pipe: Any) -> bool:
        """Whether this patch was made on exactly this pipeline object."""
        return self._pipe is pipe

    @property
    def report(self) -> Any:
        """The `CacheReport` of the last request; None before the first one, and without a cache."""
        return None if self._installed is None else self._installed.report

    @property
    def reports(self) -> list[Any]:
        """One report for each denoising loop of the last call. Pipelines that make videos in segments run several."""
        return [] if self._installed is None else list(getattr(self._installed, "reports", ()))

    @property
    def blocks(self) -> Any:
        """Which blocks the cache works on, and how the model calls them; `print` it.

        Of a model that is not in the table, this is found in its first forward; None before that, for a
        model in the table, and for a cache that needs no blocks.
        """
        return getattr(self._installed, "contract", None)

    def sampling(self) -> contextlib.AbstractContextManager[object]:
        """Context manager for your own denoising loop: inside it, the cache works as in a call of the pipeline.

            with handle.sampling():
                pipe.scheduler.set_timesteps(50)
                for t in pipe.scheduler.timesteps:
                    ...

        For a backend without a `sampling` method, this does nothing: such a backend detects loops by itself. Exit it
        in the thread and context in which you entered it; do not hold it open across the `yield` of a generator.

        Raises:
            RuntimeError: the patch was undone.
        """
        if not self.active:
            raise RuntimeError("this patch was undone: there is no cache to run a loop under")
        own = getattr(self._installed, "sampling", None)
        return contextlib.nullcontext() if own is None else own()

    @property
    def on_step(self) -> Callable[[Any], None] | None:
        """A function that is called with a `StepEvent` at the end of each step, or None."""
        return None if self._installed is None else self._installed.on_step

    @on_step.setter
    def on_step(self, listener: Callable[[Any], None] | None) -> None:
        if self._installed is not None:
            self._installed.on_step = listener

    def rehearsal(self) -> contextlib.AbstractContextManager[object]:
        """Context manager in which requests follow a fixed pattern of computed and skipped steps (see `warmup`).

        The cache's own decisions are ignored meanwhile. A backend without a `rehearsal` method decides as usual.
        """
        own = getattr(self._installed, "rehearsal", None)
        return contextlib.nullcontext() if own is None else own()

    def undo(self) -> None:
        """Restore the pipeline exactly as it was. A second call does nothing.

        Raises:
            PatchConflictError: other code has replaced something that was installed, or quantisation has dropped the
                layers' own weights. Nothing is changed then.
        """
        if not self.active:
            return
        if not self.undoable:
            raise PatchConflictError(
                "this patch cannot be undone: quantize was given keep='none', so the layers' own weights are gone. "
                "Load the pipeline again"
            )
        self._patch.undo()
        if self._installed is not None:
            self._installed.close()
        del vars(self._pipe)[HANDLE]

    def _install(self, backend: backends.CacheBackend | None) -> None:
        replaced: list[Any] = []
        try:
            tables.bound(self._pipe, self._patch)
            if self.quantize is not None:
                self.quantised, replaced = quantised.quantise(self._pipe, self.quantize, self._patch)
            if self.fuse:
                self.fused = rules.fuse(self._pipe, self._patch)
            if self.compile is not None:
                self.compiled = calls.replace_calls(self._pipe, self.compile, self._patch)
            if backend is not None:
                self._installed = backends.install(backend, self._pipe, self.cache_config, self._patch)
        except BaseException:
            self._patch.undo()
            raise
        if self.quantize is not None and self.quantize.keep != "host":
            quantised.drop(replaced)


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
    quantize: str | Mapping[str, Any] | None = None,
) -> PatchHandle: ...


def patch(
    pipe: Any,
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
    quantize: str | Mapping[str, Any] | None = None,
) -> PatchHandle | LibraryHandle:
    """Fuse blocks, compile blocks or install a cache on one diffusers pipeline. Other pipelines are unchanged.

    Fused blocks compute the same as the model's own blocks, up to rounding. The returned handle's `.fused` lists the
    fused blocks, and those left unchanged and why. A block without a matching fused forward is left unchanged.

    `patch(cache_dit)` takes that library's module instead. Its decisions and forecasts are then computed by our
    kernels, for every pipeline that it caches (`omni_kernels.patching.cache_dit`).

    Args:
        pipe: a loaded diffusers pipeline; or the module `cache_dit`, without further arguments.
        cache_backend: the name of a registered cache backend ("tea_cache", "cache_dit", ...). None and "none" mean no
            cache.
        cache_config: the backend's keys. A missing key takes its default, or the value that a calibration has saved in
            the directory from which the pipeline was loaded.
        fuse: whether to fuse blocks. None fuses only without a cache backend, so that adding a cache alone leaves
            computed steps bit-identical.
        compile: "regional" compiles each block separately, without graph breaks. It works on fused and unfused blocks,
            and under any cache. A dict does the same with these torch.compile arguments. Compiled blocks compute the
            same up to rounding. If far more graphs than Dynamo's limit are needed, further variants run uncompiled,
            and `.compiled` says so. {"mode": "reduce-overhead"} uses CUDA graphs; see `omni_kernels.patching.calls`.
        quantize: "int8", "fp8" or "mxfp8" runs the wide linear layers of the transformer's blocks in 8 bits: weights
            with a scale for each output channel, activations with one for each token; mxfp8 with one for each 32
            channels. The handle's `.quantised` lists the
            layers, those left as they are, and why. A dict does the same with the keys of
            `omni_kernels.patching.quantised.Options`: {"dtype": "int8", "exclude": ["attn.to_out"]}.

    Returns:
        The handle. `.fused` lists the replaced blocks, `.report` describes the last request, `.undo()` removes the
        patch. Patching again with the same arguments returns the existing handle.

    Raises:
        ValueError, TypeError: an unknown backend or key, a value out of range, or a pipeline that the backend does not
            support; for a module, an unsupported version of cache-dit, or any other module.
        PatchConflictError: the pipeline is already patched differently, or other code occupies a slot that is needed.
    """
    if isinstance(pipe, ModuleType):
        if any(one is not None for one in (cache_backend, cache_config, fuse, compile, quantize)):
            raise TypeError(f"patch({pipe.__name__}) takes no other arguments: a cache is installed on a pipeline")
        return handle_of(pipe) or LibraryHandle(pipe)
    name = None if cache_backend in (None, "none") else cache_backend
    if name is None and not isinstance(cache_config, Mapping | None):
        raise TypeError(f"cache_config must be a dict or None, not {cache_config!r}, and needs a cache_backend")
    if name is None and cache_config:
        raise ValueError(f"cache_config {dict(cache_config)!r} was given without a cache_backend")
    config = {}
    if name is not None:
        backend = backends.get(name)
        config = backends.complete(backend, backends.checked(backend, cache_config), backends.location(pipe))
    return install(pipe, name, config, fuse=fuse, compile=compile, quantize=quantize)


def install(
    pipe: Any,
    name: str | None,
    config: dict[str, Any],
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
    quantize: str | Mapping[str, Any] | None = None,
) -> PatchHandle:
    """As `patch`, with the complete configuration of the backend `name`; {} if that is None."""
    if fuse is not None and not isinstance(fuse, bool):
        raise TypeError(f"fuse must be True, False or None, not {fuse!r}")
    fuse = name is None if fuse is None else fuse
    options, quantization = calls.options_of(compile), quantised.options_of(quantize)
    quantization = quantised.complete(quantization, backends.location(pipe))
    present = handle_of(pipe)
    if present is not None:
        there = present.cache_backend, present.cache_config, present.fuse, present.compile, present.quantize
        if there == (name, config, fuse, options, quantization):
            return present
        raise PatchConflictError(
            f"this {type(pipe).__name__} is already patched: call omni_kernels.unpatch(pipe) first. It has "
            f"{present.cache_backend or 'no cache'} {_short(present.cache_config)}, fuse={present.fuse}, "
            f"compile={present.compile} and quantize={None if present.quantize is None else present.quantize.dtype!r}"
        )
    handle = PatchHandle(pipe, name, config, fuse, options, quantization)
    handle._install(None if name is None else backends.get(name))
    vars(pipe)[HANDLE] = handle
    return handle


def _short(config: Mapping[str, Any]) -> str:
    """A configuration without the contents of long values (calibrations)."""
    return repr({key: value if len(repr(value)) <= 100 else reprlib.repr(value) for key, value in config.items()})


@overload
def handle_of(pipe: ModuleType) -> LibraryHandle | None: ...


@overload
def handle_of(pipe: Any) -> PatchHandle | None: ...


def handle_of(pipe: Any) -> PatchHandle | LibraryHandle | None:
    """The handle of the patch installed on `pipe`, or None. A copy of a patched pipeline has none."""
    handle: PatchHandle | LibraryHandle | None = getattr(pipe, "__dict__", {}).get(HANDLE)
    return handle if handle is not None and handle.patches(pipe) else None


def unpatch(pipe: Any) -> None:
    """Undo the patch of `pipe`, if there is one. Raises what the handle's `undo` raises.

    `unpatch(cache_dit)` restores the library's functions, unless a patched pipeline still uses the replacements.
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
    quantize: str | Mapping[str, Any] | None = None,
) -> contextlib.AbstractContextManager[PatchHandle]: ...


@contextlib.contextmanager
def patched(
    pipe: Any,
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    *,
    fuse: bool | None = None,
    compile: str | Mapping[str, Any] | None = None,
    quantize: str | Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    """`patch` as a context manager. When nested with the same arguments, only the outer block undoes the patch."""
    outer = handle_of(pipe)
    handle = patch(pipe, cache_backend, cache_config, fuse=fuse, compile=compile, quantize=quantize)
    try:
        yield handle
    finally:
        if handle is not outer:
            handle.undo()
