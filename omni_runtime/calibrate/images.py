"""The images of a search for schedules: recorded in full runs, then made again with schedules."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni_kernels.device import synchronize
from omni_kernels.patching import Patch
from omni_runtime.cache.forecasters import Forecaster, make_forecaster
from omni_runtime.cache.gates import ScheduleGate
from omni_runtime.cache.history import inner_products
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods import VELOCITY_CACHE
from omni_runtime.cache.output import OutputSession, OutputSite
from omni_runtime.cache.schedulers import steps_along
from omni_runtime.cache.session import CacheSession
from omni_runtime.calibrate.journal import KeptResponses
from omni_runtime.calibrate.search import IDENTICAL, ROUNDS, Responses, Tried, hopeless
from omni_runtime.compare import quality
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import NotANumberError

#: Arguments that have one value per image of a batch; all others are shared.
_EACH = ("prompt", "negative_prompt")
#: The argument for several images from one prompt and one start image, of which the pipeline takes only one.
_COPIES = "num_images_per_prompt"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the model output is forecast, as the keys of `velocity_cache`."""

    forecaster: str = "newton"
    forecaster_order: int = 1
    reach: float = 1.0
    corrector_order: int = 2

    def made(self) -> Forecaster:
        """The forecaster."""
        return make_forecaster(self.forecaster, self.forecaster_order)


#: The default settings of `velocity_cache`.
SETTINGS = Settings()


class Recording(OutputSession):
    """Runs requests in full and keeps the model outputs of the last one.

    Attributes:
        outputs: the model output of each step.
        sigmas: the noise levels of a request's steps, and of its end.
    """

    def __init__(self, pipe: Any) -> None:
        everything = OutputSite(lambda request, _: ScheduleGate([1] * request.steps), make_forecaster("reuse"), 1.0)
        super().__init__("calibration", pipe, everything)
        self.outputs: list[torch.Tensor] = []
        self.sigmas: list[float] = []

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `CacheSession.stepped_with`."""
        if request.step == 0:
            self.outputs = []
            levels = request.sigmas[request.begin :]
            self.sigmas = levels if len(levels) > request.steps else [*levels, 0.0]
        self.outputs.append(output)
        return output


class Replaying(OutputSession):
    """Repeats a recorded request with one step skipped.

    Earlier steps use the recorded outputs. Later steps are computed, so they show the effect of the skipped step.

    Attributes:
        error: the squared norm of the forecast's error, for each image.

    Args:
        outputs: the outputs of the full run's steps.
        skipped: the step to skip; neither the first nor the last.
    """

    def __init__(self, pipe: Any, outputs: Sequence[torch.Tensor], skipped: int, settings: Settings) -> None:
        forecaster = settings.made()
        self._first = max(1, skipped - forecaster.snapshots)  # the first one that is computed again

        def gate(request: Request, _: str) -> ScheduleGate:
            return ScheduleGate([int(step == 0 or self._first <= step != skipped) for step in range(request.steps)])

        super().__init__("calibration", pipe, OutputSite(gate, forecaster, settings.reach))
        self._recorded, self._skipped = outputs, skipped
        self.error = np.zeros(0)

    def stepped_with(self, request: Request, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """See `CacheSession.stepped_with`."""
        made = super().stepped_with(request, output, sample)
        if request.step == self._skipped:
            self.error = _flat(made - self._recorded[request.step]).double().square().sum(1).numpy()
        return self._recorded[request.step] if request.step < self._first else made


class Images:
    """Some requests of one model: run in full once, then with any schedule.

    Attributes:
        forwards: transformer calls of all runs with a schedule so far; a call of a batch counts once.
        spent: for each schedule so far, the seconds that one computed step of all images took.
        responding: seconds that the responses took.
    """

    def __init__(self, pipe: Any, requests: Sequence[GenerationRequest], settings: Settings, batch: int) -> None:
        self.pipe = pipe
        self.requests = requests
        self._settings = settings
        self._batch = batch
        self._batches: list[list[GenerationRequest]] = []
        self._references: list[torch.Tensor] = []
        self.forwards = 0
        self.spent: list[float] = []
        self.responding = 0.0

    def record(self) -> Recording:
        """Run all requests in full, in batches as large as fit into memory."""
        session, patch = Recording(self.pipe), Patch()
        try:
            session.install(patch)
            while True:
                self._batches, self._references = _batches(self.pipe, self.requests, self._batch), []
                try:
                    for batch in self._batches:
                        self._references.append(self._images(batch))
                    break
                except torch.OutOfMemoryError:
                    if self._batch == 1:
                        raise
                    self._batch //= 2
        finally:
            patch.undo()
            session.close()
        return session

    def responses(
        self,
        sigmas: Sequence[float],
        kept: KeptResponses | None = None,
        on_step: Callable[[int, int], Any] = lambda i, n: None,
    ) -> Responses:
        """Measure how the final latents of all images respond to each step's forecast error. Call `record` first.

        Args:
            sigmas: noise levels of the steps, and of the end.
            kept: the responses of batches that were measured before; new ones are added. None keeps nothing.
            on_step: called after each run with the number of runs so far and their total number.
        """
        steps = range(1, len(sigmas) - 2)
        known = KeptResponses(None) if kept is None else kept
        names: list[str] = []

        def run(first: int, batch: Sequence[GenerationRequest], reference: torch.Tensor) -> None:
            name = f"{first}-{first + len(batch)}"
            if not known.fitting(name, len(batch), len(steps)):
                start = time.perf_counter()
                recording = Recording(self.pipe)
                full = self._latents(batch, recording)
                changed: list[torch.Tensor] = []
                error: list[np.ndarray] = []
                for step in steps:
                    replaying = Replaying(self.pipe, recording.outputs, step, self._settings)
                    changed.append(self._latents(batch, replaying) - full)
                    error.append(replaying.error)
                    on_step(len(names) * len(steps) + step, len(self._batches) * len(steps))
                known.keep(name, inner_products(changed), np.stack(error, 1), time.perf_counter() - start)
            names.append(name)

        self._each(run)
        self.responding = float(sum(known[f"seconds {name}"] for name in names))
        return Responses(
            np.concatenate([known[f"changes {name}"] for name in names]),
            np.concatenate([known[f"errors {name}"] for name in names]),
            sigmas,
            self._settings.made(),
            self._settings.reach,
            self._settings.corrector_order if steps_along(self.pipe.scheduler) else 0,
        )

    def _latents(self, batch: Sequence[GenerationRequest], session: CacheSession) -> torch.Tensor:
        """Return the final latents of one call with a session installed: [B, elements] in float32 on the CPU."""
        patch = Patch()
        try:
            session.install(patch)
            return _flat(self._call(batch, output_type="latent"))
        finally:
            patch.undo()
            session.close()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the recorded images in pixels."""
        height, width = self._references[0].shape[-2:]
        return height, width

    def sample(self, computed: Sequence[int], best: Tried | None = None) -> Tried:
        """Run all requests with a schedule and measure each image's PSNR against its full run.

        If `best` is given, a schedule that is `hopeless` compared with it is given up.
        """
        psnr: list[float] = []
        start = time.perf_counter()
        with self._scheduled(computed) as session:

            def run(first: int, batch: Sequence[GenerationRequest], reference: torch.Tensor) -> None:
                if best is not None and hopeless(psnr, best):
                    return
                psnr.extend(self._psnr(batch, reference))
                self.forwards += session.report.forwards if session.report else 0

            self._each(run)
        self.spent.append((time.perf_counter() - start) / len(computed))
        return Tried(tuple(computed), tuple(psnr))

    def plain(self, steps: int) -> Tried:
        """Run all requests with fewer steps and no cache, and measure the PSNR against the full runs."""
        psnr: list[float] = []
        self._each(lambda _, batch, reference: psnr.extend(self._psnr(batch, reference, num_inference_steps=steps)))
        return Tried(tuple(range(steps)), tuple(psnr))

    def speedups(self, schedules: Sequence[Sequence[int]]) -> list[float]:
        """Return each schedule's speedup over the full run, for the first request.

        Full run and schedules take turns for `ROUNDS` rounds; the speedup is the ratio of the median times.
        """
        request = self.requests[:1]
        took: list[list[float]] = [[] for _ in range(1 + len(schedules))]
        self._call(request)  # warm-up: compiles everything for a single image
        for _ in range(ROUNDS):
            for times, computed in zip(took, [None, *schedules], strict=True):
                with contextlib.nullcontext() if computed is None else self._scheduled(computed):
                    synchronize(self.pipe._execution_device)
                    start = time.perf_counter()
                    self._call(request)
                    synchronize(self.pipe._execution_device)
                    times.append(time.perf_counter() - start)
        full, *others = (float(np.median(times)) for times in took)
        return [full / one for one in others]

    @contextlib.contextmanager
    def _scheduled(self, computed: Sequence[int]) -> Iterator[CacheSession]:
        """Context manager: the pipeline runs with a schedule."""
        config = VELOCITY_CACHE.check({"schedule": list(computed), **dataclasses.asdict(self._settings)})
        patch = Patch()
        session = VELOCITY_CACHE.install(self.pipe, config, patch)
        try:
            yield session
        finally:
            patch.undo()
            session.close()

    def _each(self, run: Callable[[int, Sequence[GenerationRequest], torch.Tensor], Any]) -> None:
        """Call `run` for each batch with its first image's place, its requests and its references.

        A batch that does not fit into memory is halved permanently.
        """
        place = first = 0
        while place < len(self._batches):
            batch, reference = self._batches[place], self._references[place]
            try:
                run(first, batch, reference)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                half = len(batch) // 2
                self._batches[place : place + 1] = [batch[:half], batch[half:]]
                self._references[place : place + 1] = [reference[:half], reference[half:]]
                continue
            first += len(batch)
            place += 1

    def _psnr(self, batch: Sequence[GenerationRequest], reference: torch.Tensor, **changed: Any) -> list[float]:
        found = quality.psnr(self._images(batch, **changed), reference).flatten(1).mean(1)
        return [min(float(one), IDENTICAL) for one in found]

    def _images(self, batch: Sequence[GenerationRequest], **changed: Any) -> torch.Tensor:
        """Return the 8-bit images [B, F, 3, H, W] of one call, rounded as pipelines do. F is 1 for still images."""
        made = self._call(batch, **changed).float().mul(255).round().to(torch.uint8)
        return made if made.dim() == 5 else made[:, None]

    def _call(self, batch: Sequence[GenerationRequest], **changed: Any) -> torch.Tensor:
        calls = [request.call() for request in batch]
        arguments = calls[0] | {"output_type": "pt", "return_dict": False} | changed
        if len(calls) > 1 and "image" in arguments:
            arguments[_COPIES] = len(calls)
        elif len(calls) > 1:
            for name in _EACH:
                if name in arguments:
                    arguments[name] = [call[name] for call in calls]
        if len(calls) > 1:
            arguments["generator"] = [call["generator"] for call in calls]
        with torch.no_grad():
            (made,) = self.pipe(**arguments)
        if not made.isfinite().all():
            raise NotANumberError("the pipeline's output is not finite (NaN or infinite): there is nothing to measure")
        return made


def _flat(batch: torch.Tensor) -> torch.Tensor:
    """Flatten a batch to [B, elements] in float32 on the CPU."""
    return batch.detach().flatten(1).float().cpu()


def _batches(pipe: Any, requests: Sequence[GenerationRequest], size: int) -> list[list[GenerationRequest]]:
    """Group requests that differ only in prompt and seed; those that start from a picture, only in the seed."""
    copies = _COPIES in inspect.signature(type(pipe).__call__).parameters
    batches: list[list[GenerationRequest]] = []
    for request in requests:
        last = batches[-1] if batches else None
        alone = request.prompt is None or request.seed is None or ("image" in request.arguments and not copies)
        if last is None or alone or len(last) >= size or _shared(request) != _shared(last[0]):
            batches.append([request])
        else:
            last.append(request)
    return batches


def _shared(request: GenerationRequest) -> dict[str, Any]:
    if "image" in request.arguments:
        return request.arguments | {"prompt": request.prompt, "image": _pixels(request.arguments["image"])}
    return {name: value for name, value in request.arguments.items() if name not in _EACH}


def _pixels(picture: Any) -> Any:
    """Return a value by which equal pictures are recognised."""
    if isinstance(picture, list | tuple):
        return [_pixels(one) for one in picture]
    return (picture.size, picture.tobytes()) if isinstance(picture, Image.Image) else id(picture)
