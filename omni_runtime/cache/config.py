"""Configuration keys: what a method takes, what is allowed, and errors that name the value and the nearest key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omni_kernels.patching.backends import nearest


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        parse: the given value → the normalised one; raises ValueError or TypeError.
        allowed: what is allowed, in words, for messages and listings.
    """

    name: str
    default: Any
    type_name: str
    allowed: str
    doc: str
    parse: Callable[[Any], Any]


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def integer(name: str, default: int | None, low: int, high: int | None, doc: str) -> Key:
    """A whole number in [low, high]; None is allowed where it is the default."""
    allowed = f"a whole number ≥ {low}" if high is None else f"a whole number from {low} to {high}"

    def parse(value: Any) -> int | None:
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be {allowed}, not {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be {allowed}, not {value}")
        return value

    return Key(name, default, "int", allowed, doc, parse)


def number(name: str, default: float, doc: str, *, positive: bool = False, low: float = -math.inf) -> Key:
    """A finite number, > 0 if `positive`, ≥ `low`."""
    allowed = "a finite number" + (" > 0" if positive else f" ≥ {low:g}" if low > -math.inf else "")

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be {allowed}, not {value!r}")
        if not _finite(value) or (positive and value <= 0) or value < low:
            raise ValueError(f"{name} must be {allowed}, not {value}")
        return float(value)

    return Key(name, default, "float", allowed, doc, parse)


def optional_number(name: str, above: float, doc: str) -> Key:
    """None, or a finite number > `above`."""
    allowed = f"None or a finite number > {above:g}"

    def parse(value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be {allowed}, not {value!r}")
        if not _finite(value) or value <= above:
            raise ValueError(f"{name} must be {allowed}, not {value}")
        return float(value)

    return Key(name, None, "float", allowed, doc, parse)


def nothing(name: str, doc: str) -> Key:
    """None alone, for a key that else takes a file."""

    def parse(value: Any) -> None:
        if value is not None:
            raise TypeError(f"{name} must be None, not {value!r}")

    return Key(name, None, "None", "None", doc, parse)


def flag(name: str, default: bool, doc: str) -> Key:
    """True or False."""

    def parse(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")
        return value

    return Key(name, default, "bool", "True or False", doc, parse)


def choice(name: str, default: str | None, allowed: tuple[str, ...], doc: str) -> Key:
    """One of some names; None is allowed where it is the default."""
    text = ("None or " if default is None else "") + "one of " + ", ".join(map(repr, allowed))

    def parse(value: Any) -> str | None:
        if value is None and default is None:
            return None
        if not isinstance(value, str):
            raise TypeError(f"{name} must be {text}, not {value!r}")
        if value not in allowed:
            raise ValueError(f"{name} must be {text}, not {value!r}: {nearest(value, allowed)}")
        return value

    return Key(name, default, "str", text, doc, parse)


def fraction(name: str, default: float, doc: str) -> Key:
    """A number in [0, 1]."""
    allowed = "a number from 0 to 1"

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be {allowed}, not {value!r}")
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be {allowed}, not {value}")
        return float(value)

    return Key(name, default, "float", allowed, doc, parse)


def numbers(name: str, count: int, doc: str) -> Key:
    """`count` finite numbers, or None."""
    return _list(name, f"{count} finite numbers", f"{count} floats", doc, lambda v: len(v) == count)


def positives(name: str, doc: str) -> Key:
    """One finite number > 0 or more, or None."""
    return _list(name, "finite numbers > 0, at least one", "floats", doc, lambda v: len(v) > 0 and min(v) > 0)


def _list(name: str, what: str, type_name: str, doc: str, fits: Callable[[list[float]], bool]) -> Key:
    allowed = f"None or {what}"

    def parse(value: Any) -> tuple[float, ...] | None:
        if value is None:
            return None
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError(f"{name} must be {allowed}, not {value!r}")
        values = list(value)
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
            raise TypeError(f"{name} must be {allowed}, not {value!r}")
        if not fits(values) or not all(_finite(v) for v in values):
            raise ValueError(f"{name} must be {allowed}; got {len(values)}: {value!r}")
        return tuple(float(v) for v in values)

    return Key(name, None, type_name, allowed, doc, parse)


def resolve(keys: tuple[Key, ...], config: Mapping[str, Any] | None, owner: str) -> dict[str, Any]:
    """Every key with its value: given, else default.

    Raises:
        TypeError: `config` is no mapping, or a value has the wrong type.
        ValueError: an unknown key (the nearest one is named), or a value out of range.
    """
    if config is None:
        config = {}
    if not isinstance(config, Mapping):
        raise TypeError(f"the configuration of {owner} must be a dict, not {config!r}")
    known = {key.name: key for key in keys}
    for name in config:
        if name not in known:
            raise ValueError(f"{owner} has no key {name!r}: {nearest(str(name), known)}")
    return {name: key.parse(config[name]) if name in config else key.default for name, key in known.items()}
