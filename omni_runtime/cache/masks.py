"""Steps computation masks (SCM): which steps must be computed, by policy name and step count.

1 computes the step, 0 leaves it to the cache. The masks are those of the cache-dit project (1.5.3, `steps_mask`) at
every step count. They are made from the runs of ones and of zeros in the masks that it gives in full, those for 4, 6,
8, 9, 15 and 28 steps:

- More than 28 steps: each run of the mask for 28 steps is made longer, one after the other and again from the first,
  by the share `steps` / 56 of its length in that mask (rounded down, at least 1; the last run by 1), until the runs
  have as many steps. That may be a few too many.
- If there are too many steps, the last runs of zeros and the last runs of ones lose them in turns, zeros first.
- Fewer than 28 steps: from 16 on, the mask for 28 steps is shortened in this way, and from 10 on, the one for 15.
- The last step is always computed.

Below 8 steps, there are masks for 4 and 6 steps only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
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
    15: ("111101101101101", "111101101001001", "111010010010001", "110100100010001"),
    28: (
        "1111111101110011100110010001",
        "1111110110001100011000110001",
        "1111110100010000100000100001",
        "1111001000001000000100000001",
    ),
}
#: A mask that has no full form is made from the one for this many steps.
_SHORT, _LONG = 15, 28


def steps_mask(policy: str, steps: int) -> tuple[int, ...] | None:
    """The mask of `policy` for a request of `steps` steps; None if cache-dit has none for so few steps.

    Raises:
        ValueError: the policy is unknown, or there is less than 1 step.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown mask policy {policy!r}: allowed are {', '.join(POLICIES)}")
    if steps < 1:
        raise ValueError(f"a mask needs at least 1 step, not {steps}")
    if steps < 8 and steps not in _MASKS:
        return None
    made_from = steps if steps in _MASKS else _SHORT if steps < 16 else _LONG
    mask = _MASKS[made_from][POLICIES.index(policy)]
    runs = [len(list(run)) for _, run in itertools.groupby(mask)]
    growth = [max(int(run * (steps / _LONG * 0.5)), 1) for run in runs[:-1]] + [1]
    for i in itertools.cycle(range(len(runs))):
        if sum(runs) >= steps:
            break
        runs[i] += growth[i]
    surplus = sum(runs) - steps
    ones, zeros = _shortened(runs[::2], surplus // 2), _shortened(runs[1::2], surplus - surplus // 2)
    made: list[int] = []
    for one, zero in itertools.zip_longest(ones, zeros, fillvalue=0):
        made += [1] * one + [0] * zero
    made[-1] = 1
    return tuple(made)


def _shortened(runs: Sequence[int], surplus: int) -> list[int]:
    """The runs without their last `surplus` steps."""
    ends = [min(end, sum(runs) - surplus) for end in itertools.accumulate(runs)]
    return [end - begin for begin, end in itertools.pairwise([0, *ends])]


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
