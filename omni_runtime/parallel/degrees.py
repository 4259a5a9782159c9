"""How many ranks share which part of the work, as the user gives it. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_runtime.generation.checks import suggestion, whole_number


@dataclass(frozen=True)
class Degrees:
    """The degrees of parallelism. Their product is the number of ranks.

    Attributes:
        ulysses, ring: each rank has a part of the tokens. With Ulysses, ranks exchange tokens for attention heads; with
            ring attention, they pass keys and values on.
        cfg: 2 if the two branches of classifier-free guidance are computed by different ranks, else 1.
        tensor: each rank has a part of the weights.
        uneven: whether the ranks' parts of the tokens may have unequal lengths. If not, the number of image tokens and
            the number of text tokens must be multiples of ulysses · ring.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    tensor: int = 1
    uneven: bool = False

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.ulysses * self.ring * self.cfg * self.tensor

    @property
    def splits_tokens(self) -> bool:
        """Whether each rank has a part of the tokens only."""
        return self.ulysses * self.ring > 1

    def __str__(self) -> str:
        return ",".join(f"{name}={number:d}" for name, number in self.to_dict().items()) or "cfg=1"

    def to_dict(self) -> dict[str, int]:
        """The degrees above 1, and `uneven` if it is set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value > 1 or value is True}

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Degrees:
        """The degrees from a mapping.

        Raises:
            TypeError: it is no mapping, or a degree is no whole number.
            ValueError: a key is unknown, or the degrees cannot be combined.
        """
        if not isinstance(given, Mapping):
            raise TypeError(f'parallel must be a dict, such as {{"cfg": 2}}, not {given!r}')
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"parallel has no {name!r}{suggestion(str(name), known)}; there are {', '.join(known)}"
                )
        uneven = given.get("uneven", False)
        if uneven not in (True, False):
            raise TypeError(f"parallel: uneven must be True or False, not {uneven!r}")
        numbers = {name: value for name, value in given.items() if name != "uneven"}
        degrees = cls(
            **{name: whole_number(f"parallel: {name}", value, least=1) for name, value in numbers.items()},
            uneven=bool(uneven),
        )
        if degrees.cfg > 2:
            raise ValueError(f"parallel: cfg must be 1 or 2, not {degrees.cfg}: guidance has two branches")
        if degrees.splits_tokens and degrees.tensor > 1:
            raise ValueError(
                "parallel: diffusers does not combine tensor parallelism with ulysses or ring: give one of them"
            )
        if degrees.uneven and (degrees.ulysses > 1) == (degrees.ring > 1):
            raise ValueError("parallel: uneven goes with either ulysses or ring, and not with both")
        return degrees


def parse(text: str) -> dict[str, int]:
    """Read the command line's form, such as "ulysses=2,cfg=2".

    Raises:
        ValueError: it has another form.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (one.strip() for one in part.partition("="))
        if not name or not number.isascii() or not number.isdigit():
            raise ValueError(f"must be like ulysses=2,cfg=2, not {text!r}")
        if name in found:
            raise ValueError(f"has {name} twice: {text!r}")
        found[name] = int(number)
    Degrees.of(found)
    return found


@dataclass(frozen=True)
class Place:
    """This process among the ranks.

    Attributes:
        rank: its number, from 0.
        count: the number of ranks.
        local: its number on this machine, from 0.
    """

    rank: int
    count: int
    local: int


def launched() -> Place | None:
    """This process's place, as torchrun gives it in the environment; None if it was not started by torchrun."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(one.isdigit() for one in found[:2]):
        return None
    return Place(int(found[0]), int(found[1]), int(found[2] if found[2].isdigit() else found[0]))


def check_launch(degrees: Degrees, place: Place | None) -> Place:
    """This process's place among the ranks that the degrees need.

    Args:
        place: its place among the ranks that were started; None if it was started alone.

    Raises:
        ValueError: there are more or fewer ranks, or torchrun was not used.
    """
    start = f"torchrun --nproc-per-node {degrees.ranks}"
    if place is None:
        raise ValueError(
            f"parallel: {degrees} needs {degrees.ranks} processes, and this is a single one: start them with {start}"
        )
    if place.count != degrees.ranks:
        raise ValueError(
            f"parallel: the ranks of {degrees} are {degrees.ranks}, and {place.count} were started: use {start}"
        )
    return place
