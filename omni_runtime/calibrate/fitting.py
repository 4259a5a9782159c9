"""Calibration: record full runs of a pipeline and fit a method's numbers to them.

`RECORDINGS` lists what is recorded for each method. The fits are in `omni_runtime.cache.polynomial` and
`omni_runtime.cache.magnitudes`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from omni_kernels import ops
from omni_kernels.patching import Patch
from omni_runtime.cache import calibration, magnitudes, polynomial
from omni_runtime.cache.forecasters import make_forecaster
from omni_runtime.cache.gates import Gate, Limits, ThresholdGate, Verdict, by_image, relative_l1, worst
from omni_runtime.cache.lifecycle import Branch, Request
from omni_runtime.cache.models import ModelRow
from omni_runtime.cache.passage import Parts, Passage
from omni_runtime.cache.session import BlockSession
from omni_runtime.cache.signals import ModulatedInput, Nothing
from omni_runtime.cache.stack import Stack
from omni_runtime.generation.omni import Omni
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import identified, jsonable

VERSIONS_OF = ("omni-kernels", "diffusers", "torch")


class Point(NamedTuple):
    """How far one image has moved in one transformer call since the step before.

    Attributes:
        input: distance of block 0's modulated input, as TeaCache's gate measures it.
        output: distance of the residual of all blocks.
    """

    branch: str
    step: int
    image: int
    input: float
    output: float


class Ratio(NamedTuple):
    """The factor by which the residual's magnitude has changed since the step before, for one sample of one branch."""

    branch: str
    step: int
    sample: int
    ratio: float


class RecordingGate(Gate):
    """Measures every step like TeaCache's gate, but computes all steps."""

    distances: list[float] | None = None

    def judge(self, sums: Sequence[Sequence[float]], elements: int) -> Verdict:
        """See `Gate.judge`."""
        self.distances = relative_l1(sums, elements)
        return Verdict(True, "recorded", worst(self.distances))


class RecordingPassage(Passage):
    """Computed forwards that add a point for each image or sample."""

    def __init__(self, points: list[Any], stack: Stack, request: Request, branch: Branch) -> None:
        super().__init__(stack, request, branch)
        self._points = points

    def leave(self, hidden: torch.Tensor, encoder: torch.Tensor | None, base: Any) -> None:
        """See `Passage.leave`."""
        before = self.hidden.newest()
        if before is not None:
            noise = slice(None) if self._noise is None else slice(*self._noise)
            points = self._measure(hidden[:, noise], base[0][:, noise], before[:, noise].to(hidden.dtype))
            self._points += [
                self._point(self._branch.name, self._branch.called, place, point) for place, point in enumerate(points)
            ]
        super().leave(hidden, encoder, base)

    def _measure(self, after: torch.Tensor, entered: torch.Tensor, then: torch.Tensor) -> Sequence[Any]:
        """Return one value per image or sample, from the states after and before the blocks and the last residual."""
        raise NotImplementedError

    def _point(self, name: str, step: int, place: int, measured: Any) -> Any:
        raise NotImplementedError


class DistancePassage(RecordingPassage):
    """For TeaCache: records how far the modulated input and the residual have moved."""

    def _measure(self, after: torch.Tensor, entered: torch.Tensor, then: torch.Tensor) -> Sequence[Any]:
        gate: Any = self.gate
        inputs, gate.distances = gate.distances, None
        now, sums = ops.residual_relative_l1(after, entered, then)
        pairs = by_image(sums.tolist(), self._images)
        return list(zip(inputs, relative_l1(pairs, now.numel() // len(pairs)), strict=True))

    def _point(self, name: str, step: int, place: int, measured: Any) -> Point:
        return Point(name, step, place, *measured)


class MagnitudePassage(RecordingPassage):
    """For MagCache: records the factor by which the residual's magnitude has changed, as the mean over the tokens."""

    def _measure(self, after: torch.Tensor, entered: torch.Tensor, then: torch.Tensor) -> Sequence[Any]:
        now = torch.linalg.vector_norm((after - entered).float(), dim=-1)
        ratios = now / (torch.linalg.vector_norm(then.float(), dim=-1) + 1e-8)
        return ratios.flatten(1).mean(1).tolist() if ratios.dim() > 1 else [ratios.mean().item()]

    def _point(self, name: str, step: int, place: int, measured: Any) -> Ratio:
        return Ratio(name, step, place, measured)


def _distance_parts(row: ModelRow, blocks: int) -> Parts:
    if row.modulation is None:
        raise ValueError("TeaCache watches block 0's modulated input: the transformer's ModelRow gives no modulation")
    return Parts(
        first=0,
        last=blocks,
        signal=ModulatedInput(row.modulation),
        gate=lambda request: RecordingGate(Limits()),
        forecaster=make_forecaster("reuse", 0),
    )


def _magnitude_parts(row: ModelRow, blocks: int) -> Parts:
    return Parts(
        first=0,
        last=blocks,
        signal=Nothing(),
        gate=lambda request: ThresholdGate(Limits(), 0.0),
        forecaster=make_forecaster("reuse", 0),
    )


def _fitted_polynomial(points: Sequence[Point]) -> polynomial.Fit:
    return polynomial.fit([point.input for point in points], [point.output for point in points])


def _fitted_ratios(points: Sequence[Ratio]) -> magnitudes.Ratios:
    return magnitudes.fit((point.step, point.ratio) for point in points)


@dataclass(frozen=True)
class Record:
    """How one method is recorded: the parts and the passage that record points, and the fit to the points."""

    parts: Callable[[ModelRow, int], Parts]
    passage: type[RecordingPassage]
    fit: Callable[[Any], calibration.Fit]


#: method → what is recorded for it
RECORDINGS = {
    "tea_cache": Record(_distance_parts, DistancePassage, _fitted_polynomial),
    "mag_cache": Record(_magnitude_parts, MagnitudePassage, _fitted_ratios),
}


class Recording(BlockSession):
    """Runs requests in full, with a gate that skips nothing, and records points.

    Attributes:
        points: the points of all requests so far.
    """

    alone = "where a rank may see its own tokens alone: calibrate on one rank"

    def __init__(self, pipe: Any, method: str) -> None:
        record = RECORDINGS[method]
        self.points: list[Any] = []
        super().__init__("calibration", pipe, record.parts, functools.partial(record.passage, self.points))


@contextlib.contextmanager
def recording(pipe: Any, method: str = "tea_cache") -> Iterator[Recording]:
    """Context manager: every request of `pipe` is recorded. Afterwards the pipeline is restored, also after an error.

    Raises:
        ValueError: the pipeline cannot be recorded.
        PatchConflictError: the pipeline is patched already.
    """
    session, patch = Recording(pipe, method), Patch()
    try:
        session.install(patch)
        yield session
    finally:
        patch.undo()
        session.close()


def calibrate(
    omni: Omni,
    requests: Sequence[GenerationRequest],
    listener: Callable[[int, GenerationRequest], Any] = lambda number, request: contextlib.nullcontext(),
    method: str = "tea_cache",
) -> tuple[calibration.Fit, dict[str, Any], list[Any]]:
    """Run the requests in full and fit a method's numbers to how they move from step to step.

    Args:
        omni: an `Omni` without a cache.
        requests: all with the same steps and size.
        listener: called with each request's number from 0 and the request. Returns a context manager, which is open
            while the request runs and whose value is the `on_step` callback or None.
        method: one of `RECORDINGS`.

    Returns:
        The fit, the document to write, and the points of the fit.

    Raises:
        ValueError: the `Omni` has a cache, there are no requests, or the pipeline cannot be recorded.
        PatchConflictError: the pipeline is patched already.
        UselessFitError: see `polynomial.fit` and `magnitudes.fit`.
    """
    if omni.cache_backend is not None or not requests:
        raise ValueError("calibration needs an Omni without a cache, and at least one request")
    with recording(omni.pipe, method) as session:
        for number, request in enumerate(requests):
            with listener(number, request) as on_step:
                result = omni.run(request, on_step)
        run = session.describe_last()
    picture = result.images[0] if result.frames is None else result.frames[0][0]
    size = getattr(picture, "size", None)
    if isinstance(size, tuple):
        run |= {"width": size[0], "height": size[1]}
    fitted = RECORDINGS[method].fit(session.points)
    return fitted, calibration.document(fitted, run, _provenance(omni, requests)), session.points


def found_document(
    method: str,
    omni: Omni,
    requests: Sequence[GenerationRequest],
    held_out: Sequence[GenerationRequest],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the document that a search on `requests` has found, with its provenance.

    Args:
        method: a key of `omni_runtime.cache.calibration.KINDS`.
        held_out: the requests that the result was measured on.
        found: from `omni_runtime.calibrate.schedule.find`, or `precision.find`.
    """
    provenance = _provenance(omni, requests)
    others = _provenance(omni, held_out)
    what = ("prompts", "seeds", "images", "references")
    return {
        "method": method,
        "version": calibration.VERSION,
        "model": provenance["model"],
        **found,
        "provenance": provenance | {"held_out": {key: others[key] for key in what if key in others}},
    }


def _provenance(omni: Omni, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    pipe = omni.pipe
    directory = Path(omni.name)
    return {
        "model": directory.name if directory.is_dir() else str(omni.name),
        "pipeline": type(pipe).__name__,
        "arguments": jsonable(requests[0].arguments),
        "prompts": list(dict.fromkeys(request.prompt for request in requests)),
        "seeds": sorted({request.seed for request in requests if request.seed is not None}),
        "images": len(requests),
        **_references(requests),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe._execution_device.type,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in VERSIONS_OF},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _references(requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """Return the edited pictures, each by mode, size and digest of its pixels; an empty dict if there are none."""
    pictures = [identified(request.arguments["image"]) for request in requests if "image" in request.arguments]
    distinct = [picture for place, picture in enumerate(pictures) if picture not in pictures[:place]]
    return {"references": distinct} if distinct else {}
