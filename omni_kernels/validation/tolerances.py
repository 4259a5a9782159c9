"""The allowed difference of a result from the fp64 oracle: one table, by dtype.

A result that is computed in fp32 and rounded once has an error of at most one unit in the last place of its dtype. (It
is a whole unit because Triton's interpreter truncates fp32 to bf16 where devices round.) An 8-bit result is off by half
a unit, as it is rounded to the nearest. The error of fp32 arithmetic on its terms is added. A pairwise sum of fp32
numbers loses a few units, whatever its length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# One unit in the last place (relative), and the smallest step near zero; of 8-bit results half of each.
UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
UNIT |= {torch.int8: 0.0, torch.float8_e4m3fn: 2.0**-4, torch.float8_e4m3fnuz: 2.0**-4, torch.float8_e8m0fnu: 0.0}
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}
SMALLEST |= {
    torch.int8: 0.5,
    torch.float8_e4m3fn: 2.0**-10,
    torch.float8_e4m3fnuz: 2.0**-11,
    torch.float8_e8m0fnu: 2.0**-127,
}
# Error of intermediate fp32 arithmetic, relative to the magnitude of the terms: 8 units.
ARITHMETIC = 2.0**-20


@dataclass(frozen=True)
class Mismatch:
    """A wrong result, described by its worst element.

    `index`, `got` and `expected` belong to that element. They are None if no single element is at fault, such as for a
    wrong shape. `times` is its error divided by the allowed error; it is infinite for misplaced NaN and infinities.
    """

    reason: str
    index: tuple[int, ...] | None = None
    got: float | None = None
    expected: float | None = None
    times: float | None = None

    def __str__(self) -> str:
        if self.index is None:
            return self.reason
        return f"{self.reason}; worst at {[*self.index]}: got {self.got!r}, expected {self.expected!r}"


def worst(
    actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor | None = None
) -> tuple[float, tuple[int, ...]]:
    """The largest error, divided by the allowed error, and its element. The arguments are those of `mismatch`.

    The error is infinite for misplaced NaN and infinities. The shapes must be equal and not empty.
    """
    expected = expected.double()
    got = actual.to(expected.device).double()
    terms = expected.abs() if magnitude is None else magnitude.to(expected.device).double()
    allowed = UNIT[actual.dtype] * expected.abs() + SMALLEST[actual.dtype] + ARITHMETIC * terms
    times = ((got - expected).abs() / allowed).nan_to_num_(nan=0.0, posinf=math.inf)
    times = torch.where(expected.isfinite(), times, 0.0)
    misplaced = (got.isnan() != expected.isnan()) | (expected.isinf() & (got != expected))
    place = torch.where(misplaced, math.inf, times).flatten().argmax()
    index = tuple(int(i) for i in torch.unravel_index(place, expected.shape))
    return math.inf if misplaced[index] else float(times[index]), index


def mismatch(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor | None = None) -> Mismatch | None:
    """What is wrong with `actual`, which should be the rounded fp64 `expected`; None if it is correct.

    Args:
        actual: fp32, fp16, bf16, int8 or fp8, on any device.
        expected: fp64 in the same shape. The comparison runs on its device.
        magnitude: summed magnitude of the terms, if they cancel in `expected`. None: that of `expected`.

    Infinities and NaN must be in the expected places.
    """
    if actual.shape != expected.shape:
        return Mismatch(f"shape {[*actual.shape]}, expected {[*expected.shape]}")
    if not actual.numel():
        return None
    found, index = worst(actual, expected, magnitude)
    if found <= 1:
        return None
    got, expected = actual[index].double(), expected[index].double()
    if got.isnan() or expected.isnan():
        reason = "NaN in other places than expected"
    elif math.isinf(found):
        reason = "infinities in other places than expected"
    else:
        reason = f"off by up to {found:.3g} times what is allowed"
    return Mismatch(reason, index, float(got), float(expected), found)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor | None = None) -> None:
    """Raises AssertionError with the `mismatch`, if there is one."""
    problem = mismatch(actual, expected, magnitude)
    assert problem is None, str(problem)
