"""Checks of single values, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
import operator
import sys
from collections.abc import Iterable
from typing import Any


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` if one of `known` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def whole_number(name: str, value: Any, least: int) -> int:
    """Return `value` as an int.

    Raises:
        TypeError: `value` is not a whole number.
        ValueError: it is below `least`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def finite_number(value: Any) -> bool:
    """Whether `value` is an int or a float (not a bool) within the range of a float, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
