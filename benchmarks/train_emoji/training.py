"""The training loop that both stages share: warm-up, constant rate, final decay, EMA, and checkpoints that resume
exactly.

All random numbers of step n come from generators seeded with n. So a checkpoint needs no generator state, and an
interrupted run ends with the same bits as an uninterrupted one. The rate stays constant until the last quarter of the
budget, and then falls to zero (warm-up, stable, decay), so a run can be continued with more minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Budget", "Fit", "fit", "load_ema", "save"]

WARMUP_STEPS = 200
DECAY_SHARE = 0.25
LOG_STEPS = 50


@dataclass(frozen=True)
class Budget:
    """How long to train: minutes of training time over all runs together, or a number of steps."""

    minutes: float | None = None
    steps: int | None = None

    def progress(self, seconds: float, step: int) -> float:
        """The used share of the budget; may exceed 1."""
        if self.steps is not None:
            return step / self.steps
        return seconds / (60 * self.minutes) if self.minutes else 1.0


@dataclass
class Fit:
    """The state of training: EMA weights in parameter order, steps, samples and seconds so far, recent mean loss."""

    ema: list[torch.Tensor]
    step: int
    samples: int
    seconds: float
    loss: float


def rate_scale(progress: float, step: int) -> float:
    """The learning rate as a share of the stable phase's rate."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, max(0.0, 1.0 - progress) / DECAY_SHARE)
    return warmup * decay


def fit(
    parameters: list[torch.nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    loss_of_step: Callable[[int], torch.Tensor],
    checkpoint: Path,
    budget: Budget,
    batch: int,
    ema_decay: float,
    checkpoint_minutes: float = 2.0,
) -> Fit:
    """Train `parameters` until the budget is used up. Continues from `checkpoint` if it exists.

    Args:
        parameters: the trained parameters in a fixed order; afterwards they have the raw (not EMA) weights.
        optimizers: together they have all parameters; each group's rate is that of the stable phase.
        loss_of_step: step number to scalar loss; must draw all randomness from the step number.
        checkpoint: file of the last state; written every `checkpoint_minutes` and at the end.
        budget: minutes or steps over all runs together.
        batch: samples per step, only to count them.
        ema_decay: decay per step; in early steps it is (1 + n) / (10 + n).
        checkpoint_minutes: minutes between two checkpoints.
    """
    peak_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    state = Fit([p.detach().clone() for p in parameters], 0, 0, 0.0, float("nan"))
    if checkpoint.exists():
        state = _load(checkpoint, parameters, optimizers)
        print(f"{checkpoint.stem}: resuming at step {state.step}, {state.seconds / 60:.1f} min", flush=True)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before, first_step = state.seconds, state.step
    started = time.perf_counter()
    saved_at = state.seconds
    logged_at, logged_step = started, state.step
    while (progress := budget.progress(state.seconds, state.step)) < 1.0:
        scale = rate_scale(progress, state.step)
        for group, peak_rate in zip(groups, peak_rates, strict=True):
            group["lr"] = peak_rate * scale
        for parameter in parameters:
            parameter.grad = None
        loss = loss_of_step(state.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        state.step += 1
        state.samples += batch
        decay = min(ema_decay, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(state.ema, [p.detach() for p in parameters], 1.0 - decay)
        value = loss.item()
        state.loss = value if state.loss != state.loss else 0.98 * state.loss + 0.02 * value
        state.seconds = before + time.perf_counter() - started
        if state.step % LOG_STEPS == 0:
            now = time.perf_counter()
            rate = (state.step - logged_step) / (now - logged_at)
            print(
                f"{checkpoint.stem}: step {state.step} {state.seconds / 60:.1f} min loss {state.loss:.4f} "
                f"rate x{scale:.2f} {rate:.2f} steps/s",
                flush=True,
            )
            logged_at, logged_step = now, state.step
        if state.seconds - saved_at > 60 * checkpoint_minutes:
            _save(checkpoint, parameters, optimizers, state)
            saved_at = state.seconds
    if state.step > first_step:
        _save(checkpoint, parameters, optimizers, state)
    return state


def _load(checkpoint: Path, parameters: list[torch.nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> Fit:
    """Load a checkpoint's weights and optimizer states (None: they start anew), and return the rest of it."""
    saved = torch.load(checkpoint, map_location=parameters[0].device)
    with torch.no_grad():
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.copy_(value)
    if saved["optimizers"] is not None:
        for optimizer, value in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(value)
    return Fit(saved["ema"], saved["step"], saved["samples"], saved["seconds"], saved["loss"])


def _save(
    checkpoint: Path, parameters: list[torch.nn.Parameter], optimizers: list[torch.optim.Optimizer], state: Fit
) -> None:
    """Write everything that a later run needs to resume."""
    save(
        {
            "parameters": [p.detach() for p in parameters],
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "ema": state.ema,
            "step": state.step,
            "samples": state.samples,
            "seconds": state.seconds,
            "loss": state.loss,
        },
        checkpoint,
    )


def save(content: dict[str, object], file: Path) -> None:
    """Write a file for torch.load; if interrupted, the old file stays complete."""
    temporary = file.with_suffix(".part")
    torch.save(content, temporary)
    temporary.replace(file)


@torch.no_grad()
def load_ema(parameters: list[torch.nn.Parameter], checkpoint: Path) -> dict[str, float]:
    """Load a checkpoint's EMA weights into `parameters`; return their training steps, samples and minutes."""
    saved = torch.load(checkpoint, map_location="cpu")
    for parameter, value in zip(parameters, saved["ema"], strict=True):
        parameter.copy_(value)
    return {"steps": saved["step"], "samples": saved["samples"], "minutes": round(saved["seconds"] / 60, 1)}
