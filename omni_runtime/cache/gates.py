"""Gates: when is a step computed?

A gate lives for one CFG branch of one request. At each step it first `plan`s from what needs no device (limits, masks);
only when that leaves the question open are distances measured and `judge`d, or, by a gate that knows the outcome
already (`omni_runtime.cache.replay`), `keep`t. `settle` is told the outcome.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Plan(enum.Enum):
    """What a gate says before anything is measured."""

    COMPUTE = enum.auto()
    SKIP = enum.auto()
    MEASURE = enum.auto()


class Verdict(NamedTuple):
    """A settled question: compute or not, from what distance, and why."""

    computed: bool
    reason: str
    distance: float | None = None
    accumulated: float | None = None


@dataclass(frozen=True)
class Limits:
    """The limits common to all gates, in the order in which they are asked.

    Attributes:
        warmup: the first steps of a request, all computed ...
        warmup_interval: ... or every so many of them.
        mask: 1 for each step that must be computed; 0 leaves it to the gate, or skips at once if `static`.
        most_skips, longest_run: −1 for no limit.
    """

    warmup: int = 0
    warmup_interval: int = 1
    mask: tuple[int, ...] | None = None
    static: bool = False
    most_skips: int = -1
    longest_run: int = -1

    def warmup_steps(self) -> range:
        """The steps that warm up: with a mask, no longer than its first run of computed steps."""
        length = self.warmup
        if self.mask is not None:
            length = min(length, next((i for i, bit in enumerate(self.mask) if not bit), len(self.mask)))
        return range(0, length, self.warmup_interval)


class Gate:
    """The limits; a subclass judges the distances.

    A branch with nothing to reuse computes, whatever the gate would say: no plan is asked for then.

    Attributes:
        unlimited: what is planned for a step of which the limits say nothing.
        accumulated: what a gate that measures nothing holds against its threshold.
        threshold: of a gate that measures, what is held against it is `Verdict.accumulated`, or where None, `distance`.
        reads: whether the distances that were planned for are read and judged; else they are kept on the device.
    """

    unlimited: tuple[Plan, str] = (Plan.MEASURE, "")
    accumulated: float | None = None
    threshold: float = math.nan
    reads: bool = True

    def __init__(self, limits: Limits) -> None:
        self._warmup = limits.warmup_steps()
        self._mask = limits.mask or ()
        self._static = limits.static
        self._most_skips = limits.most_skips if limits.most_skips >= 0 else math.inf
        self._longest_run = limits.longest_run if limits.longest_run >= 0 else math.inf
        self._skips = 0
        self._run = 0

    def plan(self, step: int) -> tuple[Plan, str]:
        """What the limits say of this step, and which one says it."""
        if step in self._warmup:
            return Plan.COMPUTE, "warmup"
        if step < len(self._mask):
            if self._mask[step]:
                return Plan.COMPUTE, "mask"
            if self._static:
                return Plan.SKIP, "mask"
        if self._skips >= self._most_skips:
            return Plan.COMPUTE, "max cached steps"
        if self._run >= self._longest_run:
            return Plan.COMPUTE, "max continuous cached steps"
        return self.unlimited

    def judge(self, sums: Sequence[Sequence[float]], elements: int) -> Verdict:
        """Compute or skip, from each image's (Σ|x − y|, Σ|y|) over `elements` elements.

        The batch is decided by its worst image, so that no image is worse off than alone. A distance that is NaN
        never passes for small: the step is computed.
        """
        raise NotImplementedError(f"{type(self).__name__} measures no distance")

    def keep(self, sums: Any, elements: int, images: int) -> Verdict:
        """Compute or skip without reading the samples' `sums`, fp32 [B, 2] on the device, which are kept.

        Args:
            sums: as an op returns them.
            elements: of all samples together.
            images: how many there are, as `by_image` takes it.
        """
        raise NotImplementedError(f"{type(self).__name__} reads what is measured")

    def enters(self, shape: tuple[int, ...]) -> None:
        """What is watched has this shape from the forward under way on; told at the first, and at each change."""

    def tensors(self) -> list[Any]:
        """Every tensor that is kept."""
        return []

    def settle(self, computed: bool) -> None:
        """Take note of what was done."""
        if computed:
            self._run = 0
        else:
            self._run += 1
            self._skips += 1


class ScheduleGate(Gate):
    """Computes the steps whose place in `mask` is 1, and skips the others."""

    def __init__(self, mask: Sequence[int]) -> None:
        super().__init__(Limits())
        self._schedule = mask

    def plan(self, step: int) -> tuple[Plan, str]:
        """See `Gate.plan`."""
        return (Plan.COMPUTE if self._schedule[step] else Plan.SKIP), "schedule"


class RehearsalGate(Gate):
    """Computes every third step and skips the others: a short request then runs all that a long one may.

    Args:
        measures: whether distances are to be measured at each step.
    """

    def __init__(self, measures: bool) -> None:
        super().__init__(Limits())
        self._measures = measures
        self._computes = True

    def plan(self, step: int) -> tuple[Plan, str]:
        """See `Gate.plan`."""
        self._computes = step % 3 == 0
        if self._measures:
            return Plan.MEASURE, ""
        return (Plan.COMPUTE if self._computes else Plan.SKIP), "rehearsal"

    def judge(self, sums: Sequence[Sequence[float]], elements: int) -> Verdict:
        """See `Gate.judge`."""
        return Verdict(self._computes, "rehearsal")


def by_image(sums: list[list[float]], images: int) -> list[list[float]]:
    """The sums of each image, from those of each sample.

    Where guidance runs in one batch, several samples are one image's: sample i is image i mod `images`'s, as pipelines
    lay them, one branch behind the other. What of them is skipped is skipped together, and what counts is how far the
    image has moved. 0 is for a number that is not known: each sample is an image then.
    """
    if not images or len(sums) % images:
        return sums
    return [[sum(column) for column in zip(*sums[image::images], strict=True)] for image in range(images)]


def worst(distances: Sequence[float]) -> float:
    """The largest distance; NaN if any is."""
    largest = 0.0
    for distance in distances:
        if distance != distance:  # NaN, which max would pass over
            return distance
        largest = max(largest, distance)
    return largest


def relative_l1(sums: Sequence[Sequence[float]], elements: int) -> list[float]:
    """TeaCache's distance of each image, mean|x − y| / (mean|y| + 1e-8), from its (Σ|x − y|, Σ|y|)."""
    return [n / (d + 1e-8 * elements) for n, d in sums]


class ThresholdGate(Gate):
    """Skip while the distance to the last computed step, Σ|x − y| / Σ|y|, is below the threshold (DBCache).

    A threshold ≤ 0 never skips; one ≥ 1 always does, without measuring.
    """

    def __init__(self, limits: Limits, threshold: float) -> None:
        super().__init__(limits)
        self.threshold = threshold
        if threshold <= 0.0:
            self.unlimited = Plan.COMPUTE, "threshold ≤ 0"
        elif threshold >= 1.0:
            self.unlimited = Plan.SKIP, "threshold ≥ 1"

    def judge(self, sums: Sequence[Sequence[float]], elements: int) -> Verdict:
        """See `Gate.judge`."""
        largest = 0.0
        for n, d in sums:  # as `worst` does, without a list: every step comes here
            distance = n / d if d else math.inf
            if not distance <= largest:
                largest = distance
                if distance != distance:
                    break
        if largest < self.threshold:
            return Verdict(False, "below threshold", largest)
        return Verdict(True, "above threshold", largest)


class AccumulatedPolynomialGate(Gate):
    """Skip while the accumulated |poly(r)| stays below the threshold (TeaCache).

    r = mean|x − y| / (mean|y| + 1e-8) against the step before; each image has its own sum, and all start again from 0
    at a computed step. `coefficients` has the highest power first. Where the polynomial was fitted to distances within
    `fitted`, (smallest, largest), a finite r outside takes its value at the nearer end: beyond, it means nothing.
    """

    def __init__(
        self,
        limits: Limits,
        threshold: float,
        coefficients: Sequence[float],
        fitted: Sequence[float] = (-math.inf, math.inf),
    ) -> None:
        super().__init__(limits)
        self.threshold = threshold
        self.coefficients = tuple(coefficients)
        self._low, self._high = fitted
        self._sums: list[float] = []

    def judge(self, sums: Sequence[Sequence[float]], elements: int) -> Verdict:
        """See `Gate.judge`."""
        distances = relative_l1(sums, elements)
        if len(self._sums) != len(distances):
            self._sums = [0.0] * len(distances)
        self._sums = [s + abs(self._polynomial(r)) for s, r in zip(self._sums, distances, strict=True)]
        accumulated = worst(self._sums)
        small = accumulated < self.threshold
        reason = "accumulated below threshold" if small else "accumulated above threshold"
        return Verdict(not small, reason, worst(distances), accumulated)

    def _polynomial(self, r: float) -> float:
        if r < self._low:
            r = self._low
        elif self._high < r < math.inf:
            r = self._high
        value = 0.0
        for coefficient in self.coefficients:
            value = value * r + coefficient
        return value

    def settle(self, computed: bool) -> None:
        """See `Gate.settle`; a computed step clears the sums."""
        super().settle(computed)
        if computed:
            self._sums = []


class MagnitudeRatioGate(Gate):
    """Skip while the accumulated error of the residual's magnitude, Σ|1 − Πγ|, is at most the threshold (MagCache).

    Nothing is measured: γ_t, in `ratios`, is the factor by which the residual's magnitude changes from step t − 1 to
    t. Π and Σ run over the steps since the last computed one.
    """

    def __init__(self, limits: Limits, threshold: float, ratios: Sequence[float]) -> None:
        super().__init__(limits)
        self.threshold = threshold
        self.ratios = ratios
        self._ratio = 1.0
        self._error = 0.0

    def plan(self, step: int) -> tuple[Plan, str]:
        """See `Gate.plan`."""
        self.accumulated = None
        plan, reason = super().plan(step)
        if plan is not Plan.MEASURE:
            return plan, reason
        self._ratio *= self.ratios[step]
        self._error += abs(1.0 - self._ratio)
        self.accumulated = self._error
        if self._error <= self.threshold:
            return Plan.SKIP, "error within threshold"
        return Plan.COMPUTE, "error above threshold"

    def settle(self, computed: bool) -> None:
        """See `Gate.settle`; a computed step clears ratio and error."""
        super().settle(computed)
        if computed:
            self._ratio, self._error = 1.0, 0.0
