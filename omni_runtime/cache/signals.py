"""Signals: what is watched to tell whether a step resembles an earlier one.

A signal turns the input of the first skippable block into one tensor to remember, and, given the remembered one, into
each sample's [Σ|now − then|, Σ|then|]. `every_step` says when the new tensor replaces the remembered one: at every step
(distances run from step to step) or only at computed steps (distances run to the last computed step). `noise_only` says
whose hidden states are watched where reference images stand behind the noise: the noise's alone, or all. DBCache and
first-block cache go by all of them, as the libraries that their thresholds come from do.

Where whole steps are skipped there is no block to watch: `ExpectedChange` goes by what scheduler and model exchange.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from omni_kernels import ops
from omni_runtime.cache.models import Arguments, Grid, Modulation
from omni_runtime.cache.ranks import Shard


class Signal:
    """See the module's docstring.

    Attributes:
        reads_weights: whether weights of block 0 are read to observe.
    """

    every_step = False
    noise_only = True
    reads_weights = False

    def fresh(self, shard: Shard | None) -> Signal:
        """One for a branch of a request, whose states are this shard of a sequence; None where they are whole."""
        return self

    def situate(self, sigma: float, arguments: Arguments) -> None:
        """A forward begins, at the noise level σ, with these arguments of the transformer."""

    def observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[Any, Any]:
        """The tensor of this step, [B, S', D], and the sums fp32 [B, 2]: meaningless where nothing was remembered.

        Args:
            block: the first skippable block, whose call is under way.
            arguments: its arguments by name.
            hidden: what is watched of its hidden states, [B, S', D].
            entered: the same of the hidden states that entered block 0; the same tensor where block 0 is this block.
            remembered: the tensor of an earlier step, or None.
            using: the ops for such tensors, by name.
        """
        raise NotImplementedError


class FirstBlocksResidual(Signal):
    """What the first Fn blocks add to the hidden states (DBCache; with Fn = 1, first-block cache)."""

    noise_only = False

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


class ModulatedInput(Signal):
    """Block 0's normed and modulated input (TeaCache)."""

    every_step = True
    reads_weights = True

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


class FilteredModulatedInput(Signal):
    """Block 0's modulated input through a Wiener filter for the step's noise level (SeaCache, arXiv:2602.18993).

    x_σ = (1 − σ) signal + σ noise, along each axis of the tokens' grid a signal of power S = 1 / (|f|^p + 1e-16) at
    frequency f, in cycles per token: the gain is g = (1 − σ) S / ((1 − σ)² S + σ² + 1e-16), and that of several axes
    their product, divided by its mean. σ is held within [1e-6, 1 − 1e-6], where the gain is defined. In fp32; what is
    remembered has the grid's shape [B, F, H, W, D]; where ranks share the tokens, each remembers some of the channels.
    """

    every_step = True
    reads_weights = True

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
        self._shard: Shard | None = None

    def fresh(self, shard: Shard | None) -> FilteredModulatedInput:
        """See `Signal.fresh`."""
        one = copy.copy(self)
        one._shard = shard
        return one

    def situate(self, sigma: float, arguments: Arguments) -> None:
        """See `Signal.situate`."""
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
        tokens, there = math.prod(grid), modulated.shape[1] if self._shard is None else self._shard.watched
        if tokens > there:
            raise ValueError(f"there are {there} tokens, and a grid of {'×'.join(map(str, grid))}")
        # A filter over the grid needs all tokens, but one channel at a time.
        modulated = modulated[:, :tokens] if self._shard is None else self._shard.by_channels(modulated, tokens)
        B, _, D = modulated.shape
        now = wiener(modulated.reshape(B, *grid, D), self._sigma, self._power)
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


class Nothing(Signal):
    """For gates that measure nothing."""

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


class ExpectedChange:
    """How much the model output is expected to have changed, from how much the latents have (EasyCache).

    Zhou et al. 2025, arXiv:2507.02860, in the form of the authors' code (H-EmbodVis/EasyCache, EasyCache4Wan2.1). The
    last two computed steps tell how much the output changes with the latents x: k = Σ|Δout| / Σ|Δx|. From one step to
    the next, computed or not, it is then expected to change by k Σ|x − x_prev|, to be seen against Σ|out| of the last
    computed step. Unlike the authors', who take the conditional branch's input and output and the mean over the batch:
    x and out are those of the scheduler (unscaled, guided, with its sign), and each sample has sums of its own.
    """

    def __init__(self) -> None:
        self._latents: torch.Tensor | None = None
        self._computed: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rate: torch.Tensor | None = None
        self._magnitude: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is held between steps."""
        held = (self._latents, *(self._computed or ()), self._rate, self._magnitude)
        return list({id(t): t for t in held if t is not None}.values())

    def observe(self, latents: torch.Tensor) -> torch.Tensor | None:
        """What is expected since the step before, where a step begins with these latents, [B, ...].

        Returns:
            Each sample's [k Σ|x − x_prev|, Σ|out|], fp32 [B, 2]; None before two steps were computed on latents of
            one shape.
        """
        then, rate, magnitude = self._latents, self._rate, self._magnitude
        if then is None or rate is None or magnitude is None or then.shape != latents.shape:
            return None
        return torch.stack((rate * ops.relative_l1(latents, then)[:, 0], magnitude), 1)

    def leave(self, latents: torch.Tensor, output: torch.Tensor | None) -> None:
        """A step ends that began with these latents; `output` is what was computed, None where nothing was."""
        self._latents = latents
        if output is None:
            return
        before, self._rate, self._magnitude = self._computed, None, None
        if before is not None and before[0].shape == latents.shape and before[1].shape == output.shape:
            changed = ops.relative_l1(before[1], output)
            self._rate = changed[:, 0] / ops.relative_l1(latents, before[0])[:, 0]
            self._magnitude = changed[:, 1]
        # A copy: without guidance it is the transformer's own, whose memory a captured graph writes again.
        self._computed = latents, output.clone()
