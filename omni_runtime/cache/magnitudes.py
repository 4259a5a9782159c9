"""MagCache's magnitude ratios for one model: how they are fitted, and how they are adapted to another number of steps.

γ_t, the ratio of step t, is the mean over tokens of |r_t| / (|r_(t−1)| + 1e-8), where r_t is what all blocks add to a
token at step t and |.| is the Euclidean norm. It is the factor by which a residual that is reused from the step before
would be too small or too large. γ_0 is 1. The ratios are averaged over the samples, including all CFG branches
(MagCache, Ma et al. 2025, arXiv:2506.09045; the definition is that of diffusers' `MagCacheConfig(calibrate=True)`,
which uses the first branch of one run).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_runtime.cache.calibration import UselessFitError


@dataclass(frozen=True)
class Ratios:
    """The ratios of a run's steps, and how much they vary between samples.

    Attributes:
        mag_ratios: γ_t for each step.
        spread: the largest standard deviation of the samples' ratios at one step.
        points: the number of recorded ratios.
    """

    mag_ratios: tuple[float, ...]
    spread: float
    points: int

    method = "mag_cache"

    def fields(self) -> dict[str, Any]:
        """The fields that the calibration file holds."""
        return {"mag_ratios": list(self.mag_ratios), "spread": self.spread, "points": self.points}

    def words(self) -> str:
        """The fit in a sentence, followed by the ratios."""
        later = self.mag_ratios[1:]
        return (
            f"{self.points} points: from step to step the residual's magnitude changes by a factor of {min(later):.4g} "
            f"to {max(later):.4g}; at one step, the samples' factors have a standard deviation of up to "
            f"{self.spread:.2g}.\nmag_ratios {', '.join(f'{one:.5g}' for one in self.mag_ratios)}"
        )


def fit(points: Iterable[tuple[int, float]]) -> Ratios:
    """The mean ratio of each step, from the (step, ratio) pairs of every sample; steps are counted from 1.

    Raises:
        UselessFitError: there are no points, or some ratios are not finite or not positive.
    """
    steps: dict[int, list[float]] = {}
    for step, ratio in points:
        steps.setdefault(step, []).append(ratio)
    if not steps:
        raise UselessFitError("there are no ratios of one step to the next: calibrate with at least 2 steps")
    # A step without a ratio, where the pipeline has changed to another transformer, is as large as the one before.
    found = [np.asarray(steps.get(step, [1.0]), np.float64) for step in range(1, max(steps) + 1)]
    count = sum(map(len, found))
    wrong = sum(np.count_nonzero(~(np.isfinite(one) & (one > 0))) for one in found)
    if wrong:
        raise UselessFitError(
            f"{wrong} of {count} recorded ratios are not finite numbers above 0: the model gives infinities, NaN or "
            "nothing at all with these settings"
        )
    means = tuple(round(float(one.mean()), 5) for one in found)
    return Ratios((1.0, *means), max(float(one.std()) for one in found), count)


def resized(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """The ratios for another number of steps: each step gets the ratio at the nearest relative position."""
    if steps == 1:
        return (ratios[-1],)
    scale = (len(ratios) - 1) / (steps - 1)
    return tuple(ratios[round(step * scale)] for step in range(steps))
