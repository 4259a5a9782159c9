"""Gates decide when a step is computed.

A gate belongs to one CFG branch of one request. At each step, `plan` is called first: it decides from what needs no
device (limits, masks), if it can. Otherwise the distances are measured and passed to `judge`. If the gate knows the
outcome already (`omni_runtime.cache.replay`), they are passed to `keep` instead, without being read from the device.
Finally `settle` is called with the outcome.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Plan(enum.Enum):
    """A gate's answer before anything is measured."""

    COMPUTE = enum.auto()
    SKIP = enum.auto()
    MEASURE = enum.auto()
    #: Compute, and first drop everything that was recorded.
    ANEW = enum.auto()


class Verdict(NamedTuple):
    """A gate's decision on one call: compute or skip, the reason, and the distance it is based on."""

    computed: bool
    reason: str
    distance: float | None = None
    accumulated: float | None = None


@dataclass(frozen=True)
class Limits:
    """The limits common to all gates, in the order in which they are applied.

    Attributes:
        warmup: the number of warmup steps at the start of a request.
        warmup_interval: the warmup computes every `warmup_interval`-th of these steps.
        mask: 1 for each step that must be computed; 0 leaves the step to the gate, or skips it if `static`.
        static: whether the mask alone decides after the warmup, for the steps that it covers.
        most_skips: the most skipped steps in a request; −1 for no limit.
        longest_run: the most skipped steps in a row; −1 for no limit.
    """

    warmup: int = 0
    warmup_interval: int = 1
    mask: tuple[int, ...] | None = None
    static: bool = False
    most_skips: int = -1
    longest_run: int = -1

    def warmup_steps(self) -> range:
        """The computed steps of the warmup. With a mask, it ends at the latest with the mask's first run of 1s."""
        length = self.warmup
        if self.mask is not None:
            length = min(length, next((i for i, bit in enumerate(self.mask) if not bit), len(self.mask)))
        return range(0, length, self.warmup_interval)


class Gate:
    """Applies the limits; subclasses judge the distances.

    If a branch has nothing to reuse, the step is computed without calling `plan`.

    Attributes:
        unlimited: the plan for a step to which no limit applies.
        accumulated: what a gate that measures nothing compares with its threshold.
        threshold: the threshold. A gate that measures compares `Verdict.accumulated` with it, or `distance` if that is
            None.
        reads: whether the planned distances are read and judged; otherwise they are kept on the device.
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
        """The plan for this step, and the limit that it follows from."""
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

        The image with the largest distance decides for the batch, so that no image is worse than if it were sampled
        alone. If a distance is NaN, the step is computed.
        """
        raise NotImplementedError(f"{type(self).__name__} measures no distance")

    def keep(self, sums: Any, elements: int, images: int) -> Verdict:
        """Compute or skip without reading `sums`, which are kept on the device.

        Args:
            sums: the sums of each sample as an op returns them, fp32 [B, 2].
            elements: the number of elements of all samples together.
            images: the number of images, as for `by_image`.
        """
        raise NotImplementedError(f"{type(self).__name__} reads what is measured")

    def enters(self, shape: tuple[int, ...]) -> None:
        """Called with the shape of what is watched, in the first forward and in each one where it has changed."""

    def tensors(self) -> list[Any]:
        """All tensors kept."""
        return []

    def settle(self, computed: bool) -> None:
        """Record whether the step was computed."""
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


class EveryStep(Gate):
    """Computes every step."""

    def __init__(self) -> None:
        super().__init__(Limits())

    def plan(self, step: int) -> tuple[Plan, str]:
        """See `Gate.plan`."""
        return Plan.COMPUTE, "every step"


class RehearsalGate(Gate):
    """Computes every third step and skips the others, so that a short request runs all code that a long one may run.

    Args:
        measures: whether distances are measured at each step.
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
    """The sums of each image, from the sums of each sample.

    If guidance runs in one batch, several samples belong to the same image. Pipelines put one branch after the other,
    so sample i belongs to image i mod `images`. These samples are skipped together, so their sums are added.

    Args:
        sums: one row for each sample.
        images: the number of images; 0 if unknown, which treats each sample as an image.
    """
    if not images or len(sums) % images:
        return sums
    return [[sum(column) for column in zip(*sums[image::images], strict=True)] for image in range(images)]


def worst(distances: Sequence[float]) -> float:
    """The largest distance; NaN if any is."""
    largest = 0.0
    for distance in distances:
        if distance != distance:  # NaN, which max would ignore
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
        for n, d in sums:  # as `worst`, but without building a list: this runs at every step
            distance = n / d if d else math.inf
            if not distance <= largest:
                largest = distance
                if distance != distance:
                    break
        if largest < self.threshold:
            return Verdict(False, "below threshold", largest)
        return Verdict(True, "above threshold", largest)


class RefreshedGate(ThresholdGate):
    """A `ThresholdGate` that begins anew within a request.

    Step `after`, counted from 0, is treated as a request's first: what was recorded is dropped, and the limits and the
    mask begin again. With `repeat`, this happens after every `after` steps.
    """

    def __init__(self, limits: Limits, threshold: float, after: int, repeat: bool) -> None:
        super().__init__(limits, threshold)
        self._after = after
        self._repeat = repeat
        self._begin = 0

    def plan(self, step: int) -> tuple[Plan, str]:
        """See `Gate.plan`."""
        begin = step - step % self._after if self._repeat else self._after if step >= self._after else 0
        if begin != self._begin:
            self._begin = begin
            self._run = self._skips = 0
            if begin == step:
                return Plan.ANEW, "forced refresh"
        return super().plan(step - begin)


class AccumulatedPolynomialGate(Gate):
    """Skip while the accumulated |poly(r)| stays below the threshold (TeaCache).

    r = mean|x − y| / (mean|y| + 1e-8), relative to the step before. Each image has its own sum, and all sums are reset
    to 0 at a computed step. `coefficients` has the highest power first. `fitted`, (smallest, largest), is the range of
    distances that the polynomial was fitted to. A finite r outside this range is moved to the nearer end: the
    polynomial means nothing beyond.
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
        """See `Gate.settle`. A computed step resets the sums."""
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
        """See `Gate.settle`. A computed step resets ratio and error."""
        super().settle(computed)
        if computed:
            self._ratio, self._error = 1.0, 0.0
