"""The scheduler seam: when a request opens, steps and ends.

`set_timesteps` opens a request, `step` closes one denoising step, and the request ends with its last step, or when the
pipeline leaves its loop early (its progress bar closes then), by an interrupt or an exception. Whatever state a cache
has hangs on the request, so that no request can see another's: not after an exception, not after an interrupt.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omni_kernels.patching import Patch, PatchConflictError
from omni_runtime.cache.report import Decision

if TYPE_CHECKING:
    import torch


class Request:
    """One run of a pipeline's denoising loop.

    Attributes:
        sigmas: the noise levels σ of the scheduler's steps, where it has any, else its timesteps.
        begin: the scheduler's step that the loop begins with (image-to-image pipelines leave out the first ones).
        step: index of the step under way, from 0 at `begin`.
        state: whatever a cache keeps of this request; dropped when it ends.
        calls: transformer calls in the step under way.
        outputs: the cache of whole steps, where there is one; dropped like the state.
        sample: what the last step left, the latents that the step under way begins with; None before the first.
        by_token: whether the scheduler is told of a noise level of each token, by which it steps then.
        images, latents: how many the latents are of, and the shape of one's; 0 and () until the first step closes.
        on_end: called once, when the request ends; for what is kept of it elsewhere.
        notes: what the report says of the request besides its decisions.
        drift: how far a replayed schedule has drifted; None where none was.
    """

    def __init__(self, sigmas: list[float], steps: int) -> None:
        self.sigmas = sigmas
        self.begin = 0
        self.step = 0
        self.state: dict[str, Any] = {}
        self.calls = 0
        self.step_seconds: list[float] = []
        self.blocks_run = 0
        self.blocks_total = 0
        self.decisions: dict[str, list[Decision]] = {}
        self.complete = False
        self.ended = False
        self.outputs: Any = None
        self.sample: torch.Tensor | None = None
        self.by_token = False
        self.images = 0
        self.latents: tuple[int, ...] = ()
        self.on_end: Callable[[], None] | None = None
        self.notes: list[str] = []
        self.drift: float | None = None
        self._scheduled = steps
        self._clock = time.perf_counter()

    @property
    def steps(self) -> int:
        """How many steps the request has."""
        return self._scheduled - self.begin

    @property
    def sigma(self) -> float:
        """The noise level of the step under way."""
        return self.sigmas[self.begin + self.step]

    def close_step(self) -> None:
        """Go on to the next step, or be complete after the last."""
        now = time.perf_counter()
        self.step_seconds.append(now - self._clock)
        self._clock = now
        self.step += 1
        self.calls = 0
        self.complete = self.step >= self.steps

    def end(self) -> None:
        """Free the state; what was decided stays readable."""
        self.ended = True
        self.outputs = self.sample = None
        self.state.clear()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()


class Lifecycle:
    """Follows one pipeline's requests through its scheduler.

    Attributes:
        request: the one under way.
        scheduler: the one followed.

    Args:
        pipe: the pipeline; the scheduler that it has at the time of each transformer call is the one followed.
        on_open: called with a fresh request.
        on_step: called with the request after each closed step.
        on_output: called with the request, the model output that the scheduler is about to step with, and the latents;
            gives what it steps with instead.
        on_complete: called with the request after its last step, before its state is freed and `on_step` is called.
    """

    def __init__(
        self,
        pipe: Any,
        on_open: Callable[[Request], None],
        on_step: Callable[[Request], None],
        on_output: Callable[[Request, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        on_complete: Callable[[Request], None] | None = None,
    ) -> None:
        self.request: Request | None = None
        self._pipe = pipe
        self._on_open = on_open
        self._on_step = on_step
        self._on_output = on_output
        self._on_complete = on_complete
        self.scheduler: Any = None
        self._attachment: object = None
        self._patch = Patch()
        self._warned = False

    def install(self, patch: Patch) -> None:
        """Wrap the scheduler, and the call with which diffusers pipelines end, of this pipeline alone."""
        free_hooks, progress_bar = self._pipe.maybe_free_model_hooks, self._pipe.progress_bar

        @functools.wraps(free_hooks)
        def wrapped_free_hooks(*args: Any, **kwargs: Any) -> Any:
            self.end()
            return free_hooks(*args, **kwargs)

        @functools.wraps(progress_bar)
        def wrapped_progress_bar(*args: Any, **kwargs: Any) -> Any:
            bar = progress_bar(*args, **kwargs)
            self._end_with(bar)
            return bar

        self._patch = patch
        patch.set_method(self._pipe, "maybe_free_model_hooks", wrapped_free_hooks)
        patch.set_method(self._pipe, "progress_bar", wrapped_progress_bar)
        self._attach(self._pipe.scheduler)

    def _end_with(self, bar: Any) -> None:
        """End the request under way when `bar` is closed: with the loop, by whatever exception it is left."""
        request, close = self.request, bar.close

        def end_and_close() -> None:
            if self.request is request:  # a bar may be closed late, by the garbage collector
                self.end()
            close()

        bar.close = end_and_close

    def end(self) -> None:
        """End the request under way, if any."""
        if self.request is not None:
            self.request.end()
            self.request = None

    def current(self) -> Request | None:
        """The request that a transformer call belongs to; None, said once, for a call outside any."""
        if self._pipe.scheduler is not self.scheduler:
            self._follow()
        request = self.request
        if request is None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "the transformer was called outside a pipeline's denoising loop: nothing is cached there",
                    stacklevel=5,
                )
            return None
        if request.step == 0 and request.calls == 0:
            request.begin = getattr(self.scheduler, "begin_index", None) or 0
        return request

    def _attach(self, scheduler: Any) -> None:
        set_timesteps, step = scheduler.set_timesteps, scheduler.step
        attachment = self._attachment = object()
        # Of the class: who else wraps the instance's method need not keep its signature.
        bind = inspect.signature(type(scheduler).step).bind

        # Pipelines inspect the signature of set_timesteps: functools.wraps keeps it.
        @functools.wraps(set_timesteps)
        def wrapped_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            if self._attachment is not attachment:
                return set_timesteps(*args, **kwargs)
            self.end()
            result = set_timesteps(*args, **kwargs)
            self._open()
            return result

        @functools.wraps(step)
        def wrapped_step(*args: Any, **kwargs: Any) -> Any:
            request = self.request if self._attachment is attachment else None
            try:
                if request is not None and self._on_output is not None:
                    given = bind(scheduler, *args, **kwargs)
                    output, sample = given.arguments["model_output"], given.arguments["sample"]
                    request.by_token = given.arguments.get("per_token_timesteps") is not None
                    given.arguments["model_output"] = self._on_output(request, output, sample)
                    args, kwargs = given.args[1:], given.kwargs
                result = step(*args, **kwargs)
            except BaseException:
                if request is not None:
                    self.end()
                raise
            if request is not None:
                if not request.step:
                    sample = args[2] if len(args) > 2 else kwargs.get("sample")
                    request.images, *latents = getattr(sample, "shape", None) or (0,)
                    request.latents = tuple(latents)
                if self._on_output is not None:
                    request.sample = result[0] if isinstance(result, tuple) else result.prev_sample
                self._close_step(request)
            return result

        self._patch.set_method(scheduler, "set_timesteps", wrapped_set_timesteps)
        self._patch.set_method(scheduler, "step", wrapped_step)
        self.scheduler = scheduler

    def _follow(self) -> None:
        """The pipeline was given another scheduler: leave the old one, and take up the new one where it stands."""
        with contextlib.suppress(PatchConflictError):  # wrapped by somebody else: what is left below only passes on
            self._patch.undo(self.scheduler)
        self.end()
        self._attach(self._pipe.scheduler)
        timesteps_set = getattr(self.scheduler, "num_inference_steps", None) is not None
        if timesteps_set and getattr(self.scheduler, "step_index", None) is None:
            self._open()

    def _open(self) -> None:
        scheduler = self.scheduler
        # One transfer to the host a request, before the loop starts.
        levels = getattr(scheduler, "sigmas", None)
        levels = scheduler.timesteps if levels is None else levels
        request = Request([float(x) for x in levels.tolist()], len(scheduler.timesteps))
        self._on_open(request)
        self.request = request

    def _close_step(self, request: Request) -> None:
        request.close_step()
        if request.complete:
            try:
                if self._on_complete is not None and not request.ended:
                    self._on_complete(request)
            finally:
                request.end()
                if self.request is request:
                    self.request = None
        self._on_step(request)
