"""Configuration keys: what a method takes, what is allowed, and errors that name the value and the nearest key.

Whoever gives a value may give anything. Scalars of numpy and torch, and their arrays of no dimension, are the numbers
that they hold; of what can be iterated, MOST entries are read; and messages show no more than a few lines of a value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omni_kernels.patching.backends import nearest, shown

#: Entries of a list: far more than any request has steps.
MOST = 10_000


class SaidInFullError(ValueError):
    """What is wrong with a value, where what is allowed need not be said besides."""


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        default: what is taken where nothing is given. Where that is None, None can be given, too.
        type_name: of the value, for listings.
        allowed: what is allowed, in words, for messages and listings.
        doc: what it does, in a line.
        convert: a given value → the normalised one; raises TypeError for one of another type and ValueError for one
            out of range, with what is to be said besides what is allowed.
    """

    name: str
    default: Any
    type_name: str
    allowed: str
    doc: str
    convert: Callable[[Any], Any]

    def parse(self, value: Any) -> Any:
        """The normalised value.

        Raises:
            TypeError, ValueError: another type, or out of range; with the key, what is allowed and the value.
        """
        if value is None and self.default is None:
            return None
        try:
            return self.convert(value)
        except SaidInFullError as error:
            raise ValueError(f"{self.name}: {error}") from None
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError  # and none of their subclasses
            hint = f": {error}" if str(error) else ""
            raise kind(f"{self.name} must be {self.allowed}, not {shown(value)}{hint}") from None


# What is given, as Python's own


def plain(value: Any) -> Any:
    """A scalar of numpy or torch, or an array of no dimension, as Python's own number; anything else as it is."""
    if not isinstance(value, int | float | str) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            return value.item()
        except RuntimeError:  # a tensor without data
            return value
    return value


def whole(value: Any) -> int:
    """A whole number. Raises TypeError for anything else, True and 2.0 among it, ValueError for one beyond 64 bits."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    if value.bit_length() > 63:
        raise ValueError("too large")
    return int(value)


def finite(value: Any) -> float:
    """A finite number. Raises TypeError for what is no number, ValueError for NaN, infinities and beyond all floats."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    try:
        value = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(value):
        raise ValueError
    return value


def entries(value: Any) -> list[Any]:
    """The entries of a list, an array or anything else that can be iterated, as Python's own numbers where they are.

    Raises:
        TypeError: text, a mapping, or nothing that has entries.
        ValueError: more than MOST of them.
    """
    if (
        isinstance(value, str | bytes | Mapping)
        or getattr(value, "shape", None) == ()
        or not hasattr(value, "__iter__")
    ):
        raise TypeError
    found = [plain(one) for one in itertools.islice(value, MOST + 1)]
    if len(found) > MOST:
        raise ValueError(f"more than {MOST} entries")
    return found


def _within(value: Any, fits: bool) -> Any:
    if not fits:
        raise ValueError
    return value


# The kinds of keys. Of each, None is allowed where it is the default.


def _key(name: str, default: Any, type_name: str, allowed: str, doc: str, convert: Callable[[Any], Any]) -> Key:
    return Key(name, default, type_name, ("None or " if default is None else "") + allowed, doc, convert)


def integer(name: str, default: int | None, low: int, high: int | None, doc: str) -> Key:
    """A whole number in [low, high]."""

    def convert(value: Any) -> int:
        number = whole(value)
        return _within(number, number >= low and (high is None or number <= high))

    allowed = f"a whole number ≥ {low}" if high is None else f"a whole number from {low} to {high}"
    return _key(name, default, "int", allowed, doc, convert)


def number(name: str, default: float | None, doc: str, *, low: float = -math.inf, above: float = -math.inf) -> Key:
    """A finite number ≥ `low` and > `above`."""

    def convert(value: Any) -> float:
        found = finite(value)
        return _within(found, found >= low and found > above)

    limit = f" ≥ {low:g}" if low > -math.inf else f" > {above:g}" if above > -math.inf else ""
    return _key(name, default, "float", "a finite number" + limit, doc, convert)


def fraction(name: str, default: float, doc: str) -> Key:
    """A number in [0, 1]."""

    def convert(value: Any) -> float:
        found = finite(value)
        return _within(found, 0.0 <= found <= 1.0)

    return _key(name, default, "float", "a number from 0 to 1", doc, convert)


def flag(name: str, default: bool, doc: str) -> Key:
    """True or False."""

    def convert(value: Any) -> bool:
        value = plain(value)
        if not isinstance(value, bool):
            raise TypeError
        return value

    return _key(name, default, "bool", "True or False", doc, convert)


def choice(name: str, default: str | None, allowed: tuple[str, ...], doc: str, *, none: bool = False) -> Key:
    """One of some names. With `none`, None can be given for the default."""

    def convert(value: Any) -> str | None:
        if value is None and none:
            return default
        if not isinstance(value, str):
            raise TypeError
        if value not in allowed:
            raise ValueError(nearest(value, allowed))
        return str(value)

    text = ("None or " if none else "") + "one of " + ", ".join(map(repr, allowed))
    return _key(name, default, "str", text, doc, convert)


def numbers(name: str, count: int, doc: str) -> Key:
    """`count` finite numbers, or None."""

    def convert(value: Any) -> tuple[float, ...]:
        found = tuple(map(finite, entries(value)))
        if len(found) != count:
            raise ValueError(f"these are {len(found)}")
        return found

    return _key(name, None, f"{count} floats", f"{count} finite numbers", doc, convert)


def positives(name: str, doc: str) -> Key:
    """One finite number > 0 or more, or None."""

    def convert(value: Any) -> tuple[float, ...]:
        found = tuple(map(finite, entries(value)))
        return _within(found, len(found) > 0 and min(found) > 0)

    return _key(name, None, "floats", "finite numbers > 0, at least one", doc, convert)


def nothing(name: str, doc: str) -> Key:
    """None alone, for a key that else takes a file."""

    def convert(value: Any) -> None:
        raise TypeError

    return Key(name, None, "None", "None", doc, convert)


class Resolved(dict[str, Any]):
    """A complete configuration, as `resolve` gives it."""


def resolve(keys: tuple[Key, ...], config: Mapping[str, Any] | None, owner: str) -> Resolved:
    """Every key with its value: given, else default.

    Raises:
        TypeError: `config` is no mapping, or a value has the wrong type.
        ValueError: an unknown key (the nearest one is named), or a value out of range.
    """
    if config is None:
        config = {}
    if not isinstance(config, Mapping):
        raise TypeError(f"the configuration of {owner} must be a dict, not {shown(config)}")
    known = {key.name: key for key in keys}
    for name in config:
        if name not in known:
            raise ValueError(
                f"{owner} has no key {shown(name)}: {nearest(name if isinstance(name, str) else '', known)}"
            )
    return Resolved((name, key.parse(config[name]) if name in config else key.default) for name, key in known.items())
