"""What a request did: which steps were computed and why, per CFG branch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Decision(NamedTuple):
    """One transformer forward.

    Attributes:
        step: index of the denoising step in its request, from 0.
        computed: whether the cached blocks ran.
        reason: what settled it ("warmup", "below threshold", ...). Of a replayed step, "replayed", and once the request
            has completed, what its gate would have said where it would not have agreed.
        distance: the measured relative L1 distance, of the batch's worst image; None where nothing was measured. Of a
            replayed step it is known once the request has completed.
        accumulated: for gates that accumulate, the sum that was held against the threshold.
    """

    step: int
    computed: bool
    reason: str
    distance: float | None = None
    accumulated: float | None = None


@dataclass(frozen=True)
class StepEvent:
    """A step has closed: its index, the request's step count, and what each branch decided.

    `computed` is True when any branch ran its blocks in full.
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
        """Indices of the steps whose blocks ran."""
        return [d.step for d in self.decisions if d.computed]

    @property
    def skipped(self) -> list[int]:
        """Indices of the steps that were forecast."""
        return [d.step for d in self.decisions if not d.computed]


@dataclass
class CacheReport:
    """What one request computed and what it skipped.

    Attributes:
        backend: the cache backend's name.
        steps: denoising steps of the request.
        branches: CFG branch name → its decisions. Names come from the pipeline's cache context ("cond", "uncond"), else
            they are the order of the transformer calls within a step ("0", "1").
        blocks_run, blocks_total: transformer blocks that ran, and that would have run without a cache.
        step_seconds: host time per closed step, in seconds (without waiting for the device).
        complete: False for a request that was interrupted or raised.
        notes: in words, where fitted numbers came from, and in what the request is unlike what they were fitted to; how
            far a replayed schedule has drifted.
        drift: over the replayed steps at which the gate would have decided otherwise, the largest distance past the
            threshold as a share of it; 0.0 where there are none, None where nothing was replayed.
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
    def forwards(self) -> int:
        """Transformer forwards really done: those whose cached blocks ran."""
        return sum(len(branch.computed) for branch in self.branches.values())

    @property
    def forwards_saved(self) -> int:
        """Transformer forwards that were forecast instead."""
        return sum(len(branch.skipped) for branch in self.branches.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, fit for JSON."""
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
