"""Presets: from a wanted quality, speed or PSNR to the steps that are computed, and what that answer rests on.

A model's own calibration (`omni calibrate schedule`) is used if there is one. Without one, the default schedule is used
(`schedules.early`), and what to expect is taken from the embedded models: small models, whose figures say in which
range a larger model's may be. The answer says which of both it rests on.

What to expect depends on the number of computed steps more than on their share: 10 of 20 steps are about as good as 10
of 50, not as 25 of 50. So figures are carried over from one number of steps to another by the number of computed ones.
A request of few steps is computed in full: there, plain sampling with fewer steps is better
(`python -m benchmarks.few_steps`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_runtime import files
from omni_runtime.cache import calibration, schedules
from omni_runtime.cache.schedules import Schedule

#: preset → how many times fewer steps are computed; None: every step is computed
PRESETS: dict[str, float | None] = {"exact": None, "high": 2.0, "balanced": 3.0, "fast": 4.0}
DEFAULT = "balanced"
#: Requests with fewer steps are computed in full, and of longer ones at least so many steps. Below these numbers, plain
#: sampling with as many steps as a preset would compute is better.
SHORTEST, FEWEST = 12, 6
#: No wanted PSNR computes a larger share of the steps: skipping so few costs more than plain sampling with as many.
LARGEST = 0.7


@dataclass(frozen=True)
class Asked:
    """What the user wants: one of these, or nothing for the default preset.

    Attributes:
        quality: a preset's name.
        speedup: how many times as fast as the full run.
        psnr: the mean PSNR against the full run, in dB.
    """

    quality: str | None = None
    speedup: float | None = None
    psnr: float | None = None

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"speedup {self.speedup:g}"
        return f"psnr {self.psnr:g}" if self.psnr is not None else self.quality or DEFAULT


@dataclass(frozen=True)
class Answer:
    """What a preset does with a request.

    Attributes:
        schedule: the computed steps.
        psnr: the lowest and the highest mean PSNR in dB against the full run that is to be expected; None if every
            step is computed, or if nothing is known.
        low: the same of the 5th percentile: of 20 pictures, one may be below it; None if it is not known.
        basis: what both rest on, in words.
        note: why it is not what was asked for, in words; "" if it is.
        speedup: the expected speedup over the full run.
        speed_basis: what `speedup` rests on, in words.
    """

    schedule: Schedule
    psnr: tuple[float, float] | None = None
    low: tuple[float, float] | None = None
    basis: str = ""
    note: str = ""
    speedup: float = 1.0
    speed_basis: str = "every step is computed"

    def __str__(self) -> str:
        computed, steps = len(self.schedule.computed), self.schedule.steps
        words = f"{computed} of {steps} steps computed, {self.schedule.origin}"
        if computed == steps:
            words = f"all {steps} steps computed"
        else:
            words += f"; expect {self.speedup:.1f} times the speed ({self.speed_basis})"
        if self.psnr is not None:
            words += f" and {self.decibels}"
            words += f", 1 picture of 20 below {_range(self.low)}" if self.low is not None else ""
            words += f" ({self.basis})"
        return words + (f"; {self.note}" if self.note else "")

    @property
    def decibels(self) -> str:
        """The expected PSNR in words."""
        if self.psnr is None:
            return "the same picture" if len(self.schedule.computed) == self.schedule.steps else "not known"
        return f"{_range(self.psnr)} dB"

    @property
    def lowest(self) -> str:
        """The expected 5th percentile of the PSNR in words; "" if it is not known."""
        return "" if self.low is None else f"{_range(self.low)} dB"


def _range(numbers: tuple[float, float]) -> str:
    low, high = (f"{one:.0f}" for one in numbers)
    return low if low == high else f"{low} to {high}"


def answer(
    asked: Asked, steps: int, calibrated: Sequence[Schedule] = (), sigmas: Sequence[float] | None = None
) -> Answer:
    """Choose the computed steps of a request.

    Args:
        asked: what is wanted.
        steps: the number of steps of the request, at least 1.
        calibrated: the model's own schedules; none: the default schedule is used.
        sigmas: the noise levels of the request's steps; None if they are not known.

    Raises:
        ValueError: by what was measured, no schedule is as fast as `asked.speedup`.
    """
    everything = Schedule(steps, tuple(range(steps)), "every step")
    if asked.quality == "exact":
        return Answer(everything, note="every cache changes the picture a little, so nothing is skipped")
    if steps < SHORTEST:
        why = f"nothing to gain here: of fewer than {SHORTEST} steps, plain sampling with fewer is better"
        return Answer(everything, note=why)
    if asked.psnr is not None:
        found = _good_enough(asked.psnr, steps, calibrated)
        if found is None:
            return Answer(everything, note=f"nothing that was measured reaches {asked.psnr:g} dB with fewer steps")
        budget = found
    elif asked.speedup is not None:
        budget = schedules.fast_enough(calibrated, steps, asked.speedup)
    else:
        times = PRESETS[asked.quality or DEFAULT]
        assert times is not None  # only for "exact", answered above
        budget = -int(-steps // times)
    note = ""
    if budget < FEWEST:
        note, budget = f"plain sampling is better than fewer than {FEWEST} computed steps", FEWEST
    near = schedules.nearest(calibrated, steps, budget)
    schedule = schedules.early(steps, budget) if near is None else schedules.fitted(near, steps, sigmas, budget)
    psnr, low, basis = _expected(budget, steps, near, calibrated)
    measured = schedules.saved_by_skipping(calibrated)
    speed_basis = "by counting steps; no times were measured" if measured is None else "as measured on this model"
    speedup = 1 / (1 - (1.0 if measured is None else measured) * (1 - budget / steps))
    return Answer(schedule, psnr, low, basis, note, speedup, speed_basis)


Range = tuple[float, float] | None


def _expected(
    budget: int, steps: int, near: Schedule | None, calibrated: Sequence[Schedule]
) -> tuple[Range, Range, str]:
    """The lowest and highest mean PSNR and 5th percentile to be expected, and what they rest on; None: not known."""
    if near is not None:
        psnr = _between(_measured(calibrated), budget)
        if psnr is None:
            return None, None, ""
        low = _between([(len(one.computed), one.low) for one in calibrated if one.low is not None], budget)
        images = min((one.images for one in calibrated), default=0)
        basis = "measured on this model" + ("" if near.steps == steps else f" at {near.steps} steps")
        basis += f", on {images} pictures that its schedules were not searched on" if images else ""
        return (psnr, psnr), None if low is None else (low, low), basis
    known, lows = _known(budget, "mean"), _known(budget, "p5")
    if not known:
        return None, None, ""
    basis = f"as on the {len(known)} embedded models, which are small; `omni calibrate schedule` measures this one"
    return (min(known), max(known)), (min(lows), max(lows)), basis


def _good_enough(psnr: float, steps: int, calibrated: Sequence[Schedule]) -> int | None:
    """The smallest number of computed steps that is expected to reach a mean PSNR in dB; None: only all of them."""
    own = _measured(calibrated)
    for budget in range(FEWEST, int(LARGEST * steps) + 1):
        expected = _between(own, budget) if own else min(_known(budget, "mean"), default=None)
        if expected is not None and expected >= psnr:
            return budget
    return None


def _measured(calibrated: Sequence[Schedule]) -> list[tuple[int, float]]:
    """Numbers of computed steps, and their mean PSNR in dB."""
    return [(len(one.computed), one.psnr) for one in calibrated if one.psnr is not None]


def _between(points: Sequence[tuple[int, float]], budget: int) -> float | None:
    """The mean PSNR of a number of computed steps, interpolated linearly between those that were measured.

    Above all of them, it is that of the largest; below them, it is not known.
    """
    points = sorted(points)
    if not points or budget < points[0][0]:
        return None
    return float(np.interp(budget, [count for count, _ in points], [psnr for _, psnr in points]))


def _known(budget: int, statistic: str) -> list[float]:
    """The PSNR ("mean" or "p5") of so many steps of the default schedule on each model for which it was measured."""
    found = (_between(points, budget) for points in _general(statistic).values())
    return [one for one in found if one is not None]


@functools.cache
def _general(statistic: str) -> dict[str, list[tuple[int, float]]]:
    """Embedded model → numbers of computed steps, and PSNR in dB of the default schedule with so many."""
    from omni_runtime.generation.loading import embedded_models

    found = {}
    for name, directory in embedded_models().items():
        path = directory / calibration.file_name("velocity_cache")
        if path.is_file():
            rows = files.read_json(path)["schedules"]
            found[name] = [(len(row["computed"]), float(row["uncalibrated"][statistic])) for row in rows]
    return found
