"""Replay: the decisions of one request are recorded as a schedule and reused in later requests of the same kind.

To decide by a distance, the host must wait for the device at each measured step. Requests that differ only in prompt
and seed get similar decisions. So the first request of a kind decides as usual, and later ones reuse its decisions
without waiting. They still measure. The distances stay on the device until the request has completed; then they are
all read at once, and the same gate judges them, to check whether it would still decide the same.

The drift of a request is computed over the replayed steps at which its gate would have decided differently: it is the
largest |held − threshold| / threshold, where `held` is the distance that the gate compares with its threshold. The
drift is ∞ if that distance is not finite, and 0 if the gate would have made all the same decisions. If the drift
exceeds the tolerance, the schedule is dropped.
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

#: What a schedule applies to: branch, number of steps, first step, noise levels, images, shape of what is watched.
Kind = tuple[Any, ...]
#: step → whether it is computed. Only steps that are decided by a distance are in it.
Schedule = dict[int, bool]

KINDS = 64
#: The reason in the report for a decision that was taken from an earlier request.
REPLAYED = "replayed"


@dataclass
class _Forward:
    """A gate's inputs and its verdict for one forward.

    Attributes:
        step: the step; None if `plan` was not called.
        kind: the kind; None if nothing was to be measured.
        sums, elements, images: the arguments of `Gate.judge`; or, while `sums` is a tensor on the device, those of
            `Gate.keep`. `sums` is None if nothing was measured.
        replayed: whether the decision was taken from an earlier request.
        computed: whether the step was computed.
    """

    step: int | None = None
    kind: Kind | None = None
    sums: Any = None
    elements: int = 0
    images: int = 0
    replayed: bool = False
    computed: bool = True


class ReplayGate(Gate):
    """A gate that reuses the decisions of an earlier request if there is one, and records its own for later ones.

    The wrapped gate still applies its limits and masks. If a step is missing from the schedule, the sums kept so far
    are read, and this step and the following ones are decided as usual.

    Args:
        gate: the gate that decides; fresh.
        kind: shape of what is watched → the kind of the current forward.
        schedules: the schedules recorded so far, by kind.
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
            if self._kind is None:  # only now: the number of images is known after the first step
                self._kind = self._kind_of(self._shape)
                self._schedule = self._schedules.get(self._kind, {})
            self._now.kind = self._kind
            self.reads = step not in self._schedule
        return planned

    def judge(self, sums: Sequence[Sequence[float]], elements: int) -> Verdict:
        """See `Gate.judge`. This step is not in the schedule, which is therefore not followed any further."""
        self._schedule = {}
        if kept := self.kept():
            self.read(iter(torch.cat(kept).tolist()))
            self._gate = self._judged_again()[0]
        self._now.sums, self._now.elements = sums, elements
        return self._gate.judge(sums, elements)

    def keep(self, sums: torch.Tensor, elements: int, images: int) -> Verdict:
        """See `Gate.keep`."""
        now = self._now
        assert now.step is not None  # `plan` was called before
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
        """The sums that are not read yet, [B, 2] each, in order."""
        return [forward.sums for forward in self._done if isinstance(forward.sums, torch.Tensor)]

    def read(self, rows: Iterator[list[float]]) -> None:
        """Replace each kept tensor by the next rows that were read from the device, one row per sample."""
        for forward in self._done:
            if isinstance(forward.sums, torch.Tensor):
                forward.sums = by_image([next(rows) for _ in range(len(forward.sums))], forward.images)
                forward.elements //= len(forward.sums)

    def measured(self) -> list[tuple[_Forward, Verdict]]:
        """Each measured forward with the gate's verdict on it; all sums must have been read."""
        return self._judged_again()[1]

    def _judged_again(self) -> tuple[Gate, list[tuple[_Forward, Verdict]]]:
        gate, measured = copy.deepcopy(self._fresh), []
        for forward in self._done:
            if forward.sums is not None:
                measured.append((forward, gate.judge(forward.sums, forward.elements)))
            gate.settle(forward.computed)
        return gate, measured


class Replays:
    """The schedules of a session, for the `KINDS` kinds that were recorded or replayed last. They hold no tensors.

    Args:
        tolerance: the largest drift at which a schedule is kept.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._schedules: dict[Kind, Schedule] = {}

    def gate(self, gate: Gate, request: Request, branch: str) -> ReplayGate:
        """Wrap `gate`, for a branch of a request, in a gate that replays the schedules recorded so far."""

        def kind(shape: tuple[int, ...]) -> Kind:
            return branch, request.steps, request.begin, tuple(request.sigmas), request.images, shape

        return ReplayGate(gate, kind, self._schedules)

    def complete(self, gates: Sequence[tuple[ReplayGate, Sequence[list[Decision]]]]) -> float | None:
        """Evaluate a completed request.

        Reads the sums that its gates have kept, in one transfer. Adds the measured distances to the decisions.
        Records, keeps or drops the schedules.

        Args:
            gates: each gate with the lists of decisions that it made.

        Returns:
            The request's drift; None if nothing was replayed.
        """
        kept = [sums for gate, _ in gates for sums in gate.kept()]
        rows = iter(torch.cat(kept).tolist() if kept else ())
        drifts = []
        for gate, lists in gates:
            gate.read(rows)
            measured = gate.measured()
            replayed = {f.step: verdict for f, verdict in measured if f.replayed}
            for decisions in lists:
                decisions[:] = [
                    _completed(d, replayed[d.step]) if d.reason == REPLAYED and d.step in replayed else d
                    for d in decisions
                ]
            for kind in {forward.kind: None for forward, _ in measured if forward.kind is not None}:
                of_kind = [(forward, verdict) for forward, verdict in measured if forward.kind == kind]
                drifts += self._settle(kind, of_kind, gate.threshold)
        return max(drifts, default=None)

    def _settle(self, kind: Kind, measured: Sequence[tuple[_Forward, Verdict]], threshold: float) -> list[float]:
        """Record, keep or drop the schedule of a kind. Returns the drift of each replayed step."""
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
        """A note on the drift of a completed request, for the report."""
        outcome = f"within the tolerance of {self.tolerance:g}"
        if drift > self.tolerance:
            outcome = f"past the tolerance of {self.tolerance:g}: what has drifted is decided afresh next time"
        return f"schedule of an earlier request replayed: drift {drift:.2g} of the threshold, {outcome}"


def _past(verdict: Verdict, threshold: float) -> float:
    held = verdict.distance if verdict.accumulated is None else verdict.accumulated
    return abs(held - threshold) / threshold if held is not None and math.isfinite(held) else math.inf


def _completed(decision: Decision, verdict: Verdict) -> Decision:
    """Add the measured distances to a replayed decision, and the gate's reason if it would have decided otherwise."""
    reason = decision.reason if verdict.computed == decision.computed else f"{REPLAYED}, though {verdict.reason}"
    return decision._replace(reason=reason, distance=verdict.distance, accumulated=verdict.accumulated)
