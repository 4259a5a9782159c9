"""Steps computation masks (SCM): which steps must be computed, by policy name and step count.

1 computes the step, 0 leaves it to the cache. The masks for 4, 6, 8, 9, 28 and 50 steps are those of the cache-dit
project (1.5.3, `steps_mask`). For any other step count, the mask of the nearest count (by ratio) is stretched, and the
last step is always computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from omni_runtime.cache.config import entries

POLICIES = ("slow", "medium", "fast", "ultra")

#: The entries that a given mask may have → the bit.
_BITS: dict[Any, int] = {"0": 0, "1": 1, 0: 0, 1: 1}

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
        ValueError: the policy is unknown, or there is less than 1 step.
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


def parse_mask(mask: Iterable[Any]) -> tuple[int, ...]:
    """Parse a mask that is given as a list (or an array) of 0 and 1, or as a string of them.

    Raises:
        TypeError: the mask is neither a list nor a string.
        ValueError: it is empty, has other entries, or has more than `config.MOST` of them.
    """
    given = entries(iter(mask) if isinstance(mask, str) else mask)
    bits = [_BITS.get(bit) if type(bit) in (str, int, float) else None for bit in given]
    if not bits or None in bits:
        raise ValueError("it holds only 0 and 1, and at least one of them")
    return tuple(bit for bit in bits if bit is not None)
