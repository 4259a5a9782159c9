"""The parameters that catch most, in place of all: pairs instead of a product, one method for each kind of gate."""

import pytest


def in_turn(first, second):
    """Every pair, of which each value of both comes at least once by default, in turn; the others are long."""
    first, second = [*first], [*second]
    chosen = {(place % len(first), place % len(second)) for place in range(max(len(first), len(second)))}
    return [
        pytest.param(one, other, id=f"{_name(one)}-{_name(other)}", marks=() if (i, j) in chosen else pytest.mark.long)
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]


#: Method → another one with the same gate and site, which watches something else.
ALIKE = {"sea_cache": "tea_cache", "first_block_cache": "cache_dit"}


def by_gate(methods):
    """Every method; one whose gate and site another one has, too, is long."""
    return [pytest.param(one, marks=pytest.mark.long if ALIKE.get(one) in methods else ()) for one in methods]


def _name(value):
    return "-".join(map(_name, value)) if isinstance(value, tuple) else getattr(value, "__name__", str(value))
