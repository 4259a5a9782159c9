"""Configuration keys: which ones a method has, which values are allowed, and the errors for wrong ones.

Values come from users and may be anything. Scalars and 0-dimensional arrays of numpy and torch count as the numbers
that they hold. Of an iterable, at most MOST entries are accepted. Messages show only a few lines of a value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omni_kernels.patching.backends import nearest, shown

#: The most entries of a list: far more than any request has steps.
MOST = 10_000


class SaidInFullError(ValueError):
    """An error in a value whose message is complete: the text of what is allowed is not added to it."""


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        default: the value if none is given. If it is None, None is also allowed as a given value.
        type_name: the type of the value, for listings.
        allowed: what is allowed, in words, for messages and listings.
        doc: what the key does, in a line.
        convert: a given value → the normalised one. Raises TypeError for a wrong type and ValueError for a value out
            of range; the error's text is a hint that is added to the message.
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
            TypeError, ValueError: wrong type, or out of range. The message has the key, what is allowed and the value.
        """
        if value is None and self.default is None:
            return None
        try:
            return self.convert(value)
        except SaidInFullError as error:
            raise ValueError(f"{self.name}: {error}") from None
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError  # never one of their subclasses
            hint = f": {error}" if str(error) else ""
            raise kind(f"{self.name} must be {self.allowed}, not {shown(value)}{hint}") from None


# Given values as Python values


def plain(value: Any) -> Any:
    """Convert a scalar or 0-dimensional array of numpy or torch to a Python number; return anything else as it is."""
    if not isinstance(value, int | float | str) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            return value.item()
        except RuntimeError:  # a tensor without data
            return value
    return value


def whole(value: Any) -> int:
    """A whole number. Raises TypeError for anything else, also for True and 2.0; ValueError if it exceeds 64 bits."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    if value.bit_length() > 63:
        raise ValueError("too large")
    return int(value)


def finite(value: Any) -> float:
    """A finite number. Raises TypeError if it is not a number; ValueError if it is NaN, infinite or too large."""
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
    """The entries of a list, an array or another iterable; numpy and torch scalars are converted to Python numbers.

    Raises:
        TypeError: `value` is text, a mapping, or not iterable.
        ValueError: it has more than MOST entries.
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


# The kinds of keys. Each one allows None if its default is None.


def _key(name: str, default: Any, type_name: str, allowed: str, doc: str, convert: Callable[[Any], Any]) -> Key:
    return Key(name, default, type_name, ("None or " if default is None else "") + allowed, doc, convert)


def integer(name: str, default: int | None, low: int, high: int | None, doc: str) -> Key:
    """A whole number in [low, high]."""

    def convert(value: Any) -> int:
        number = whole(value)
        return _within(number, number >= low and (high is None or number <= high))

    allowed = f"a whole number ≥ {low}" if high is None else f"a whole number from {low} to {high}"
    return _key(name, default, "int", allowed, doc, convert)


def number(
    name: str,
    default: float | None,
    doc: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    none: bool = False,
) -> Key:
    """A finite number ≥ `low` and > `above`. With `none`, None may be given and means the default."""

    def convert(value: Any) -> float | None:
        if value is None and none:
            return default
        found = finite(value)
        return _within(found, found >= low and found > above)

    limit = f" ≥ {low:g}" if low > -math.inf else f" > {above:g}" if above > -math.inf else ""
    return _key(name, default, "float", "None or " * none + "a finite number" + limit, doc, convert)


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
    """One of the `allowed` names. With `none`, None may be given and means the default."""

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
    """Only None. Used in place of a key that usually takes a file."""

    def convert(value: Any) -> None:
        raise TypeError

    return Key(name, None, "None", "None", doc, convert)


class Resolved(dict[str, Any]):
    """A complete configuration, as `resolve` gives it."""


def resolve(
    keys: tuple[Key, ...], config: Mapping[str, Any] | None, owner: str, spellings: Mapping[str, str] | None = None
) -> Resolved:
    """Every key with its given value, or its default.

    Args:
        spellings: another name of a key → its name.

    Raises:
        TypeError: `config` is not a mapping, or a value has the wrong type.
        ValueError: a key is unknown (the message names the nearest one) or given by two names, or a value is out of
            range.
    """
    if config is None:
        config = {}
    if not isinstance(config, Mapping):
        raise TypeError(f"the configuration of {owner} must be a dict, not {shown(config)}")
    known = {key.name: key for key in keys}
    config = dict(config)
    for other, name in (spellings or {}).items():
        if other in config:
            if name in config:
                raise ValueError(f"{owner}: {other} is another name of {name}: give one of them")
            config[name] = config.pop(other)
    for name in config:
        if name not in known:
            raise ValueError(
                f"{owner} has no key {shown(name)}: {nearest(name if isinstance(name, str) else '', known)}"
            )
    return Resolved((name, key.parse(config[name]) if name in config else key.default) for name, key in known.items())
