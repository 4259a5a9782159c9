"""Pictures of a request that is under way: the clean latents that are predicted at a step, decoded.

The pipeline calls `Partials` after each step, in the request's own thread. For a model that predicts a flow, a step
from noise level σ to σ' moves the latents by (σ' − σ)·v, so the latents x' after it predict the clean ones as
x' − σ'·(x' − x) / (σ' − σ). Other models' latents are decoded as they are, with the noise that is still in them.

`decode` knows the usual ways in which pipelines pack and scale latents. Whether it does the same as a pipeline is found
out in the warm-up: the last latents, decoded here, must give the picture that the pipeline itself has made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from omni_runtime.cache.schedulers import draws_noise

#: The mean difference of 8-bit values between a decoded picture and the pipeline's own that is still the same picture.
SAME = 1.0


class Partials:
    """Shows a request's picture at some of its steps.

    Args:
        count: how many times at most, evenly over the steps.
        show: called with (number from 0, PIL image).
        size: height and width of the picture; None if the pipeline decides.
        ratio: width over height that the picture has if the pipeline decides.

    Attributes:
        last: the latents after the last step that was seen, for the check in the warm-up.
    """

    def __init__(
        self, count: int, show: Callable[[int, Any], None], size: tuple[int, int] | None = None, ratio: float = 1.0
    ) -> None:
        self._count, self._show, self._size, self._ratio = count, show, size, ratio
        self._shown = 0
        self.last: torch.Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """As diffusers calls `callback_on_step_end`. Changes nothing."""
        latents, before = arguments["latents"], self.last
        self.last = latents
        if step in chosen(len(pipe.scheduler.timesteps), self._count) and before is not None:
            clean = predicted(pipe.scheduler, latents, before)
            self._show(self._shown, decode(pipe, clean, self._size, self._ratio))
            self._shown += 1
        return {}


def chosen(steps: int, count: int) -> set[int]:
    """The steps after which a picture is shown, evenly spread. Neither the first, nor the last, which is the result."""
    found = {round((number + 1) * steps / (count + 1)) - 1 for number in range(count)}
    return {step for step in found if 0 < step < steps - 1}


def predicted(scheduler: Any, latents: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The clean latents that a step has predicted; the latents themselves if the model predicts no flow.

    Args:
        latents, before: after the step, and before it.
    """
    config = scheduler.config
    flows = (
        type(scheduler).__name__.startswith("FlowMatch")
        or getattr(config, "prediction_type", None) == "flow_prediction"
        or bool(getattr(config, "use_flow_sigmas", False))
    )
    place = getattr(scheduler, "step_index", None)
    if not flows or draws_noise(scheduler) or not place or place >= len(scheduler.sigmas):
        return latents
    sigma, former = float(scheduler.sigmas[place]), float(scheduler.sigmas[place - 1])
    if sigma == former:
        return latents
    return latents.float() - sigma * (latents.float() - before.float()) / (sigma - former)


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor, size: tuple[int, int] | None = None, ratio: float = 1.0) -> Any:
    """The PIL image of a pipeline's latents.

    Args:
        pipe: the pipeline.
        latents: of one picture, B C H W or B C 1 H W, or packed as B N C with N patches.
        size: height and width in pixels; None: found from N and `ratio`, width over height.
    """
    vae = pipe.vae
    normalised = getattr(vae, "bn", None)  # FLUX.2: a patch's channels are scaled by what a batch norm has seen
    if latents.dim() == 3:
        height, width = size or _sides(latents.shape[1], ratio, 2 * pipe.vae_scale_factor)
        if normalised is None:
            latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        else:
            rows, columns = (side // (2 * pipe.vae_scale_factor) for side in (height, width))
            latents = latents.mT.unflatten(2, (rows, columns))
    latents = latents.to(vae.dtype)
    if normalised is not None:
        mean, variance = (
            one.to(latents).view(1, -1, 1, 1) for one in (normalised.running_mean, normalised.running_var)
        )
        latents = pipe._unpatchify_latents(latents * torch.sqrt(variance + vae.config.batch_norm_eps) + mean)
        return _picture(pipe, latents)
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        shape = 1, -1, *(1 for _ in latents.shape[2:])
        latents = latents * latents.new_tensor(std).view(shape) + latents.new_tensor(mean).view(shape)
    else:
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    return _picture(pipe, latents)


def _picture(pipe: Any, latents: torch.Tensor) -> Any:
    picture = pipe.vae.decode(latents, return_dict=False)[0]
    picture = picture[:, :, 0] if picture.dim() == 5 else picture
    return pipe.image_processor.postprocess(picture, output_type="pil")[0]


def _sides(patches: int, ratio: float, patch: int) -> tuple[int, int]:
    """Height and width of a picture of so many patches whose width over height is nearest to `ratio`."""
    pairs = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    rows, columns = min(pairs, key=lambda pair: abs(pair[1] / pair[0] - ratio) / (pair[1] / pair[0] + ratio))
    return rows * patch, columns * patch


def refused(pipeline_class: type) -> str | None:
    """Why a pipeline of this class shows no partial pictures; None if it may."""
    if "callback_on_step_end" not in inspect.signature(pipeline_class.__call__).parameters:
        return f"{pipeline_class.__name__} takes no callback_on_step_end"
    return None


def differs(pipe: Any, partials: Partials, picture: Any) -> str | None:
    """Why partial pictures would be wrong; None if the last latents give the picture that the pipeline has made."""
    import numpy as np

    name = type(pipe).__name__
    if partials.last is None:
        return f"{name} does not hand out its latents"
    try:
        made = decode(pipe, partials.last, (picture.height, picture.width))
    except Exception as error:  # the pipeline packs its latents in a way that is not known
        return f"the latents of {name} cannot be decoded here ({type(error).__name__})"
    if made.size != picture.size:
        return f"the latents of {name} decode to another size"
    off = np.abs(np.asarray(made, np.float64) - np.asarray(picture.convert(made.mode), np.float64)).mean()
    return None if off <= SAME else f"the latents of {name} decode to another picture"
