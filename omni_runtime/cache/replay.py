"""Replay: a schedule that a gate has decided on in one request, followed in later ones of its kind.

To decide by a distance, the host must wait for the device at each step that is measured. Requests that differ in prompt
and seed alone decide much alike: the first of a kind decides as usual, and later ones take its decisions, without
waiting. They go on measuring; the distances stay on the device until the request has completed, and are read then, all
at once, and judged by the same gate, to tell whether it would still decide so.

The drift of a request is, over the replayed steps at which its gate would have decided otherwise, the largest distance
past the threshold as a share of the threshold, |held − threshold| / threshold; ∞ where the distance is no finite
number, and 0 where the gate would have decided all steps alike. Past the tolerance, the schedule is forgotten.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_runtime.cache.gates import Gate, Plan, Verdict, by_image
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.report import Decision

#: What a schedule is for: branch, number of steps, the first of them, noise levels, images, shape of what is watched.
Kind = tuple[Any, ...]
#: step → whether it is computed, of those steps for which distances decide.
Schedule = dict[int, bool]

KINDS = 64
#: The reason of a decision that was taken from an earlier request.
REPLAYED = "replayed"


@dataclass
class _Forward:
    """What a gate was asked and told of one forward.

    Attributes:
        step: None where no plan was asked for.
        kind: None where nothing was to be measured.
        sums, elements, images: as `Gate.judge` takes them, or as `Gate.keep` does while `sums` is a tensor, on the
            device; None where nothing was measured.
    """

    step: int | None = None
    kind: Kind | None = None
    sums: Any = None
    elements: int = 0
    images: int = 0
    replayed: bool = False
    computed: bool = True


class ReplayGate(Gate):
    """A gate whose decisions are taken from an earlier request where there is one, and kept for later ones.

    Limits and masks remain the gate's own. At a step that the schedule lacks, what was kept until then is read, and the
    step and those after it are decided as usual.

    Args:
        gate: the one that decides; fresh.
        kind: shape of what is watched → the kind of the forward under way.
        schedules: those recorded so far, by kind.
    """

    def __init__(self, gate: Gate, kind: Callable[[tuple[int, ...]], Kind], schedules: dict[Kind, Schedule]) -> None:
        self.threshold = gate.threshold
        self._gate = gate
        self._fresh = copy.deepcopy(gate)
        self._kind_of = kind
        self._schedules = schedules
        self._shape: tuple[int, ...] = ()
        self._kind: Kind | None = None
        self._schedule: Schedule = {}
        self._done: list[_Forward] = []
        self._now = _Forward()

    def enters(self, shape: tuple[int, ...]) -> None:
        """See `Gate.enters`."""
        if shape != self._shape:
            self._shape, self._kind = shape, None

    def plan(self, step: int) -> tuple[Plan, str]:
        """See `Gate.plan`."""
        self._now.step = step
        planned = self._gate.plan(step)
        if planned[0] is Plan.MEASURE:
            if self._kind is None:  # not before there is something to measure: the first step tells how many images
                self._kind = self._kind_of(self._shape)
                self._schedule = self._schedules.get(self._kind, {})
            self._now.kind = self._kind
            self.reads = step not in self._schedule
        return planned

    def judge(self, sums: Sequence[Sequence[float]], elements: int) -> Verdict:
        """See `Gate.judge`. The schedule lacks this step: it is not followed any further."""
        self._schedule = {}
        if kept := self.kept():
            self.read(iter(torch.cat(kept).tolist()))
            self._gate = self._judged_again()[0]
        self._now.sums, self._now.elements = sums, elements
        return self._gate.judge(sums, elements)

    def keep(self, sums: torch.Tensor, elements: int, images: int) -> Verdict:
        """See `Gate.keep`."""
        now = self._now
        assert now.step is not None  # it was planned for
        now.sums, now.elements, now.images, now.replayed = sums.detach(), elements, images, True
        return Verdict(self._schedule[now.step], REPLAYED)

    def settle(self, computed: bool) -> None:
        """See `Gate.settle`."""
        self._gate.settle(computed)
        self._now.computed = computed
        self._done.append(self._now)
        self._now = _Forward()

    def tensors(self) -> list[torch.Tensor]:
        """See `Gate.tensors`."""
        return self.kept()

    def kept(self) -> list[torch.Tensor]:
        """The sums that nobody has read yet, [B, 2] each, in order."""
        return [forward.sums for forward in self._done if isinstance(forward.sums, torch.Tensor)]

    def read(self, rows: Iterator[list[float]]) -> None:
        """Put the next rows of what was read, one for each sample, in the place of what was kept."""
        for forward in self._done:
            if isinstance(forward.sums, torch.Tensor):
                forward.sums = by_image([next(rows) for _ in range(len(forward.sums))], forward.images)
                forward.elements //= len(forward.sums)

    def measured(self) -> list[tuple[_Forward, Verdict]]:
        """Each forward that was measured, and what the gate says of it now that all is read."""
        return self._judged_again()[1]

    def _judged_again(self) -> tuple[Gate, list[tuple[_Forward, Verdict]]]:
        gate, measured = copy.deepcopy(self._fresh), []
        for forward in self._done:
            if forward.sums is not None:
                measured.append((forward, gate.judge(forward.sums, forward.elements)))
            gate.settle(forward.computed)
        return gate, measured


class Replays:
    """The schedules of a session: plain numbers, for the `KINDS` kinds recorded or replayed last.

    Args:
        tolerance: the drift up to which a schedule is kept.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._schedules: dict[Kind, Schedule] = {}

    def gate(self, gate: Gate, request: Request, branch: str) -> ReplayGate:
        """`gate`, for a branch of a request, with what was recorded for its like."""

        def kind(shape: tuple[int, ...]) -> Kind:
            return branch, request.steps, request.begin, tuple(request.sigmas), request.images, shape

        return ReplayGate(gate, kind, self._schedules)

    def complete(self, gates: Sequence[tuple[ReplayGate, Sequence[list[Decision]]]]) -> float | None:
        """Read what the gates of a completed request have kept, in one transfer, complete their decisions by it, and
        record, keep or forget their schedules.

        Args:
            gates: each with the lists of the decisions that were its.

        Returns:
            The request's drift; None where nothing was replayed.
        """
        kept = [sums for gate, _ in gates for sums in gate.kept()]
        rows = iter(torch.cat(kept).tolist() if kept else ())
        drifts = []
        for gate, lists in gates:
            gate.read(rows)
            measured = gate.measured()
            replayed = {f.step: verdict for f, verdict in measured if f.replayed}
            for decisions in lists:
                decisions[:] = [_completed(d, replayed[d.step]) if d.reason == REPLAYED else d for d in decisions]
            for kind in {forward.kind: None for forward, _ in measured if forward.kind is not None}:
                of_kind = [(forward, verdict) for forward, verdict in measured if forward.kind == kind]
                drifts += self._settle(kind, of_kind, gate.threshold)
        return max(drifts, default=None)

    def _settle(self, kind: Kind, measured: Sequence[tuple[_Forward, Verdict]], threshold: float) -> list[float]:
        """Record, keep or forget the schedule of a kind; gives the drift of each replayed step."""
        drifts = [
            0.0 if verdict.computed == forward.computed else _past(verdict, threshold)
            for forward, verdict in measured
            if forward.replayed
        ]
        schedule = self._schedules.pop(kind, {})
        if max(drifts, default=0.0) > self.tolerance:
            return drifts
        if len(drifts) < len(measured):
            schedule = {forward.step: forward.computed for forward, _ in measured if forward.step is not None}
        self._schedules[kind] = schedule
        if len(self._schedules) > KINDS:
            del self._schedules[next(iter(self._schedules))]
        return drifts

    def note(self, drift: float) -> str:
        """A completed request's drift, in words."""
        outcome = f"within the tolerance of {self.tolerance:g}"
        if drift > self.tolerance:
            outcome = f"past the tolerance of {self.tolerance:g}: what has drifted is decided afresh next time"
        return f"schedule of an earlier request replayed: drift {drift:.2g} of the threshold, {outcome}"


def _past(verdict: Verdict, threshold: float) -> float:
    held = verdict.distance if verdict.accumulated is None else verdict.accumulated
    return abs(held - threshold) / threshold if held is not None and math.isfinite(held) else math.inf


def _completed(decision: Decision, verdict: Verdict) -> Decision:
    """A replayed decision with what was measured, and what its gate would have said where it would not have agreed."""
    reason = decision.reason if verdict.computed == decision.computed else f"{REPLAYED}, though {verdict.reason}"
    return decision._replace(reason=reason, distance=verdict.distance, accumulated=verdict.accumulated)
