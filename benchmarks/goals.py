"""The goals that ops must reach on a GPU, from measured rows; `benchmarks.gpu` describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import of_qwen_image
from omni_kernels.validation.measurement import TARGET_SHARE, Row


@dataclass(frozen=True)
class Goal:
    """One goal: `value` must be at least `least`."""

    what: str
    case: str
    shape: str
    value: float
    least: float

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.value >= self.least

    def __str__(self) -> str:
        return f"{self.case} at {self.shape}, {self.what}: {self.value:.2f}, at least {self.least:g}"


OF_COPY, OF_SAME_COPY, OF_COMPILED = "share of copy bandwidth", "share of a copy of as many bytes", "against compiled"


def goals(rows: Sequence[Row], copies: Mapping[int, float]) -> list[Goal]:
    """All goals of our ops.

    Args:
        rows: all rows, including those that were not measured.
        copies: bytes → microseconds of a copy that moves as many, for all our rows at Qwen-Image's shapes.
    """
    compiled = {(r.case, r.shape): r.us for r in rows if r.provider == "torch.compile"}
    found = []
    for r in rows:
        if r.provider != "ours" or r.us is None:
            continue
        if r.has_target:
            found.append(Goal(OF_COPY, r.case, r.shape, r.share or 0.0, TARGET_SHARE))
        if of_qwen_image(r):
            found.append(Goal(OF_SAME_COPY, r.case, r.shape, copies[r.bytes] / r.us, TARGET_SHARE))
        theirs = compiled.get((r.case, r.shape))
        if theirs is not None:
            found.append(Goal(OF_COMPILED, r.case, r.shape, theirs / r.us, 1.0))
    return found


def summary(found: Sequence[Goal]) -> list[str]:
    """A line for each kind of goal, and one for each missed goal."""
    lines = []
    for what in (OF_COPY, OF_SAME_COPY, OF_COMPILED):
        of_kind = [goal for goal in found if goal.what == what]
        if not of_kind:
            lines.append(f"MISSED : {what}: no measurement with this goal")
            continue
        missed = [goal for goal in of_kind if not goal.met]
        lowest = min(goal.value for goal in of_kind)
        verdict = f"MISSED by {len(missed)} of" if missed else "reached by all"
        lines.append(f"{verdict} {len(of_kind)}: {what} of at least {of_kind[0].least:g}, the lowest {lowest:.2f}")
        lines += [f"  {goal}" for goal in missed]
    return lines


def met(found: Sequence[Goal]) -> bool:
    """Whether there are goals of every kind, and all are reached."""
    return {goal.what for goal in found} == {OF_COPY, OF_SAME_COPY, OF_COMPILED} and all(goal.met for goal in found)
