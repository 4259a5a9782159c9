"""Signals: what is watched to tell whether a step resembles an earlier one.

A signal computes one tensor from the input of the first skippable block. From this tensor and one remembered from an
earlier step, it computes each sample's [Σ|now − then|, Σ|then|]. If `every_step` is set, the new tensor is remembered
at every step, and distances are relative to the step before. Otherwise it is remembered only at computed steps, and
distances are relative to the last computed step. `noise_only` matters if some tokens are of images that are given
(references, or a video's first frame): it says whether only the noise tokens are watched, or all of them. DBCache and
first-block cache watch all of them, like the libraries that their thresholds come from.

If whole steps are skipped, there is no block to watch. Then `ExpectedChange` uses the scheduler's latents and model
outputs.
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
    """What is watched; see the module's docstring.

    Attributes:
        reads_weights: whether `observe` reads weights of block 0.
    """

    every_step = False
    noise_only = True
    reads_weights = False

    def fresh(self, shard: Shard | None) -> Signal:
        """A signal for one branch of a request.

        Args:
            shard: this rank's part of the sequence; None if this rank has all of it.
        """
        return self

    def situate(self, sigma: float, arguments: Arguments) -> None:
        """Called when a forward begins, with the noise level σ and the transformer's arguments by name."""

    def observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        noise: slice | None,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[Any, Any]:
        """Compute the tensor of this step, and its distance to the remembered one.

        Args:
            block: the block whose call is under way: the first skippable one, or the one before it.
            arguments: the arguments of that call by name.
            hidden: the watched tokens of the hidden states that enter the first skippable block, [B, S', D].
            entered: the same tokens of the hidden states that entered block 0; the same tensor as `hidden` if block 0
                is the first skippable block.
            noise: the place of these tokens among this rank's tokens; None if they are all of them.
            remembered: the tensor of an earlier step, or None.
            using: the namespace of the ops.

        Returns:
            The tensor of this step, [B, S', D], and the sums, fp32 [B, 2]. The sums mean nothing if `remembered` is
            None.
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
        noise: slice | None,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Signal.observe`."""
        return using.residual_relative_l1(hidden, entered, remembered)


class ModulatedInput(Signal):
    """Block 0's normalised and modulated input (TeaCache)."""

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
        noise: slice | None,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Signal.observe`."""
        how = self._modulation(block, arguments)
        if noise is not None:
            how = how.of_tokens(noise)
        return using.modulated_relative_l1(
            hidden, how.scale, how.shift, remembered, norm=how.norm, weight=how.weight, eps=how.eps
        )


class FilteredModulatedInput(Signal):
    """Block 0's modulated input after a Wiener filter for the step's noise level (SeaCache, arXiv:2602.18993).

    The model is x_σ = (1 − σ) signal + σ noise. Along each axis of the tokens' grid, the signal has the power
    S = 1 / (|f|^p + 1e-16) at frequency f, in cycles per token. The gain is g = (1 − σ) S / ((1 − σ)² S + σ² + 1e-16).
    For several axes it is the product of their gains, divided by its mean. σ is limited to [1e-6, 1 − 1e-6], where the
    gain is defined. Computed in fp32. The remembered tensor has the grid's shape [B, F, H, W, D]. If ranks share the
    tokens, each rank remembers a part of the channels.
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
        noise: slice | None,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Signal.observe`."""
        modulated, _ = self._modulated.observe(block, arguments, hidden, entered, noise, None, using)
        there = modulated.shape[1] if self._shard is None else self._shard.watched
        # The grid is the same at all steps of a request, and for FLUX, finding it takes a transfer to the host.
        if remembered is None:
            frames, height, width = self._noise_grid(self._forward)
            if noise is not None:  # without the frames that are given
                frames = min(frames, there // (height * width))
            grid: Grid = frames, height, width
        else:
            grid = remembered.shape[1], remembered.shape[2], remembered.shape[3]
        self._forward = {}  # keep no tensors beyond the forward
        tokens = math.prod(grid)
        if tokens > there:
            raise ValueError(f"there are {there} tokens, and a grid of {'×'.join(map(str, grid))}")
        # The filter needs all tokens of a channel, but treats each channel separately.
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
        kept = spectrum.shape[axis]  # the last axis has only half of the spectrum, because x is real
        spectrum *= gain[:kept].view([kept if d == axis else 1 for d in range(5)])
    return torch.fft.irfftn(spectrum, s=x.shape[1:4], dim=(1, 2, 3))


class Nothing(Signal):
    """No signal, for gates that measure nothing."""

    def observe(
        self,
        block: torch.nn.Module,
        arguments: Arguments,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        noise: slice | None,
        remembered: torch.Tensor | None,
        using: Any,
    ) -> tuple[Any, Any]:
        """Nothing to remember."""
        return None, None


class ExpectedChange:
    """The expected change of the model output, computed from the change of the latents (EasyCache).

    Zhou et al. 2025, arXiv:2507.02860, in the form of the authors' code (H-EmbodVis/EasyCache, EasyCache4Wan2.1). The
    last two computed steps give the rate at which the output changes with the latents x: k = Σ|Δout| / Σ|Δx|. From one
    step to the next, computed or not, the output is expected to change by k Σ|x − x_prev|. This is compared with
    Σ|out| of the last computed step.

    The authors use the input and output of the conditional branch, and the mean over the batch. Here x and out are
    those of the scheduler (unscaled, guided, with its sign), and each sample has its own sums.
    """

    def __init__(self) -> None:
        self._latents: torch.Tensor | None = None
        self._computed: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rate: torch.Tensor | None = None
        self._magnitude: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held between steps."""
        held = (self._latents, *(self._computed or ()), self._rate, self._magnitude)
        return list({id(t): t for t in held if t is not None}.values())

    def observe(self, latents: torch.Tensor) -> torch.Tensor | None:
        """The expected change since the step before.

        Args:
            latents: the latents with which the step begins, [B, ...].

        Returns:
            Each sample's [k Σ|x − x_prev|, Σ|out|], fp32 [B, 2]; None until two steps were computed on latents of the
            same shape.
        """
        then, rate, magnitude = self._latents, self._rate, self._magnitude
        if then is None or rate is None or magnitude is None or then.shape != latents.shape:
            return None
        return torch.stack((rate * ops.relative_l1(latents, then)[:, 0], magnitude), 1)

    def leave(self, latents: torch.Tensor, output: torch.Tensor | None) -> None:
        """Record a step.

        Args:
            latents: the latents with which the step began.
            output: the computed model output; None if the step was skipped.
        """
        self._latents = latents
        if output is None:
            return
        before, self._rate, self._magnitude = self._computed, None, None
        if before is not None and before[0].shape == latents.shape and before[1].shape == output.shape:
            changed = ops.relative_l1(before[1], output)
            self._rate = changed[:, 0] / ops.relative_l1(latents, before[0])[:, 0]
            self._magnitude = changed[:, 1]
        # A copy, because without guidance this is the transformer's own output, whose memory a CUDA graph overwrites.
        self._computed = latents, output.clone()
