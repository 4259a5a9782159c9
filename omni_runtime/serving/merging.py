"""Joins several calls of one transformer into one batched call, and splits its result.

Diffusers' transformers take no argument that says which of the others have an entry for each sample. This is seen:

- a tensor whose first dimension is the number of samples is joined along it;
- a list with an entry for each sample is joined; texts in it may be of unequal length, which the model pads itself;
- a single noise level (a tensor without dimensions) is repeated for each sample, and joined;
- text of unequal length is padded with zeros, if the forward takes a mask for it (`<name>_mask`);
- everything else must be equal in all calls, and is passed once.

Many models read where the tokens are from the first sample alone, and take it to be so for all: Qwen-Image's shapes of
pictures, FLUX's and FLUX.2's `img_ids[0]`. So numbers and texts in a list of samples must be equal in all calls, and so
must tensors that hold positions (`POSITIONS`), though they have an entry for each sample.

A guess can be wrong: the number of tokens may be the number of samples by chance. So the first batch of each
`structure` is compared with its calls made alone (`omni_runtime.serving.forwards`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: (tensor, whether one row stands for all of them if they are equal) → a key that equal tensors share
Same = Callable[[torch.Tensor, bool], Hashable]

#: Names of arguments that say where tokens are, or how many: `img_ids`, `video_coords`, `image_rotary_emb`, ...
POSITIONS = re.compile(r"(ids|coords|indices|pos|rotary_emb|freqs_cis|sizes?|shapes?|lens)$")
#: Names of tensors of whole numbers that every model reads for each sample.
OF_SAMPLES = re.compile(r"mask|token|input_ids|labels")


def samples(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The number of samples in a transformer call, by its first argument; 0 if that has none."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(first, torch.Tensor):
        return len(first) if first.dim() else 0
    return len(first) if isinstance(first, (list, tuple)) else 0


@dataclass(frozen=True)
class Joined:
    """One batched call, made of several.

    Attributes:
        args, kwargs: its arguments.
        counts: the number of samples of each call.
        texts: the length of each call's text, if the texts were padded to the longest one; empty if not.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    counts: tuple[int, ...]
    texts: tuple[int, ...] = ()

    def rows(self, call: int) -> slice:
        """The samples of one call."""
        start = sum(self.counts[:call])
        return slice(start, start + self.counts[call])


class Merger:
    """Decides which calls of one transformer fit together, and joins them.

    Args:
        names: the names of the forward's arguments, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._texts = {name for name in names if f"{name}_mask" in names}

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def form(self, given: Mapping[str, Any], count: int, same: Same, padded: bool = True) -> Hashable:
        """What must be equal in two calls for them to be joined.

        Args:
            given: the arguments by name.
            count: the number of samples.
            same: gives equal tensors the same key.
            padded: whether texts of unequal length may be joined.
        """
        parts: list[Hashable] = []
        for name, value in given.items():
            owner = name.removesuffix("_mask")
            if padded and owner in self._texts and isinstance(given.get(owner), torch.Tensor):
                text = given[owner]
                if text.dim() == 3 and len(text) == count:
                    parts.append((name, "text", text.shape[2], text.dtype, text.device))
                    continue
            parts.append((name, _form(value, count, same, padded, name)))
        return tuple(parts)

    def lengths(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """The lengths of the texts of a call: those that `join` pads, and those that the model pads itself."""
        own = [given[name].shape[1] for name in sorted(self._texts) if getattr(given.get(name), "ndim", 0) == 3]
        return *own, *self.unpadded(given)

    def unpadded(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """The lengths of the texts in lists of samples, which the model pads itself."""
        lists = [value for value in given.values() if isinstance(value, list)]
        return tuple(len(one) for value in lists for one in value if isinstance(one, torch.Tensor) and one.dim() == 2)

    def structure(self, given: Mapping[str, Any], count: int) -> Hashable:
        """How the arguments of a call are joined, whatever their sizes. (Whether texts were padded is not known.)"""
        return tuple((name, _kind(value, count)) for name, value in given.items())

    def join(self, calls: Sequence[tuple[Mapping[str, Any], int]]) -> Joined:
        """Join calls of equal form, each given as its arguments by name and its number of samples."""
        counts = tuple(count for _, count in calls)
        givens = [dict(given) for given, _ in calls]
        lengths: tuple[int, ...] = ()
        for name in self._texts & givens[0].keys():
            texts = [given[name] for given in givens]
            if all(isinstance(text, torch.Tensor) for text in texts) and len({text.shape[1] for text in texts}) > 1:
                lengths = tuple(text.shape[1] for text in texts)
                for given in givens:
                    given[name], given[f"{name}_mask"] = _padded(given[name], given.get(f"{name}_mask"), max(lengths))
            masks = [given.get(f"{name}_mask") for given in givens]
            if any(mask is not None for mask in masks) and any(mask is None for mask in masks):
                like = next(mask for mask in masks if mask is not None)
                for given in givens:
                    if given.get(f"{name}_mask") is None:
                        given[f"{name}_mask"] = like.new_ones(given[name].shape[:2])
        kwargs = {name: _join([given.get(name) for given in givens], counts) for name in givens[0]}
        kwargs |= {name: _join([given[name] for given in givens], counts) for name in givens[-1].keys() - kwargs.keys()}
        return Joined((), kwargs, counts, lengths)


def _padded(text: torch.Tensor, mask: torch.Tensor | None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    further = length - text.shape[1]
    pad = torch.nn.functional.pad
    return pad(text, (0, 0, 0, further)), pad(mask, (0, further))


def _kind(value: Any, count: int) -> Hashable:
    """How one argument is joined."""
    if isinstance(value, torch.Tensor):
        return "level" if not value.dim() else "rows" if len(value) == count else "same"
    if isinstance(value, list):
        if value and all(isinstance(one, torch.Tensor) and one.dim() and len(one) == count for one in value):
            return ("parts", len(value))
        return "each" if len(value) == count else "same"
    if isinstance(value, tuple) and any(isinstance(one, torch.Tensor) for one in value):
        return ("tuple", *(_kind(one, count) for one in value))
    if type(value) is dict:
        return ("dict", *((key, _kind(one, count)) for key, one in value.items()))
    return value if value is None or isinstance(value, (bool, str)) else "same"


def _form(value: Any, count: int, same: Same, padded: bool, name: str = "") -> Hashable:
    kind = _kind(value, count)
    if isinstance(value, torch.Tensor):
        if kind == "same":
            return "same", same(value, False)
        equal = same(value, True) if kind == "rows" and _places(name, value) else None
        return kind, value.shape[1:], value.dtype, value.device, equal
    if kind == "each":
        entries = [_element(one, padded) for one in value]
        alike = padded and all(one == entries[0] for one in entries)
        return "each", *(entries[:1] if alike else entries)
    if isinstance(kind, tuple):
        parts = value.items() if type(value) is dict else enumerate(value)
        own = (lambda key: str(key)) if type(value) is dict else (lambda key: name)
        return kind[0], *((key, _form(one, count, same, padded, own(key))) for key, one in parts)
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *(_form(one, 0, same, padded) for one in value)
    return _plain(value)


def _places(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor with an entry for each sample says where tokens are."""
    if POSITIONS.search(name) and not OF_SAMPLES.search(name):
        return True
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return whole and value.dim() > 1 and not OF_SAMPLES.search(name)


def _element(value: Any, padded: bool) -> Hashable:
    """An entry of a list of samples. Tensors must agree in shape, texts but for their length; all else in value."""
    if isinstance(value, torch.Tensor):
        return value.shape[1:] if padded and value.dim() == 2 else value.shape, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *(_element(one, padded) for one in value)
    return _plain(value)


def _plain(value: Any) -> Hashable:
    return ("value", type(value), value) if isinstance(value, (bool, int, float, str)) or value is None else id(value)


def _join(values: Sequence[Any], counts: Sequence[int]) -> Any:
    value, kind = values[0], _kind(values[0], counts[0])
    if kind == "level":
        return torch.cat([one.expand(count) for one, count in zip(values, counts, strict=True)])
    if kind == "rows":
        return torch.cat(list(values))
    if kind == "each":
        return [one for each in values for one in each]
    if isinstance(kind, tuple):
        if type(value) is dict:
            return {key: _join([one[key] for one in values], counts) for key in value}
        return type(value)(_join(each, counts) for each in zip(*values, strict=True))
    return value


def cuts(joined: Any, alone: Any, total: int, count: int) -> Any:
    """How the result of a batched call is split, from such a result and that of one of its calls, made alone.

    Args:
        joined, alone: the two results.
        total, count: the number of samples in each.

    Raises:
        ValueError: it has a part whose samples cannot be told apart.
    """
    if isinstance(joined, torch.Tensor):
        if not joined.dim() or (len(joined), len(alone)) != (total, count):
            raise ValueError(f"the result has a tensor of shape {tuple(joined.shape)}, and the batch {total} samples")
        return "rows"
    if isinstance(joined, list) and (len(joined), len(alone)) == (total, count):
        return "each"
    if isinstance(joined, Mapping):
        return {key: cuts(one, alone[key], total, count) for key, one in joined.items()}
    if isinstance(joined, (tuple, list)):
        return [cuts(one, other, total, count) for one, other in zip(joined, alone, strict=True)]
    if joined is not None and not isinstance(joined, (bool, int, float, str)):
        raise ValueError(f"the result has a {type(joined).__name__}, which cannot be split")
    return None


def split(output: Any, how: Any, counts: Sequence[int]) -> list[Any]:
    """The results of the calls, from the result of the batched call; `how` is from `cuts`."""
    if how == "rows":
        return list(output.split(list(counts)))
    if how == "each":
        starts = [sum(counts[:place]) for place in range(len(counts))]
        return [output[start : start + count] for start, count in zip(starts, counts, strict=True)]
    if isinstance(output, Mapping):
        parts = {key: split(one, how[key], counts) for key, one in output.items()}
        return [type(output)(**{key: one[place] for key, one in parts.items()}) for place in range(len(counts))]
    if isinstance(output, (tuple, list)):
        each = [split(one, part, counts) for one, part in zip(output, how, strict=True)]
        made = [[one[place] for one in each] for place in range(len(counts))]
        return [type(output)(*one) if hasattr(output, "_fields") else type(output)(one) for one in made]
    return [output] * len(counts)
