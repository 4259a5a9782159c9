"""What a cache of whole steps has to know about a scheduler.

With most schedulers, one step's model output predicts that of the next, and is what is cached. A scheduler that draws
new noise at each step moves the latents in a way that no earlier output predicts. What carries over there is the clean
latents that it predicts, x0 = a·latents + b·output, with numbers a and b for each step (`clean_latents`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from omni_kernels.patching.backends import nearest

#: Schedulers that evaluate the model once per step, on the latents that they returned: class → attribute used for `σ`.
#: (`steps_along` says which of them a `Corrector` works with.)
SCHEDULERS: dict[str, str] = {
    "FlowMatchEulerDiscreteScheduler": "sigmas",
    "UniPCMultistepScheduler": "sigmas",
    "DPMSolverMultistepScheduler": "sigmas",
    "EulerDiscreteScheduler": "sigmas",
    "FlowMapEulerDiscreteScheduler": "sigmas",
    "EDMEulerScheduler": "sigmas",
    "EDMDPMSolverMultistepScheduler": "sigmas",
    "DEISMultistepScheduler": "sigmas",
    "HeliosScheduler": "sigmas",
    "DDIMScheduler": "timesteps",
    "CogVideoXDDIMScheduler": "timesteps",
}
#: Schedulers that replace the noise in the latents with fresh noise at each step, whatever their settings.
NOISY = {
    "CogVideoXDPMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosDMDScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "LTXEulerAncestralRFScheduler",
    "SCMScheduler",
    "TCDScheduler",
}

#: Pipelines that take each step of their scheduler twice: first for the clean latents of each CFG branch, then with
#: what guidance makes of these. The latents do not move along the output of the first.
STEP_TWICE = {"CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"}

#: (a, b); None where the latents are noise alone, and the model predicts that noise.
Numbers = tuple[float, float] | None


def _of_alpha(alpha: float, sigma: float, predicts: str) -> Numbers:
    """(a, b) for latents alpha·x0 + sigma·noise."""
    if predicts == "epsilon":
        return (1.0 / alpha, -sigma / alpha) if alpha else None
    return (alpha, -sigma) if predicts == "v_prediction" else (0.0, 1.0)


def _by_timestep(scheduler: Any, timestep: float) -> Numbers:
    product = float(scheduler.alphas_cumprod[round(timestep)])
    return _of_alpha(math.sqrt(product), math.sqrt(1.0 - product), scheduler.config.prediction_type)


def _by_sigma(scheduler: Any, sigma: float) -> Numbers:
    """For latents x0 + sigma·noise, which the model sees divided by sqrt(sigma² + 1)."""
    scale = math.sqrt(sigma * sigma + 1.0)
    found = _of_alpha(1.0 / scale, sigma / scale, scheduler.config.prediction_type)
    return found and (found[0] / scale, found[1])


def _by_flow(scheduler: Any, sigma: float) -> Numbers:
    """For latents (1 − sigma)·x0 + sigma·noise, and a model that predicts noise − x0."""
    return 1.0, -sigma


def _by_angle(scheduler: Any, angle: float) -> Numbers:
    """For latents cos(angle)·x0 + sin(angle)·noise, and a model that predicts cos(angle)·noise − sin(angle)·x0."""
    return math.cos(angle), -math.sin(angle)


def _by_solver(scheduler: Any, sigma: float) -> Numbers:
    if scheduler.config.prediction_type == "flow_prediction":
        return _by_flow(scheduler, sigma)
    if scheduler.config.use_flow_sigmas:
        return _of_alpha(1.0 - sigma, sigma, scheduler.config.prediction_type)
    scale = math.sqrt(sigma * sigma + 1.0)
    return _of_alpha(1.0 / scale, sigma / scale, scheduler.config.prediction_type)


#: Schedulers that draw new noise at each step (those of `SCHEDULERS` with some settings), and of which it is known how
#: they predict the clean latents.
CLEAN: dict[str, Callable[[Any, float], Numbers]] = {
    "CogVideoXDPMScheduler": _by_timestep,
    "DDPMScheduler": _by_timestep,
    "DPMSolverMultistepScheduler": _by_solver,
    "EulerAncestralDiscreteScheduler": _by_sigma,
    "FlowMatchEulerDiscreteScheduler": _by_flow,
    "FlowMatchLCMScheduler": _by_flow,
    "LCMScheduler": _by_timestep,
    "LTXEulerAncestralRFScheduler": _by_flow,
    "SCMScheduler": _by_angle,
}


def check_scheduler(scheduler: Any, residual: bool = False) -> None:
    """Raise ValueError if whole steps of the scheduler cannot be skipped.

    Args:
        scheduler: the pipeline's scheduler.
        residual: whether the cached value is the model output minus the latents (`OutputSite.residual`). It is nearly
            constant if the model predicts a flow, but not if it predicts the noise.
    """
    name = type(scheduler).__name__
    if name in SCHEDULERS or name in CLEAN:
        lacking = {"model_output", "sample"} - inspect.signature(type(scheduler).step).parameters.keys()
        if lacking:  # a step could not be told to use a forecast
            raise ValueError(f"{name}.step takes no {' and no '.join(sorted(lacking))}: whole steps cannot be skipped")
    if draws_noise(scheduler):
        if name in CLEAN and not residual:
            return
        instead = "A cache of blocks (cache_dit, first_block_cache) does not depend on the scheduler"
        if name in CLEAN:
            instead += "; velocity_cache caches the clean latents instead, if the model predicts nothing else"
        raise ValueError(
            f"{name} with these settings draws new noise at each step, so the last model output does not predict the "
            f"next one. {instead}"
        )
    if name in SCHEDULERS:
        predicts = getattr(scheduler.config, "prediction_type", None)
        if residual and not name.startswith("Flow") and predicts != "flow_prediction":
            raise ValueError(
                f"{name} with prediction_type {predicts!r}: what a model adds to the latents can be reused only if it "
                "predicts a flow. velocity_cache caches the output itself"
            )
        return
    if getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"{name} evaluates the model {scheduler.order} times a step, at points of its own: whole steps cannot be "
            "skipped. Use a scheduler with one evaluation a step, such as FlowMatchEulerDiscreteScheduler"
        )
    raise ValueError(
        f"no cache of whole steps knows the scheduler {name!r} yet: {nearest(name, SCHEDULERS)}. One that evaluates "
        "the model once a step can be added as a row of omni_runtime.cache.schedulers.SCHEDULERS"
    )


def why_twice(pipeline_class: type) -> str | None:
    """Why no whole steps can be skipped in pipelines of `STEP_TWICE`, in words; None for others."""
    if STEP_TWICE.isdisjoint(kind.__name__ for kind in pipeline_class.__mro__):
        return None
    return f"{pipeline_class.__name__} takes a step of its scheduler twice: whole steps cannot be skipped"


def draws_noise(scheduler: Any) -> bool:
    """Whether each step replaces the noise in the latents with fresh noise."""
    config = scheduler.config
    return (
        type(scheduler).__name__ in NOISY
        or bool(getattr(config, "stochastic_sampling", False))
        or str(getattr(config, "algorithm_type", "")).startswith("sde")
    )


def steps_along(scheduler: Any) -> bool:
    """Whether a step moves the latents by exactly (σ_{i+1} − σ_i)·v_i, where v_i is the model output."""
    return type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not draws_noise(scheduler)


def clean_latents(scheduler: Any, level: float) -> Numbers:
    """How the scheduler predicts the clean latents at a step: the numbers a and b of x0 = a·latents + b·output.

    Args:
        scheduler: one of `CLEAN`.
        level: the step's σ if the scheduler has any, otherwise its timestep.

    Returns:
        (a, b); None where the latents are noise alone and the model predicts that noise, so it says nothing of x0.
    """
    return CLEAN[type(scheduler).__name__](scheduler, level)
