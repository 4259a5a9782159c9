"""The images of a search for schedules: recorded in full runs, then made again with schedules."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni_kernels.device import synchronize
from omni_kernels.patching import Patch
from omni_runtime.cache.calibration import SLACK
from omni_runtime.cache.forecasters import make_forecaster
from omni_runtime.cache.gates import ScheduleGate
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods import VELOCITY_CACHE
from omni_runtime.cache.output import Chosen, OutputSession, OutputSite
from omni_runtime.cache.session import CacheSession
from omni_runtime.calibrate.search import IDENTICAL, Forecast, Tried, hopeless
from omni_runtime.compare import quality
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import NotANumberError

#: Arguments that have one value per image of a batch; all others are shared.
_EACH = ("prompt", "negative_prompt")
#: The argument for several images from one prompt and one start image, of which the pipeline takes only one.
_COPIES = "num_images_per_prompt"


#: How often a single image is made in full and with each schedule, to measure the speedup.
ROUNDS = 5
#: Measured speedups that differ by more than this factor from round to round say nothing.
UNSTEADY = 1.25


class FullRun(OutputSession):
    """Runs requests in full and keeps the model outputs of the last one.

    Attributes:
        outputs: the model output of each step.
        sigmas: the noise levels of a request's steps, and of its end.
    """

    def __init__(self, pipe: Any) -> None:
        everything = OutputSite(lambda request: Chosen(ScheduleGate([1] * request.steps)), make_forecaster("reuse"))
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


class Images:
    """Some requests of one model: run in full once, then with any schedule.

    Attributes:
        forwards: transformer calls of all runs with a schedule so far; a call of a batch counts once.
        spent: for each schedule so far, the seconds that one computed step of all images took.

    Args:
        pipe: the pipeline, not patched.
        requests: all with the same steps and size.
        batch: the largest number of images in one call.
        recording: makes the session of the full runs.
    """

    def __init__(
        self,
        pipe: Any,
        requests: Sequence[GenerationRequest],
        batch: int,
        recording: Callable[[Any], FullRun] = FullRun,
    ) -> None:
        self.pipe = pipe
        self.requests = requests
        self._batch = batch
        self._recording = recording
        self._batches: list[list[GenerationRequest]] = []
        self._references: list[torch.Tensor] = []
        self.forwards = 0
        self.spent: list[float] = []

    def record(self) -> FullRun:
        """Run all requests in full, in batches as large as fit into memory."""
        session, patch = self._recording(self.pipe), Patch()
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

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the recorded images in pixels."""
        height, width = self._references[0].shape[-2:]
        return height, width

    def sample(self, computed: Sequence[int], forecast: Forecast, best: Tried | None = None) -> Tried:
        """Run all requests with a schedule and measure each image's PSNR against its full run.

        If `best` is given, a schedule that is `hopeless` compared with it is given up.
        """
        psnr: list[float] = []
        start = time.perf_counter()
        with self._scheduled(computed, forecast) as session:

            def run(first: int, batch: Sequence[GenerationRequest], reference: torch.Tensor) -> None:
                if best is not None and hopeless(psnr, best):
                    return
                psnr.extend(self._psnr(batch, reference))
                self.forwards += session.report.forwards if session.report else 0

            self._each(run)
        self.spent.append((time.perf_counter() - start) / len(computed))
        return Tried(tuple(computed), tuple(psnr), forecast)

    def plain(self, steps: int) -> Tried:
        """Run all requests with fewer steps and no cache, and measure the PSNR against the full runs."""
        return Tried(tuple(range(steps)), tuple(self.measured(num_inference_steps=steps)))

    def measured(self, **changed: Any) -> list[float]:
        """Run all requests with the pipeline as it is, and measure each image's PSNR in dB against its full run.

        Args:
            changed: arguments of the call that replace those of the requests.
        """
        psnr: list[float] = []
        self._each(lambda _, batch, reference: psnr.extend(self._psnr(batch, reference, **changed)))
        return psnr

    def speedups(self, schedules: Sequence[tuple[Sequence[int], Forecast]]) -> list[float | None]:
        """Return each schedule's speedup over the full run, for the first request; None where the times do not agree.

        Each run with a schedule is paired with a full run next to it. The speedup is the median of the `ROUNDS` pairs'
        ratios. See `agreed`.
        """
        request = self.requests[:1]
        self._call(request)  # warm-up: compiles everything for a single image

        def seconds(scheduled: contextlib.AbstractContextManager[Any]) -> float:
            with scheduled:
                synchronize(self.pipe._execution_device)
                start = time.perf_counter()
                self._call(request)
                synchronize(self.pipe._execution_device)
                return time.perf_counter() - start

        ratios: list[list[float]] = [[] for _ in schedules]
        for _ in range(ROUNDS):
            for found, schedule in zip(ratios, schedules, strict=True):
                full = seconds(contextlib.nullcontext())
                found.append(full / seconds(self._scheduled(*schedule)))
        steps = int(request[0].arguments["num_inference_steps"])
        return [agreed(found, steps / len(computed)) for found, (computed, _) in zip(ratios, schedules, strict=True)]

    @contextlib.contextmanager
    def _scheduled(self, computed: Sequence[int], forecast: Forecast) -> Iterator[CacheSession]:
        """Context manager: the pipeline runs with a schedule."""
        config = VELOCITY_CACHE.check({"schedule": list(computed), **forecast._asdict()})
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


def agreed(ratios: Sequence[float], most: float) -> float | None:
    """Return the median of measured speedups; None if they cannot be right.

    They cannot if the middle half of them differs by more than the factor `UNSTEADY`, or if the median is below 1 or
    above `most`, the share of steps that are computed, by more than the noise of a measurement.
    """
    low, median, high = (float(one) for one in np.percentile(ratios, (25, 50, 75)))
    steady = high <= UNSTEADY * low
    return median if steady and 1 / SLACK <= median <= SLACK * most else None


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
