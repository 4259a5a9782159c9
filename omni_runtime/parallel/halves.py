"""Halves of a transformer call: what each rank computes of a call for both branches, and how the results are joined.

Diffusers' transformers take no argument that says which of the others have an entry for each sample. This is seen: a
tensor whose first dimension (or else its second) is the number of samples, and a list with an entry for each. A guess
can be wrong: the number of frames may be the number of samples by chance. So the first call of each kind is compared
with the whole call, and two guesses are tried (`omni_runtime.parallel.guidance`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_runtime.parallel.pair import Pair


def samples(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The number of samples in a call, by its first argument; 0 if that has none."""
    first = _first(args, kwargs)
    if isinstance(first, torch.Tensor):
        return len(first) if first.dim() else 0
    return len(first) if isinstance(first, list) else 0


def twice_the_same(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the first argument has the same latents twice, as guidance with one call has them."""
    count, first = samples(args, kwargs), _first(args, kwargs)
    return count > 0 and count % 2 == 0 and _same(first[: count // 2], first[count // 2 :])


def _same(some: Any, others: Any) -> bool:
    if isinstance(some, torch.Tensor) and isinstance(others, torch.Tensor):
        return some.shape == others.shape and torch.equal(some, others)
    if isinstance(some, list) and isinstance(others, list):
        return len(some) == len(others) and all(map(_same, some, others))
    return some is None and others is None


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def kind(value: Any, count: int, deep: bool) -> Hashable:
    """How an argument is cut.

    Args:
        value: the argument.
        count: the number of samples.
        deep: whether tensors within tuples and dicts are cut, too, and along their second dimension if need be.
    """
    if isinstance(value, torch.Tensor):
        return next((axis for axis, size in enumerate(value.shape[: 1 + deep]) if size == count), None)
    if isinstance(value, list) and len(value) == count and not _rows(value, count):
        return "each"
    if isinstance(value, list) or (isinstance(value, tuple) and deep):
        return tuple(kind(one, count, deep) for one in value)
    if isinstance(value, Mapping) and deep:
        return tuple((str(name), kind(one, count, deep)) for name, one in value.items())
    return None


def _rows(values: Sequence[Any], count: int) -> bool:
    return all(isinstance(one, torch.Tensor) and one.dim() > 0 and len(one) == count for one in values)


def cut(value: Any, count: int, deep: bool, part: int, parts: int) -> Any:
    """One part of an argument; all of it if it has no entry for each sample. Lists and dicts are copied."""
    size = count // parts
    how = kind(value, count, deep)
    if isinstance(value, torch.Tensor):
        return value.narrow(how, part * size, size) if isinstance(how, int) else value
    if how == "each":
        return value[part * size : (part + 1) * size]
    if type(value) in (list, tuple):
        return type(value)(value if how is None else (cut(one, count, deep, part, parts) for one in value))
    if type(value) is dict:
        return {name: one if how is None else cut(one, count, deep, part, parts) for name, one in value.items()}
    return value


@dataclass(frozen=True)
class Call:
    """A call for both branches, and how it is cut.

    Attributes:
        args, kwargs: its arguments.
        count: the number of samples.
        deep: see `kind`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int
    deep: bool

    @property
    def kind(self) -> Hashable:
        """How the arguments are cut."""
        kwargs = tuple((name, kind(one, self.count, self.deep)) for name, one in self.kwargs.items())
        return self.deep, tuple(kind(one, self.count, self.deep) for one in self.args), kwargs

    def part(self, part: int, parts: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one part of the call."""
        args = tuple(cut(one, self.count, self.deep, part, parts) for one in self.args)
        return args, {name: cut(one, self.count, self.deep, part, parts) for name, one in self.kwargs.items()}


def seams(whole: Any, part: Any, parts: int) -> Any:
    """How results are joined, from that of a whole call and that of a part of it.

    Raises:
        ValueError: they do not fit together.
    """
    if isinstance(whole, torch.Tensor):
        if not whole.dim() or whole.shape != (len(part) * parts, *part.shape[1:]):
            raise ValueError(f"a part of a result of shape {tuple(whole.shape)} has the shape {tuple(part.shape)}")
        return "rows"
    if isinstance(whole, list) and len(whole) == parts * len(part):
        return "each"
    if isinstance(whole, Mapping):
        return {name: seams(one, part[name], parts) for name, one in whole.items()}
    if isinstance(whole, (tuple, list)):
        return [seams(one, other, parts) for one, other in zip(whole, part, strict=True)]
    return None


def joined(value: Any, how: Any, pair: Pair) -> Any:
    """The whole result, from each rank's part; `how` is from `seams`."""
    if how == "rows":
        out = value.new_empty((pair.count, *value.shape))
        out[pair.rank] = value
        for owner, part in enumerate(out):
            pair.send(part, owner)
        return out.flatten(0, 1)
    if how == "each":
        found = []
        for owner in range(pair.count):
            part = [one.contiguous() if owner == pair.rank else torch.empty_like(one) for one in map(_dense, value)]
            for one in part:
                pair.send(one, owner)
            found += part
        return found
    if isinstance(value, Mapping):
        return type(value)(**{name: joined(one, how[name], pair) for name, one in value.items()})
    if isinstance(value, (tuple, list)):
        made = [joined(one, part, pair) for one, part in zip(value, how, strict=True)]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous()
