"""The model behind the server: loads and warms it up, gives its engine requests, and says what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import inspect
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_kernels.patching import PatchConflictError, backends
from omni_runtime.cache.methods import AUTO, METHODS
from omni_runtime.cache.report import StepEvent
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.request import NEEDS_IMAGE, GenerationRequest
from omni_runtime.generation.result import OmniResult
from omni_runtime.serving.engine import Engine
from omni_runtime.serving.http import errors, logs
from omni_runtime.serving.http.errors import ApiError, invalid, without_paths
from omni_runtime.serving.http.fields import Body
from omni_runtime.serving.http.metrics import Metrics
from omni_runtime.serving.http.partials import Partials, differs, refused
from omni_runtime.serving.http.settings import Settings
from omni_runtime.serving.http.store import Store
from omni_runtime.serving.jobs import DeviceFailedError, Job

#: Steps of the engine's first request, whose last latents are compared with its picture.
FIRST_STEPS = 4
#: Below so many steps, some schedulers make no numbers.
TOO_FEW = 3
#: Seconds that an engine has to stop once its requests are cancelled.
PATIENCE = 10.0
#: Seconds after which to ask again while the model is loaded.
LOADING = 5

Cache = tuple[str | None, dict[str, Any]]


class State(enum.Enum):
    """What a server is doing."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"


class Service:
    """One model, served.

    Args:
        omni: the model. Its cache is what requests have that name none.
        settings: the limits.

    Attributes:
        name: what clients call the model.
        state: what it is doing.
        loaded: set when the model is loaded, or could not be.
        error: why it could not be loaded, or can do nothing more.
        finished: False if requests were cancelled when it was closed.
        stuck: whether something that was cancelled did not stop.
        methods: the cache methods that work with this model: name → summary. Known when it is ready.
        no_partials: why there are no partial pictures; None if there are.
        files: pictures and videos that are kept.
        metrics: what is counted.
    """

    def __init__(self, omni: Omni, settings: Settings) -> None:
        self.omni, self.settings = omni, settings
        name = str(omni.name)
        self.name = settings.name or (Path(name).name if os.path.isdir(name) else name)
        self.created = int(time.time())
        self.state = State.LOADING
        self.error: BaseException | None = None
        self.methods: dict[str, str] = {}
        self.no_partials: str | None = "the model is not loaded yet"
        self.files = Store(settings.keep_files, settings.keep_bytes, settings.keep_seconds)
        self.engine: Engine | None = None
        self.metrics = Metrics(self)
        self._seconds = 1.0  # of a picture, lately
        self.finished, self.stuck = True, False
        self._stopping_since: float | None = None
        self.loaded = threading.Event()

    # The model

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.state is State.READY

    @property
    def takes(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of the pipeline's call."""
        return inspect.signature(self.omni.pipeline_class.__call__).parameters

    @property
    def makes_video(self) -> bool:
        """Whether the model makes videos."""
        return self.omni.makes_video

    @property
    def needs_image(self) -> bool:
        """Whether the model makes nothing without a reference picture."""
        return "image" in self.takes and any(part in self.omni.pipeline_class.__name__ for part in NEEDS_IMAGE)

    def about(self) -> dict[str, Any]:
        """What `/v1/models` says of the model."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "omni",
            "omni": {
                "makes": "video" if self.makes_video else "image",
                "references": "needed" if self.needs_image else "possible" if "image" in self.takes else "none",
                "defaults": self._defaults(),
                "cache_backend": self.omni.cache_backend,
                "methods": self.methods,
                "partial_images": self.no_partials or True,
            },
        }

    def _defaults(self) -> dict[str, Any]:
        given, takes = self.omni.defaults, self.takes
        steps = takes.get("num_inference_steps")
        return {
            "size": None if self._own_size() is None else "{1}x{0}".format(*(self._own_size() or ())),
            "steps": given.get("num_inference_steps") or (steps and steps.default) or None,
        }

    def _own_size(self) -> tuple[int, int] | None:
        """Height and width if a request names none; None if the pipeline finds them from its reference."""
        given = self.omni.defaults
        if "height" in given and "width" in given:
            return given["height"], given["width"]
        pipe = self.omni.pipe if self.state is not State.LOADING else None
        sample, scale = getattr(pipe, "default_sample_size", None), getattr(pipe, "vae_scale_factor", None)
        if isinstance(sample, int) and isinstance(scale, int) and not self.needs_image:
            return sample * scale, sample * scale
        return None

    # Its life

    def start(self, failed: Callable[[], None] = lambda: None) -> None:
        """Load the model in a thread of its own. `failed` is called there if that cannot be done."""
        threading.Thread(target=self._load, args=[failed], name="omni-load", daemon=True).start()

    def _load(self, failed: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            pipe = self.omni.load()
            pipe.set_progress_bar_config(disable=True)
            first = self._first_request()
            with contextlib.suppress(ValueError):  # a configuration for another number of steps, such as a mask
                self.omni.warmup("a", **first)
            limits = self.settings
            self.engine = self.omni.engine(
                max_batch=limits.max_batch, in_flight=limits.in_flight, waiting=limits.queue, memory=limits.memory,
                failed=self._broken,
            )  # fmt: skip
            self.methods = self._usable_methods()
            self.no_partials = self._check_partials(first)
        except BaseException as error:
            if self.state is State.STOPPING:  # the model was closed meanwhile
                self.loaded.set()
                return
            self.error, self.state = error, State.FAILED
            logs.failure(error, "load", self.settings.debug)
            failed()
        else:
            if self.state is State.LOADING and self.error is None:
                self.state = State.READY
                logs.event("ready", model=self.name, seconds=round(time.monotonic() - began, 3))
        self.loaded.set()

    def _broken(self, error: DeviceFailedError) -> None:
        """The engine can do nothing more. Whoever watches the server sees that it is not healthy."""
        self.error = error
        logs.event("failed", reason=self.reason)
        if self.state is not State.STOPPING:
            self.state = State.FAILED

    @property
    def reason(self) -> str | None:
        """The class of the error for which the server can do nothing more; None while it works."""
        return None if self.error is None else type(self.error.__cause__ or self.error).__name__

    def _first_request(self) -> dict[str, Any]:
        if not self.needs_image:
            return {}
        from PIL import Image

        return {"image": Image.new("RGB", (64, 64), "grey")}

    def _usable_methods(self) -> dict[str, str]:
        found = {}
        for name, method in METHODS.items():
            with contextlib.suppress(ValueError, TypeError, PatchConflictError):
                backend, config = self.omni.resolved(name, None)
                if backend is not None and self.engine is not None:
                    self.engine.check_cache(backend, config)
                    found[name] = method.summary
        return found

    def _check_partials(self, first: dict[str, Any]) -> str | None:
        """Run the engine's first request, and find out whether its latents can be shown."""
        assert self.engine is not None
        why = "videos have no partial pictures" if self.makes_video else refused(self.omni.pipeline_class)
        partials = Partials(0, lambda *shown: None)
        more = first if why else first | {"callback_on_step_end": partials}
        if "num_inference_steps" in self.takes:
            more = more | {"num_inference_steps": FIRST_STEPS}
        result = self.engine.submit("a", cache_backend=None, seed=0, **more).result()
        return why or differs(self.omni.pipe, partials, result.images[0])

    def check_ready(self) -> Engine:
        """The engine.

        Raises:
            ApiError: the model is not ready.
        """
        if self.ready and self.engine is not None:
            return self.engine
        if self.state is State.FAILED and self.engine is not None and self.engine.failure is not None:
            raise errors.device_failed()
        after = None if self.state is State.FAILED else LOADING
        words = {
            State.LOADING: "the model is being loaded: try again later",
            State.FAILED: "the model could not be loaded",
            State.STOPPING: "the server is stopping",
        }[self.state]
        raise ApiError(503, words, code=f"model_{self.state.value}", retry_after=after)

    def stop_taking(self) -> None:
        """Take no more requests; those in flight go on."""
        if self.state is not State.STOPPING:
            self.state, self._stopping_since = State.STOPPING, time.monotonic()

    async def close(self) -> bool:
        """Let the requests in flight finish, for `drain_seconds` from `stop_taking`; then cancel them.

        Returns:
            Whether all have finished.
        """
        self.stop_taking()
        assert self._stopping_since is not None
        engine, end = self.engine, self._stopping_since + self.settings.drain_seconds
        if engine is None:
            return True
        while (busy := engine.queued + engine.running) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.finished = self.finished and not busy
        closing = self.cancel()
        end = time.monotonic() + PATIENCE
        while closing.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.stuck = closing.is_alive()
        return self.finished

    def cancel(self) -> threading.Thread:
        """Cancel all requests, and close the engine, in a thread that ends when this is done."""

        def close() -> None:
            if self.engine is not None:
                self.engine.close(cancel=True)

        closing = threading.Thread(target=close, name="omni-close", daemon=True)
        closing.start()
        return closing

    # Requests

    def check_model(self, body: Body) -> None:
        """Check that the request is for this model.

        Raises:
            ApiError: it names another one.
        """
        if body.model not in (None, "", self.name):
            raise ApiError(
                404, f"there is no model {body.model[:64]!r} here, only {self.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def prepared(self, body: Body, more: Mapping[str, Any]) -> tuple[GenerationRequest, Cache]:
        """The checked request of a body, and its cache.

        Args:
            body: its fields.
            more: further arguments of the pipeline's call.

        Raises:
            ApiError: the model cannot do this, or not with these values; it names the field.
        """
        backend, config = self._cache_of(body)
        arguments = {**self._arguments(body), **more}
        try:
            (one,) = self.omni.prepare_for(
                backend, config, body.prompt, seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
                negative_prompt=body.negative_prompt, **arguments,
            )  # fmt: skip
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise errors.of_submission(error, 1) from None
        return one, (backend, config)

    def _arguments(self, body: Body) -> dict[str, Any]:
        size = body.width_and_height
        found: dict[str, Any] = {"num_inference_steps": body.steps}
        if size is not None:
            found["width"], found["height"] = size
        if body.guidance is not None:
            name = guidance_of(self.takes)
            if name is None:
                raise invalid("guidance", f"{self.omni.pipeline_class.__name__} takes no guidance", "unsupported")
            found[name] = body.guidance
        return found

    def _cache_of(self, body: Body) -> Cache:
        if body.preset is not None:
            return self._resolved(AUTO.name, {"quality": body.preset}, "quality")
        if not {"cache_backend", "cache_config"} & body.model_fields_set:
            return self.omni.cache_backend, self.omni.cache_config
        backend = body.cache_backend if "cache_backend" in body.model_fields_set else self.omni.cache_backend
        if _names_a_file(backend, body.cache_config):
            raise invalid("cache_config", "cache_config: files cannot be named here: give the numbers themselves")
        known = backend in (None, "none", *backends.available())
        return self._resolved(backend, body.cache_config, "cache_config" if known else "cache_backend")

    def _resolved(self, backend: str | None, config: Mapping[str, Any] | None, field: str) -> Cache:
        """A cache method and its complete configuration; `field` is named if this model cannot have it."""
        try:
            backend, complete = self.omni.resolved(backend, config)
            if backend is not None:
                self.check_ready().check_cache(backend, complete)
        except (ValueError, TypeError, PatchConflictError) as error:
            raise invalid(field, without_paths(str(error))) from None
        return backend, complete

    def submit(self, one: GenerationRequest, cache: Cache, on_step: Callable[[StepEvent], None] | None = None) -> Job:
        """Give the engine a prepared request.

        Raises:
            ApiError: it does not take it.
        """
        engine = self.check_ready()
        try:
            job = engine.take(one, *cache, deadline=self.settings.deadline, on_step=on_step)
        except Exception as error:
            raise errors.of_submission(error, self.retry_after()) from None
        job.add_done_callback(self._over)
        return job

    def _over(self, job: Job) -> None:
        with contextlib.suppress(BaseException):
            self.metrics.count(job, job.result(0))
            self._seconds += 0.2 * (time.monotonic() - (job.started or job.submitted) - self._seconds)

    def retry_after(self) -> int:
        """Seconds after which a full queue will probably have room."""
        rounds = (0 if self.engine is None else self.engine.queued) / self.settings.in_flight
        return max(1, min(60, math.ceil(rounds * self._seconds)))

    def failed(self, error: BaseException, job: Job, request_id: str) -> ApiError:
        """The answer to a job that ended with an error; what is unexpected is logged."""
        answer = errors.of_job(error, job.forwards > 0)
        if answer.code == "not_a_number" and (job.request.arguments.get("num_inference_steps") or TOO_FEW) < TOO_FEW:
            answer = invalid("steps", str(error), "not_a_number")  # some schedulers divide by zero there
        if answer.status == errors.CLIENT_LEFT and self.state is State.STOPPING:
            answer = ApiError(503, "the server has stopped", code="stopping")
            self.finished = False
        if answer.status == 500:
            logs.failure(error, request_id, self.settings.debug)
        return answer

    def facts(self, job: Job, result: OmniResult) -> dict[str, Any]:
        """An answer's facts about one picture: the field `omni`."""
        report = result.cache
        steps = len(result.timings.steps) or job.steps
        skipped = [] if report is None else report.skipped
        facts: dict[str, Any] = {
            "seed": result.seed,
            "steps": steps,
            "computed": steps - len(skipped),
            "skipped": len(skipped),
            "mask": "".join("0" if step in set(skipped) else "1" for step in range(steps)),
            "forwards": job.forwards if report is None else report.forwards,
            "forwards_skipped": 0 if report is None else report.forwards_saved,
            "method": job.backend,
            "seconds": round(result.timings.total, 4),
            "queued_seconds": round((job.started or job.submitted) - job.submitted, 4),
            "batch": round(job.samples / job.forwards, 2) if job.forwards else 0,
        }
        if report is not None:
            facts["blocks"] = {"run": report.blocks_run, "total": report.blocks_total}
            facts["notes"] = [without_paths(note) for note in report.notes]
        return facts

    def written(self, result: OmniResult) -> dict[str, Any]:
        """The settings that a file holds: without the server's directories."""
        kept = {key: value for key, value in result.settings.items() if key != "callback_on_step_end"}
        return {key: value if key == "prompt" else _told(value) for key, value in kept.items()} | {"model": self.name}


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _told(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_told(one) for one in value]
    return without_paths(value) if isinstance(value, str) else value


def guidance_of(takes: Mapping[str, inspect.Parameter]) -> str | None:
    """The argument of a pipeline that is its guidance. Qwen-Image has two: `guidance_scale` is for distilled models."""
    scale, true_scale = takes.get("guidance_scale"), takes.get("true_cfg_scale")
    if true_scale is not None and (scale is None or scale.default is None):
        return "true_cfg_scale"
    return None if scale is None else "guidance_scale"


def with_seed(one: GenerationRequest, number: int, **more: Any) -> GenerationRequest:
    """The request for the picture of this number among several, with further arguments."""
    seed = None if one.seed is None else (one.seed + number) % 2**64
    return dataclasses.replace(one, seed=seed, arguments={**one.arguments, **more})


def _names_a_file(backend: Any, config: Mapping[str, Any] | None) -> bool:
    """Whether a value would be read from a file of the server."""
    method = METHODS.get(backend)
    calibrated = None if method is None else method.calibrated_by
    texts = [(key, value) for key, value in (config or {}).items() if isinstance(value, str)]
    return any(key == calibrated or "/" in value or "\\" in value for key, value in texts)
