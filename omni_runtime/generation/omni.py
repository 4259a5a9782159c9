"""`Omni`: load a pipeline, put a cache on it, generate.

    omni = Omni(model="Qwen/Qwen-Image", cache_backend="tea_cache", cache_config={"rel_l1_thresh": 0.2})
    outputs = omni.generate(prompt="A cat sitting on a windowsill", num_inference_steps=50)
    outputs[0].images[0].save("cat.png")

Creating an `Omni` reads only the model's index and checks the model, the cache and its configuration. The weights are
loaded when they are first needed, after the first request has been checked.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from omni_kernels.device import PeakMemory
from omni_kernels.patching import PatchHandle, backends, handle_of, quantised
from omni_kernels.patching.api import install
from omni_kernels.patching.calls import options_of
from omni_kernels.patching.warming import STEPS, Warmup, warmup
from omni_runtime.cache import models
from omni_runtime.cache.report import StepEvent
from omni_runtime.generation import loading, request, video
from omni_runtime.generation.clock import LoopClock
from omni_runtime.generation.result import OmniResult, Timings, jsonable, not_a_number
from omni_runtime.generation.seeding import RandomState
from omni_runtime.parallel.parallel import Parallel
from omni_runtime.parallel.requests import asked

if TYPE_CHECKING:
    from omni_runtime.serving.engine import Engine
    from omni_runtime.serving.jobs import Job

#: The environment variable that names the cache backend if the caller names none.
ENVIRONMENT_VARIABLE = "DIFFUSION_CACHE_BACKEND"


class _FromEnvironment:
    def __repr__(self) -> str:
        return f"${ENVIRONMENT_VARIABLE}"


FROM_ENVIRONMENT: Any = _FromEnvironment()


class Omni:
    """A diffusers pipeline with a step cache, fused blocks, compiled blocks, or all of them.

    Several threads may share one `Omni`; their requests run one after the other. Copying or pickling an `Omni` creates
    a new one from the same arguments, which loads when it is first used. If the model is a loaded pipeline, that
    pipeline is copied or pickled too.

    In each process, diffusers keeps the rotary tables of the last 128 image sizes: 2 MB per size for Qwen-Image at
    1024². Those of Qwen-Image-Layered, of which diffusers keeps all, are bounded in the same way.

    Args:
        model: an embedded model's name, a directory written by `save_pretrained`, a hub id, or a loaded pipeline.
        dtype: a torch.dtype or its name. "auto" is float32 on the CPU and bfloat16 elsewhere. A loaded pipeline is
            converted only if a dtype is named.
        device: "cpu", "cuda:1", ... "auto" is the accelerator if there is one, else the CPU. A loaded pipeline is moved
            only if a device is named.
        cache_backend: "tea_cache", "cache_dit", ... None and "none" mean no cache. By default, the environment variable
            `DIFFUSION_CACHE_BACKEND` names it.
        quality: "exact", "high", "balanced" or "fast": the cache `auto` with this preset, instead of cache_backend.
        cache_config: the backend's keys, as a dict or as JSON text. Missing keys take their defaults. A model's
            directory may provide some of them: `tea_cache.json` holds the `coefficients` of tea_cache,
            `mag_cache.json` the `mag_ratios` of mag_cache.
        fuse: whether transformer blocks run fused (`omni_kernels.patch`). By default they stay as they are, so a
            computed step gives the same bits as the pipeline itself.
        compile: "regional" compiles each transformer block by itself. A dict does the same, with its entries as
            arguments of torch.compile.
        quantize: "int8", "fp8" or "mxfp8" runs the wide linear layers of the transformer's blocks in 8 bits. A dict
            does the same with more keys (`omni_kernels.patching.quantised.Options`).
        parallel: how several ranks, started with torchrun, share the work: {"ulysses": 2, "ring": 1, "cfg": 2,
            "tensor": 1}. Their product is the number of ranks. Every rank makes the same calls, and gets the same
            results.
        from_pretrained: arguments of `DiffusionPipeline.from_pretrained` (variant, revision, token, components, ...).

    Attributes:
        name: the model as the caller named it.
        location: its directory or hub id; None for a loaded pipeline that came from neither.
        cache_backend, cache_config: the installed backend and its configuration with defaults filled in; None and {}
            without a cache.

    Raises:
        ValueError: a backend or a configuration key is unknown, or a value is out of range.
        TypeError: an argument is unknown or has the wrong type, or `model` is not a pipeline.
        FileNotFoundError: there is no such model.
        PatchConflictError: the loaded pipeline already has a different patch.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: Any = "auto",
        device: str | torch.device = "auto",
        cache_backend: str | None = FROM_ENVIRONMENT,
        cache_config: Mapping[str, Any] | str | None = None,
        quality: str | None = None,
        fuse: bool | None = None,
        compile: str | Mapping[str, Any] | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        parallel: Mapping[str, int] | None = None,
        **from_pretrained: Any,
    ) -> None:
        if quality is not None:
            if cache_backend not in (FROM_ENVIRONMENT, "auto") or cache_config:
                raise ValueError(
                    f"quality={quality!r} chooses the cache by itself: leave cache_backend and its config out"
                )
            cache_backend, cache_config = "auto", {"quality": quality}
        backend, config = resolve_cache(cache_backend, cache_config)
        self._arguments: dict[str, Any] | None = {
            "model": model,
            "dtype": dtype,
            "device": device,
            "cache_backend": backend,
            "cache_config": config,
            "fuse": fuse,
            "compile": compile,
            "quantize": quantize,
            "parallel": parallel,
            **from_pretrained,
        }
        self._turn = threading.RLock()
        options_of(compile)
        quantised.options_of(quantize)
        self._fuse, self._compile, self._quantize = fuse, compile, quantize
        self._parallel = Parallel.of(parallel)
        given = device
        if self._parallel is not None:
            device = self._parallel.device(device)
        dtype = _one_dtype(dtype, from_pretrained)
        if isinstance(model, str | os.PathLike):
            source = loading.find(os.fspath(model), from_pretrained)
            complete = _complete(backend, config, source.location, source.transformer_config, source.name)
            target = self._device = loading.resolve_device(device)
            if self._parallel is not None:
                self._parallel.check_class(source.transformer_config)
            dtype = loading.resolve_dtype(dtype, target)
            self.name = source.name
            self.location: str | None = source.location
            self._defaults = source.defaults
            self._pipeline_class = source.pipeline_class
            self._transformer_config = source.transformer_config
            self._load: Callable[[], Any] = lambda: loading.load(source, dtype, target, from_pretrained)
            self._outline: Callable[[], Any] = functools.cache(lambda: loading.outline(source, from_pretrained))
            self._scheduler: Callable[[], Any] = lambda: loading.scheduler_of(source, from_pretrained)
        else:
            _check_loaded(model, from_pretrained)
            self.location = backends.location(model)
            self._transformer_config = _config_of(model)
            complete = _complete(backend, config, self.location, self._transformer_config, type(model).__name__)
            stays = str(given) == "auto"
            if self._parallel is not None:
                self._parallel.check_class(self._transformer_config)
                self._device = model.device if stays else loading.resolve_device(device)
            self.name = self.location or type(model).__name__
            self._defaults = {}
            self._pipeline_class = type(model)
            self._load = lambda: _moved(model, dtype, "auto" if stays else device)
            self._outline = lambda: model
            self._scheduler = lambda: model.scheduler
        self.cache_backend, self.cache_config = backend, complete
        self._pipe: Any = None
        self._engine: Engine | None = None
        self._handle: PatchHandle | None = None
        self._patched_here = self._closed = False
        if not isinstance(model, str | os.PathLike):
            self.load()

    def __repr__(self) -> str:
        return f"Omni({self.name!r}, cache_backend={self.cache_backend!r}, cache_config={self.cache_config!r})"

    def __reduce__(self) -> Any:
        if self._arguments is None:
            raise TypeError("this Omni is closed: it can be neither copied nor pickled")
        return _made_anew, (type(self), self._arguments)

    def __enter__(self) -> Omni:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline. Reading this property loads it if necessary."""
        return self.load()

    @property
    def rank(self) -> int:
        """This rank, if several share the work, else 0. Rank 0 should write what only one of them needs to write."""
        return 0 if self._parallel is None else self._parallel.rank

    @property
    def pipeline_class(self) -> type:
        """The class of the pipeline. Needs no weights, unless the model brings its own code."""
        return self._pipeline_class or type(self.pipe)

    @property
    def defaults(self) -> dict[str, Any]:
        """Arguments of `generate` that the model itself chooses, where they differ from its pipeline's."""
        return dict(self._defaults)

    @property
    def makes_video(self) -> bool:
        """Whether the pipeline makes videos, which results hold as `frames`. Needs no weights."""
        return video.makes_video(self.pipeline_class)

    def scheduler(self) -> Any:
        """The model's scheduler, made from its configuration: needs no weights. None if it cannot be made."""
        return self._scheduler()

    def load(self) -> Any:
        """Load the weights and install the cache, if that has not been done yet. Returns the pipeline.

        Raises:
            RuntimeError: this `Omni` is closed.
            ValueError: weights are missing from the model's files, or are not finite.
            OSError: `from_pretrained` cannot read the model. Its other errors are passed on, too.
        """
        with self._turn:
            return self._loaded()

    def _loaded(self) -> Any:
        if self._closed:
            raise RuntimeError("this Omni is closed")
        if self._pipe is None:
            with self._together(self._asked_at_loading):
                self._pipe = self._installed()
        return self._pipe

    def _installed(self) -> Any:
        pipe = self._load()
        before = handle_of(pipe)
        if self._parallel is not None:
            self._parallel.install(pipe)
        # Options that were not given keep the values of an existing patch.
        fuse, compile, quantize = self._fuse or False, self._compile, self._quantize
        if before is not None:
            fuse = before.fuse if self._fuse is None else self._fuse
            compile = before.compile if compile is None else compile
            quantize = quantize or (None if before.quantize is None else before.quantize.given())
        self._handle = install(
            pipe, self.cache_backend, self.cache_config, fuse=fuse, compile=compile, quantize=quantize
        )
        self._patched_here = self._handle is not before
        return pipe

    @contextlib.contextmanager
    def _together(self, asked: Callable[[], dict[str, str]]) -> Iterator[None]:
        """Context manager: all ranks work together within; `asked` returns what must be the same on all of them."""
        if self._parallel is None:
            yield
            return
        self._parallel.join(self._device)
        with self._parallel.section(asked()):
            yield

    def _asked_at_loading(self) -> dict[str, str]:
        given = {"model": str(self.name), "cache_backend": self.cache_backend, "cache_config": self.cache_config}
        return asked(given | {"fuse": self._fuse, "compile": self._compile, "quantize": self._quantize}, {})

    def close(self) -> None:
        """Remove the cache from the pipeline and drop the reference to the pipeline. A second call does nothing.

        An engine is closed first: its requests are finished.

        Raises:
            PatchConflictError: other code has patched over this patch. Nothing is changed, and `close` can be called
                again later.
        """
        if self._engine is not None:
            self._engine.close()
        with self._turn:
            if self._handle is not None and self._patched_here and self._handle.undoable:
                self._handle.undo()
            if self._parallel is not None:
                self._parallel.close()
            self._handle = self._pipe = None
            self._load, self._outline, self._scheduler, self._arguments = _closed, _closed, _closed, None
            self._closed = True

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        *,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        **arguments: Any,
    ) -> list[OmniResult]:
        """Run the pipeline once per prompt.

        All requests are checked before the first one runs. Error messages name the argument.

        Args:
            prompt: one prompt, or a list of them.
            negative_prompt: one for all prompts, or a list with one for each. Most pipelines apply guidance only if
                there is one.
            image: for pipelines that start from an image: one PIL image, path, tensor or array for all prompts. With a
                list of prompts, a list gives each prompt its own image. With a single prompt, a list holds that
                prompt's reference images.
            num_inference_steps: denoising steps; by default the model's own number.
            height, width: in pixels; multiples of the model's patch size times its VAE's scale factor (usually 16).
            seed: one for all prompts, or a list with one for each. By default each prompt gets a random seed, which is
                in its result.
            on_step: called with a `StepEvent` after each denoising step.
            arguments: other arguments of the pipeline's call (true_cfg_scale, output_type, ...).

        Returns:
            One result per prompt, in order.

        Raises:
            ValueError: an argument has an unusable value, or a required one is missing.
            TypeError: the pipeline has no such argument, or the argument has the wrong type.
            FileNotFoundError: there is no image file of that name, or no such model.
        """
        requests = self.prepare(
            prompt,
            negative_prompt=negative_prompt,
            image=image,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            seed=seed,
            **arguments,
        )
        return [self.run(one, on_step) for one in requests]

    def warmup(self, prompt: str = "", *, steps: int = STEPS, **arguments: Any) -> Warmup:
        """Run one short request, so that everything is compiled for later requests of the same size.

        Takes the arguments of `generate` and the number of steps; see `omni_kernels.warmup`.
        """
        (one,) = self.prepare(prompt, seed=0, **arguments)
        call = one.call() | {"num_inference_steps": steps}
        with self._together(lambda: self._asked(one) | {"warmup": str(steps)}), self._shared():
            return warmup(self.pipe, steps=steps, **call)

    def prepare(self, prompt: str | Sequence[str] | None = None, **arguments: Any) -> list[request.GenerationRequest]:
        """Return the checked requests that `generate` would run. Takes its arguments and raises its errors.

        Only the check of height and width needs the loaded pipeline. All other checks run before the weights are read.
        """
        return self.prepare_for(self.cache_backend, self.cache_config, prompt, **arguments)

    def prepare_for(
        self, backend: str | None, config: Mapping[str, Any], prompt: str | Sequence[str] | None, **arguments: Any
    ) -> list[request.GenerationRequest]:
        """As `prepare`, for another cache than that of this `Omni`; `config` is complete."""
        pipeline_class = self.pipeline_class
        if self._parallel is not None and arguments.get("seed") is None and arguments.get("generator") is None:
            self.load()
            count = 1 if prompt is None or isinstance(prompt, str) else len(prompt)
            arguments["seed"] = [self._parallel.seed() for _ in range(count)]
        requests = request.build(pipeline_class, prompt, defaults=self._defaults, **arguments)
        _check_steps(backend, config, request.step_count(pipeline_class, requests[0].arguments))
        request.check_size(self.pipe, requests)
        return requests

    def check(
        self,
        prompt: str | None = None,
        *,
        cache_backend: str | None = "",
        cache_config: Mapping[str, Any] | str | None = None,
        **arguments: Any,
    ) -> None:
        """Check a request without the weights. Takes the arguments of `Engine.submit`, and raises its errors.

        A pipeline class that comes with the model is not known before it is loaded: then only the cache is checked.
        """
        backend, config = self.cache_backend, self.cache_config
        if cache_backend != "" or cache_config is not None:
            backend, config = self.resolved(backend if cache_backend == "" else cache_backend, cache_config)
        if self._pipeline_class is None:
            return
        requests = request.build(self._pipeline_class, prompt, defaults=self._defaults, **arguments)
        _check_steps(backend, config, request.step_count(self._pipeline_class, requests[0].arguments))
        request.check_size(self._pipe or self._outline(), requests)

    def resolved(
        self, cache_backend: str | None, cache_config: Mapping[str, Any] | str | None
    ) -> tuple[str | None, dict[str, Any]]:
        """A backend for this model and its complete configuration, with the model's own calibration.

        Raises:
            ValueError, TypeError: as the constructor.
        """
        backend, config = resolve_cache(cache_backend, cache_config)
        return backend, _complete(backend, config, self.location, self._transformer_config, str(self.name))

    def engine(self, **limits: Any) -> Engine:
        """An engine that runs many requests at once; see `omni_runtime.serving.engine.Engine` for the limits.

        While it is open, `generate` goes through it, too.

        Raises:
            RuntimeError: there is one already.
        """
        from omni_runtime.serving.engine import Engine

        if self._parallel is not None:
            raise ValueError("an engine runs requests in an order of its own: it does not work with parallel")
        with self._turn:
            if self._engine is not None:
                raise RuntimeError("this Omni has an engine already: close it first")
            self._engine = Engine(self, **limits)
            return self._engine

    def engine_closed(self) -> None:
        """The engine of this `Omni` is closed: `generate` runs its requests one after the other again."""
        self._engine = None

    async def agenerate(self, prompt: str | None = None, **arguments: Any) -> OmniResult:
        """As `generate`, for one prompt, for asynchronous callers. Requests that overlap share forwards.

        The first call opens an engine, which stays open until `close`. Cancelling the task cancels the request.
        """
        import asyncio

        def submit() -> Job:
            with self._turn:
                engine = self._engine or self.engine()
            return engine.submit(prompt, **arguments)

        return await (await asyncio.to_thread(submit))

    def run(self, one: request.GenerationRequest, on_step: Callable[[StepEvent], None] | None = None) -> OmniResult:
        """Run one prepared request. It waits for the requests of other threads, or goes through the engine.

        If the pipeline raises, `on_step` is removed and the pipeline's offloading hooks are freed.

        Raises:
            RankError: with `parallel`, another rank has failed; the message names it and its error.
        """
        engine = self._engine
        if engine is not None:
            job = engine.take(one, self.cache_backend, self.cache_config, on_step=on_step)
            try:
                return job.result()
            except BaseException:
                job.cancel()  # no one waits for it any more
                raise
        with self._turn:
            self.load()
            with self._together(lambda: self._asked(one)):
                return self._run(one, on_step)

    def _run(self, one: request.GenerationRequest, on_step: Callable[[StepEvent], None] | None) -> OmniResult:
        pipe, handle = self.pipe, self._handle
        assert handle is not None  # load() has set it
        if not handle.active:
            raise RuntimeError(f"the pipeline was unpatched, so {self!r} has no cache: create another Omni")
        memory = PeakMemory(pipe._execution_device)
        clock = LoopClock(pipe._execution_device, None if handle.cache_backend else _without_cache(on_step))
        cache = self.cache_backend, self.cache_config
        settings = self._settings(one, *cache)  # now, because `on_step` may close this Omni
        former, handle.on_step = handle.on_step, on_step
        try:
            seeded = _seeded(one.seed, pipe._execution_device)
            with clock.following(pipe), not_a_number(), seeded, self._shared():
                output = pipe(**one.call())
        except BaseException:
            pipe.maybe_free_model_hooks()  # the pipeline itself would do this at its end: it offloads the models
            raise
        finally:
            handle.on_step = former
        return self.result_of(output, one, cache, handle, clock.timings(), memory.bytes(), settings)

    def _shared(self) -> contextlib.AbstractContextManager[None]:
        """Context manager for a call of the pipeline: its branches of guidance are shared out among ranks."""
        if self._parallel is None:
            return contextlib.nullcontext()
        return self._parallel.during(self._pipe, None if self._handle is None else self._handle._installed)

    def _asked(self, one: request.GenerationRequest) -> dict[str, str]:
        return asked(self._settings(one, self.cache_backend, self.cache_config), one.arguments)

    def result_of(
        self,
        output: Any,
        one: request.GenerationRequest,
        cache: tuple[str | None, Mapping[str, Any]],
        reporting: Any,
        timings: Timings,
        memory: int | None,
        settings: dict[str, Any] | None = None,
    ) -> OmniResult:
        """The result of one request.

        Args:
            output: what the pipeline has returned.
            cache: the cache method and its configuration.
            reporting: what has the request's report as `report`; None without a cache.
            settings: what the request depended on; None to find it now.
        """
        of_frames = hasattr(output, "frames")
        return OmniResult(
            images=None if of_frames else output.images if hasattr(output, "images") else output[0],
            cache=None if reporting is None else reporting.report,
            timings=timings,
            prompt=one.prompt,
            seed=one.seed,
            settings=self._settings(one, *cache) if settings is None else settings,
            peak_memory=memory,
            frames=output.frames if of_frames else None,
        )

    def check_steps(self, steps: int | None) -> None:
        """Check the configuration against the step count, such as a mask's length.

        Raises:
            ValueError: the configuration does not fit this number of steps.
        """
        _check_steps(self.cache_backend, self.cache_config, steps)

    def _settings(
        self, one: request.GenerationRequest, backend: str | None, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        import diffusers

        import omni_kernels

        pipe, handle = self.pipe, self._handle
        assert handle is not None  # load() has set it
        parallel = {} if self._parallel is None else {"parallel": self._parallel.degrees.to_dict()}
        return {
            "model": str(self.name),
            "pipeline": type(pipe).__name__,
            "prompt": one.prompt,
            "seed": one.seed,
            "num_inference_steps": request.step_count(type(pipe), one.arguments),
            **jsonable(one.arguments),
            "cache_backend": backend,
            "cache_config": jsonable(config),
            "fused_blocks": len(handle.fused.replaced),
            "compiled_blocks": len(handle.compiled),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "device": pipe._execution_device.type,
            **parallel,
            "versions": {
                "omni_kernels": omni_kernels.__version__,
                "diffusers": diffusers.__version__,
                "torch": torch.__version__,
            },
        }


def _seeded(seed: int | None, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """While open, torch's global random numbers follow from the seed."""
    return contextlib.nullcontext() if seed is None else RandomState.of_seed(seed, device).used()


def _check_steps(name: str | None, config: Mapping[str, Any], steps: int | None) -> None:
    if name is None or steps is None:
        return
    check: Any = backends.get(name).check
    if "steps" in inspect.signature(check).parameters:
        check(config, steps=steps)


def _closed() -> Any:
    raise RuntimeError("this Omni is closed")


def _made_anew(kind: type[Omni], arguments: dict[str, Any]) -> Omni:
    """Create the copy of a copied or pickled `Omni`."""
    return kind(**arguments)


def resolve_cache(
    cache_backend: str | None = FROM_ENVIRONMENT, cache_config: Mapping[str, Any] | str | None = None
) -> tuple[str | None, dict[str, Any] | None]:
    """Return the backend's name and its configuration as a dict, both checked; None and None without a cache.

    Raises:
        ValueError: the backend or a key is unknown, a value is out of range, the text is not JSON, or a configuration
            is given without a backend.
        TypeError: a value has the wrong type.
    """
    origin = ""
    if cache_backend is FROM_ENVIRONMENT:
        cache_backend = os.environ.get(ENVIRONMENT_VARIABLE) or None
        origin = f" (from the environment variable {ENVIRONMENT_VARIABLE})"
    config = _config(cache_config)
    if cache_backend in (None, "none"):
        if config:
            raise ValueError(f"cache_config {config!r} was given without a cache_backend")
        return None, None
    try:
        backend = backends.get(cache_backend)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{error}{origin}") from None
    return cache_backend, backends.checked(backend, config)


def _complete(
    backend: str | None,
    config: dict[str, Any] | None,
    directory: Any,
    transformer_config: Mapping[str, Any] | None,
    name: str,
) -> dict[str, Any]:
    """Return a checked configuration with the model's own calibration, checked against the model's config.json.

    Raises:
        ValueError: the backend's `check` fails, no cache knows the transformer, or the model has no transformer.
        TypeError: the backend's `check` finds a value of the wrong type.
    """
    if backend is None or config is None:
        return {}
    if transformer_config is None:
        raise ValueError(f"{name} has no transformer: cache backend {backend!r} cannot serve it")
    return backends.complete(backends.get(backend), config, directory, models.describe(transformer_config))


def _config(cache_config: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    if isinstance(cache_config, str):
        try:
            cache_config = json.loads(cache_config)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"cache_config is not valid JSON: {error}: {backends.shown(cache_config)}") from None
        if not isinstance(cache_config, dict):
            raise TypeError(
                f'cache_config must be a JSON object, like {{"key": 1}}, not {backends.shown(cache_config)}'
            )
    if cache_config is None:
        return None
    if not isinstance(cache_config, Mapping):
        raise TypeError(f"cache_config must be a dict or JSON text, not {type(cache_config).__name__}")
    return dict(cache_config)


def _one_dtype(dtype: Any, from_pretrained: dict[str, Any]) -> Any:
    """Return `dtype`, or `torch_dtype` (diffusers' name for it) if that is given instead."""
    if "torch_dtype" not in from_pretrained:
        return dtype
    if dtype != "auto":
        raise ValueError("dtype and torch_dtype cannot both be given")
    return from_pretrained.pop("torch_dtype")


def _check_loaded(model: Any, from_pretrained: Mapping[str, Any]) -> None:
    if any(kind.__name__ == "ModularPipeline" for kind in type(model).__mro__):
        raise TypeError(f"{type(model).__name__} is a modular pipeline: {loading.MODULAR}")
    if not (callable(model) and hasattr(model, "scheduler") and hasattr(model, "progress_bar")):
        raise TypeError(f"model must be a name, a directory or a loaded diffusers pipeline, not {type(model).__name__}")
    if from_pretrained:
        raise TypeError(f"a loaded pipeline takes no {', '.join(sorted(from_pretrained))}")


def _config_of(pipe: Any) -> Mapping[str, Any] | None:
    transformer = getattr(pipe, "transformer", None)
    return None if transformer is None else {"_class_name": type(transformer).__name__, **transformer.config}


def _moved(pipe: Any, dtype: Any, device: str | torch.device) -> Any:
    target = None if device == "auto" else loading.resolve_device(device)
    if dtype != "auto":
        pipe.to(loading.resolve_dtype(dtype, target or pipe.device))
    return pipe if target is None else pipe.to(target)


def _without_cache(on_step: Callable[[StepEvent], None] | None) -> Callable[[int, int], None] | None:
    """Wrap `on_step` for a pipeline without a cache: every step is computed, and its event has no branches."""
    if on_step is None:
        return None
    return lambda step, steps: on_step(StepEvent(step, steps, True, {}))
