"""Signals: what is watched to tell whether a step resembles an earlier one.

A signal turns the input of the first skippable block into one tensor to remember, and, given the remembered one, into
each sample's [Σ|now − then|, Σ|then|]. `every_step` says when the new tensor replaces the remembered one: at every step
(distances run from step to step) or only at computed steps (distances run to the last computed step).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

from omni_runtime.cache.models import Arguments, Grid, Modulation


class Signal(Protocol):
    """See the module's docstring."""

    every_step: bool

    def observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor of this step, [B, S', D], and the sums fp32 [B, 2]: meaningless where nothing was remembered.

        Args:
            block: the first skippable block, whose call is under way.
            arguments: its arguments by name.
            hidden: the noise among its hidden states, [B, S', D].
            entered: the same of the hidden states that entered block 0; the same tensor where block 0 is this block.
            remembered: the tensor of an earlier step, or None.
            using: the ops for such tensors, by name.
        """


@runtime_checkable
class SituatedSignal(Signal, Protocol):
    """A signal that looks at more than block 0: each branch of a request has one of its own."""

    def fresh(self) -> SituatedSignal:
        """One for a branch."""

    def situate(self, sigma: float, arguments: Arguments) -> None:
        """A forward begins, at the noise level σ, with these arguments of the transformer."""


class FirstBlocksResidual:
    """What the first Fn blocks add to the hidden states (DBCache; with Fn = 1, first-block cache)."""

    every_step = False

    def observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Signal.observe`."""
        return using.residual_relative_l1(hidden, entered, remembered)


class ModulatedInput:
    """Block 0's normed and modulated input (TeaCache)."""

    every_step = True

    def __init__(self, modulation: Callable[[torch.nn.Module, Arguments], Modulation]) -> None:
        self._modulation = modulation

    def observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Signal.observe`."""
        how = self._modulation(block, arguments)
        return using.modulated_relative_l1(
            hidden, how.scale, how.shift, remembered, norm=how.norm, weight=how.weight, eps=how.eps
        )


class FilteredModulatedInput:
    """Block 0's modulated input through a Wiener filter for the step's noise level (SeaCache, arXiv:2602.18993).

    x_σ = (1 − σ) signal + σ noise, along each axis of the tokens' grid a signal of power S = 1 / (|f|^p + 1e-16) at
    frequency f, in cycles per token: the gain is g = (1 − σ) S / ((1 − σ)² S + σ² + 1e-16), and that of several axes
    their product, divided by its mean. σ is held within [1e-6, 1 − 1e-6], where the gain is defined. In fp32; what is
    remembered has the grid's shape [B, F, H, W, D].
    """

    every_step = True

    def __init__(
        self,
        modulation: Callable[[torch.nn.Module, Arguments], Modulation],
        noise_grid: Callable[[Arguments], Grid],
        power: float,
    ) -> None:
        self._modulated = ModulatedInput(modulation)
        self._noise_grid = noise_grid
        self._power = power
        self._sigma = 1.0
        self._forward: Arguments = {}

    def fresh(self) -> FilteredModulatedInput:
        """See `SituatedSignal.fresh`."""
        return copy.copy(self)

    def situate(self, sigma: float, arguments: Arguments) -> None:
        """See `SituatedSignal.situate`."""
        self._sigma, self._forward = sigma, arguments

    def observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Signal.observe`."""
        modulated, _ = self._modulated.observe(block, arguments, hidden, entered, None, using)
        # The grid of a request is the same at all steps, and for FLUX it takes a transfer to learn.
        grid = self._noise_grid(self._forward) if remembered is None else remembered.shape[1:4]
        self._forward = {}  # nothing of a forward is held beyond it
        tokens = math.prod(grid)
        if tokens > modulated.shape[1]:
            raise ValueError(f"there are {modulated.shape[1]} tokens, and a grid of {'×'.join(map(str, grid))}")
        B, _, D = modulated.shape
        now = wiener(modulated[:, :tokens].reshape(B, *grid, D), self._sigma, self._power)
        return now, using.relative_l1(now, now if remembered is None else remembered)


def wiener(x: torch.Tensor, sigma: float, power: float) -> torch.Tensor:
    """x, [B, F, H, W, D], filtered along F, H and W, in fp32: see `FilteredModulatedInput`."""
    sigma = min(max(sigma, 1e-6), 1.0 - 1e-6)
    spectrum = torch.fft.rfftn(x.float(), dim=(1, 2, 3))
    for axis in (1, 2, 3):
        frequencies = torch.fft.fftfreq(x.shape[axis], device=x.device).abs()
        signal = 1.0 / (frequencies**power + 1e-16)
        gain = (1.0 - sigma) * signal / ((1.0 - sigma) ** 2 * signal + sigma**2 + 1e-16)
        gain /= gain.mean()  # over a grid, the mean of the product is the product of the means
        kept = spectrum.shape[axis]  # of real numbers the last axis has half a spectrum
        spectrum *= gain[:kept].view([kept if d == axis else 1 for d in range(5)])
    return torch.fft.irfftn(spectrum, s=x.shape[1:4], dim=(1, 2, 3))


class Nothing:
    """For gates that measure nothing."""

    every_step = False

    def observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[Any, Any]:
        """Nothing to remember."""
        return None, None
