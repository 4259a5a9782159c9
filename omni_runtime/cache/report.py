"""The report of a request: which steps were computed and why, for each CFG branch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Decision(NamedTuple):
    """One transformer forward.

    Attributes:
        step: index of the denoising step in its request, from 0.
        computed: whether the cached blocks ran.
        reason: why ("warmup", "below threshold", ...). For a replayed step it is "replayed"; once the request has
            completed, the gate's own reason is added if the gate would have decided otherwise.
        distance: the measured relative L1 distance of the image for which it is largest; None if nothing was measured.
            For a replayed step it is known once the request has completed.
        accumulated: for gates that accumulate, the sum that was compared with the threshold.
    """

    step: int
    computed: bool
    reason: str
    distance: float | None = None
    accumulated: float | None = None


@dataclass(frozen=True)
class StepEvent:
    """A step that has closed: its index, the request's number of steps, and the decision of each branch.

    `computed` is True if any branch ran its blocks in full.
    """

    step: int
    steps: int
    computed: bool
    branches: dict[str, Decision]


@dataclass
class BranchReport:
    """The decisions of one CFG branch, in order."""

    decisions: list[Decision] = field(default_factory=list)

    @property
    def computed(self) -> list[int]:
        """Indices of the computed steps."""
        return [d.step for d in self.decisions if d.computed]

    @property
    def skipped(self) -> list[int]:
        """Indices of the skipped steps."""
        return [d.step for d in self.decisions if not d.computed]


@dataclass
class CacheReport:
    """What one request computed and skipped.

    Attributes:
        backend: the cache backend's name.
        steps: the number of denoising steps of the request.
        branches: CFG branch name → its decisions. Names come from the pipeline's cache context ("cond", "uncond"), or
            else are the position of the transformer call within a step ("0", "1").
        blocks_run, blocks_total: transformer blocks that ran, and that would have run without a cache.
        step_seconds: host time per closed step, in seconds (without waiting for the device).
        complete: False if the request was interrupted or raised an error.
        notes: where fitted numbers came from, how the request differs from what they were fitted to, how far a
            replayed schedule has drifted, and other notes, in words.
        drift: the largest distance from the threshold, as a share of it, over the replayed steps at which the gate
            would have decided otherwise; 0.0 if there are none, None if nothing was replayed.
    """

    backend: str
    steps: int
    branches: dict[str, BranchReport]
    blocks_run: int
    blocks_total: int
    step_seconds: list[float]
    complete: bool
    notes: list[str] = field(default_factory=list)
    drift: float | None = None

    @property
    def skipped(self) -> list[int]:
        """Indices of the steps that every CFG branch skipped, of those that were called in the step."""
        computed = {step for branch in self.branches.values() for step in branch.computed}
        return sorted({step for branch in self.branches.values() for step in branch.skipped} - computed)

    @property
    def forwards(self) -> int:
        """The number of transformer forwards that were computed."""
        return sum(len(branch.computed) for branch in self.branches.values())

    @property
    def forwards_saved(self) -> int:
        """The number of transformer forwards that were forecast instead."""
        return sum(len(branch.skipped) for branch in self.branches.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts and numbers, for JSON."""
        return {
            "backend": self.backend,
            "steps": self.steps,
            "complete": self.complete,
            "forwards": self.forwards,
            "forwards_saved": self.forwards_saved,
            "blocks_run": self.blocks_run,
            "blocks_total": self.blocks_total,
            "step_seconds": list(self.step_seconds),
            "notes": list(self.notes),
            "drift": self.drift,
            "branches": {
                name: {
                    "computed": branch.computed,
                    "skipped": branch.skipped,
                    "decisions": [decision._asdict() for decision in branch.decisions],
                }
                for name, branch in self.branches.items()
            },
        }
