"""Stretches: where a model joins streams between two block lists, what comes after is a site of its own.

Within a stretch the same streams go from block to block. What the blocks of each stretch add is recorded and forecast
separately; whether they are skipped is one decision for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from omni_runtime.cache.blocks import States
from omni_runtime.cache.forecasters import Forecaster, make_forecaster
from omni_runtime.cache.history import History, history_of


class Stretch(NamedTuple):
    """Blocks [first, last) that the same streams go through.

    Attributes:
        encoder: whether the text stream that leaves it is used.
    """

    first: int
    last: int
    encoder: bool


def clipped(stretches: Sequence[Stretch], first: int, last: int) -> list[Stretch]:
    """The parts of the stretches that lie in [first, last), without empty ones."""
    parts = []
    for one in stretches:
        begin, end = max(one.first, first), min(one.last, last)
        if begin < end:
            parts.append(Stretch(begin, end, one.encoder or end < one.last))
    return parts


def versions_of(states: States) -> tuple[int, ...] | None:
    """How often the states were changed in place; None for inference tensors, which do not count it."""
    tensors = [one for one in states if one is not None]
    return None if any(one.is_inference() for one in tensors) else tuple(one._version for one in tensors)


class Shape(History):
    """In the place of a history where nothing is forecast: it keeps the shape of the last computed step."""

    def __init__(self) -> None:
        super().__init__(make_forecaster("reuse"))

    def record(self, after: torch.Tensor, before: torch.Tensor | None, position: float) -> None:
        """See `History.record`."""
        self.shape = after.shape


class Later:
    """What is kept of a site behind a place where the model joins streams.

    Attributes:
        base, versions: what entered its first block in the forward under way, and how often that was changed.
        recorded: whether the forward under way was recorded.
    """

    def __init__(self, stretch: Stretch, forecaster: Forecaster, add: Any) -> None:
        self.first, self.last = stretch.first, stretch.last
        self._hidden = history_of(forecaster, add=add)
        self._encoder = history_of(forecaster, add=add) if stretch.encoder else None
        self.base: Any = None
        self.versions: Any = None
        self.recorded = False

    def begin(self) -> None:
        """A forward begins."""
        self.base, self.recorded = None, False

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held between forwards."""
        return self._hidden.tensors() + (self._encoder.tensors() if self._encoder else [])

    def clear(self) -> None:
        """Drop all of it."""
        self.base = None
        self._hidden.clear()
        if self._encoder is not None:
            self._encoder.clear()

    def record(self, states: States, base: States, position: float) -> None:
        """Record what its blocks have made of `base`."""
        self.recorded = True
        self._hidden.record(states[0], base[0], position)
        if self._encoder is not None and states[1] is not None:
            self._encoder.record(states[1], base[1], position)

    def forecast(self, base: States, position: float) -> States:
        """The forecast of what its blocks would make of `base`.

        Raises:
            RuntimeError: it has another shape than in the last computed step.
        """
        hidden, encoder = base
        if hidden.shape != self._hidden.shape:
            raise RuntimeError(
                f"block {self.first} was called with hidden states of shape {tuple(hidden.shape)}, and of "
                f"{self._hidden.shape and tuple(self._hidden.shape)} in the last computed step"
            )
        if self._encoder is not None and encoder is not None:
            encoder = self._encoder.forecast(encoder, position)
        return self._hidden.forecast(hidden, position), encoder
