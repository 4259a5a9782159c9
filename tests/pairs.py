"""Pairs of parameters in place of their product."""

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


def _name(value):
    return "-".join(map(_name, value)) if isinstance(value, tuple) else getattr(value, "__name__", str(value))
