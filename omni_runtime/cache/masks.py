"""Steps computation masks (SCM): which steps must be computed, by policy name and step count.

1 computes the step, 0 leaves it to the cache. The masks for 4, 6, 8, 9, 28 and 50 steps are those of the cache-dit
project (1.5.3, `steps_mask`). Any other step count takes the nearest of them (by ratio), stretched; its last step is
computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

POLICIES = ("slow", "medium", "fast", "ultra")

#: step count → a mask for each of POLICIES
_MASKS: dict[int, tuple[str, str, str, str]] = {
    4: ("1101", "1101", "1101", "1101"),
    6: ("111001", "111001", "111001", "111001"),
    8: ("11111011", "11110101", "11101001", "11001001"),
    9: ("111110111", "111110101", "111101001", "111001001"),
    28: (
        "1111111101110011100110010001",
        "1111110110001100011000110001",
        "1111110100010000100000100001",
        "1111001000001000000100000001",
    ),
    50: (
        "11111111111111111111110011111000111110001110001101",
        "11111111111111110011100000111000001110000011100001",
        "11111111111001100000110000000110000000001100000001",
        "11111110001100000000011000000000001100000000000001",
    ),
}


def steps_mask(policy: str, steps: int) -> tuple[int, ...]:
    """The mask of `policy` for a request of `steps` steps.

    Raises:
        ValueError: an unknown policy, or fewer than 1 step.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown mask policy {policy!r}: allowed are {', '.join(POLICIES)}")
    if steps < 1:
        raise ValueError(f"a mask needs at least 1 step, not {steps}")
    nearest = min(_MASKS, key=lambda count: abs(math.log(count / steps)))
    mask = [int(bit) for bit in _MASKS[nearest][POLICIES.index(policy)]]
    stretched = [mask[min(nearest - 1, step * nearest // steps)] for step in range(steps)]
    stretched[0] = stretched[-1] = 1
    return tuple(stretched)


def parse_mask(mask: Sequence[int] | str) -> tuple[int, ...]:
    """A mask given as a list of 0 and 1 or as a string of them.

    Raises:
        TypeError: neither a list nor a string.
        ValueError: anything else in it, or nothing.
    """
    if not isinstance(mask, Iterable):
        raise TypeError(f"a steps computation mask must be a list or a string of 0 and 1, not {mask!r}")
    bits = [int(bit) if bit in ("0", "1") else bit for bit in mask]
    if not bits or any(isinstance(bit, bool) or bit not in (0, 1) for bit in bits):
        raise ValueError(f"a steps computation mask holds only 0 and 1, and at least one of them; got {mask!r}")
    return tuple(int(bit) for bit in bits)
