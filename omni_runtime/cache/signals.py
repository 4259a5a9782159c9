"""Signals: what is watched to tell whether a step resembles an earlier one.

A signal turns the input of the first skippable block into one tensor to remember, and, given the remembered one, into
each sample's [Σ|now − then|, Σ|then|]. `every_step` says when the new tensor replaces the remembered one: at every step
(distances run from step to step) or only at computed steps (distances run to the last computed step).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from omni_runtime.cache.models import Arguments, Modulation


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
