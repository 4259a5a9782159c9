"""Tiny pipelines of random weights, without text encoders: what the table of models is made with.

A family's file has a builder for each pipeline. All classes are diffusers' own, built from a config; nothing is
downloaded. Requests start from embeddings of random numbers and end with latents, so that no text encoder and no
decoder runs.

    @tiny("WanPipeline")
    def wan() -> Tiny:
        return Tiny(diffusers.WanPipeline(...), {"prompt_embeds": numbers(1, 12, 32), "num_frames": 5, ...})

    model = build("WanPipeline")
    latents = model.generate(steps=6)
"""

from __future__ import annotations

import copy
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import TimestepEmbedding
from PIL import Image

#: By default, requests have so many steps, ...
STEPS = 8
#: ... and pictures so many pixels per side.
SIDE = 64
#: The weights of the last layer of a timestep embedding are scaled by this: see `smooth`.
DAMPED = 0.3
#: That layer, in the timestep embeddings that are not diffusers' common one.
LAST_TIMESTEP_LAYER = {
    "AceStepTimestepEmbedding": "linear_2",
    "AudioDiTTimestepEmbedding": "time_mlp.2",
    "Ideogram4EmbedScalar": "mlp_out",
    "Kandinsky5TimeEmbeddings": "out_layer",
    "Krea2TimestepEmbedding": "linear_2",
    "MLPEmbedder": "out_layer",
    "StableAudio3DiTModel": "to_timestep_embed.2",
    "StableAudioDiTModel": "timestep_proj.2",
    "TimestepEmbedder": "mlp.2",
}


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline, and how to call it.

    Attributes:
        pipe: the pipeline.
        arguments: the arguments of one request.
        guided: further arguments with which a request has classifier-free guidance; empty if the pipeline has none.
        larger: further arguments with which a request has another size.
        steps: the number of steps of a request.
        name: the name that `build` takes.
    """

    pipe: Any
    arguments: Mapping[str, Any]
    guided: Mapping[str, Any] = field(default_factory=dict)
    larger: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    name: str = ""

    def generate(self, guided: bool = False, larger: bool = False, **others: Any) -> torch.Tensor:
        """Run one request with seed 0, and return all that it made, in one flat fp32 tensor."""
        arguments = self.asked(guided, larger, **others)
        arguments.setdefault("generator", torch.Generator().manual_seed(0))
        self.pipe.set_progress_bar_config(disable=True)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # some pipelines also draw from the global generator
            torch.manual_seed(0)
            return flat(self.pipe(**arguments))

    def asked(self, guided: bool = False, larger: bool = False, **others: Any) -> dict[str, Any]:
        """The arguments of a request. A modular pipeline is given its guidance here."""
        arguments: dict[str, Any] = {"num_inference_steps": self.steps, "output_type": "latent", "return_dict": False}
        arguments |= {**self.arguments, **(self.guided if guided else {}), **(self.larger if larger else {}), **others}
        arguments = {name: _own(value) for name, value in arguments.items() if value is not OMIT}
        guiders = {name: arguments.pop(name) for name in list(arguments) if "guider" in name}
        if guiders:  # a modular pipeline takes its guidance as a component, not as an argument
            self.pipe.update_components(**guiders)
        return arguments


def flat(output: Any) -> torch.Tensor:
    """All tensors of a pipeline's output, in one flat fp32 tensor."""
    return torch.cat([one.detach().float().reshape(-1) for one in tensors(output)])


#: As the value of an argument: it is left out.
OMIT = object()

_BUILDERS: dict[str, Callable[[], Tiny]] = {}


def tiny(name: str) -> Callable[[Callable[[], Tiny]], Callable[[], Tiny]]:
    """Register a builder under the name of its pipeline class, which a variant in brackets may follow."""

    def register(builder: Callable[[], Tiny]) -> Callable[[], Tiny]:
        if name in _BUILDERS:
            raise ValueError(f"there are two builders of {name}")
        _BUILDERS[name] = builder
        return builder

    return register


def names() -> list[str]:
    """The names of all tiny pipelines."""
    from benchmarks.models import families

    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    return sorted(_BUILDERS)


def build(name: str) -> Tiny:
    """A new tiny pipeline, with the same weights each time. All its models are in evaluation mode.

    Raises:
        KeyError: there is none of that name.
    """
    names()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = replace(_BUILDERS[name](), name=name)
    for name, part in model.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            part.eval()
            if "transformer" in name:
                smooth(part)
    return model


def smooth(transformer: torch.nn.Module) -> None:
    """Make a random transformer change slowly with the timestep, as a trained one does.

    With random weights, consecutive steps differ so much that no cache would skip any.
    """
    with torch.no_grad():
        for layer in transformer.modules():
            if isinstance(layer, TimestepEmbedding):
                layer.linear_2.weight.mul_(DAMPED)
                if layer.linear_2.bias is None:  # without a constant part, the timestep's fast waves are damped
                    half = layer.linear_1.in_features // 2
                    layer.linear_1.weight[:, torch.arange(2 * half) % half < 0.75 * half] *= 0.1
            elif last := LAST_TIMESTEP_LAYER.get(type(layer).__name__):
                layer.get_submodule(last).weight.mul_(DAMPED)


def numbers(*shape: int, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    """Random numbers of a normal distribution, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def ones(*shape: int) -> torch.Tensor:
    """An attention mask that leaves nothing out."""
    return torch.ones(*shape, dtype=torch.long)


def picture(side: int = SIDE, seed: int = 0) -> Image.Image:
    """An RGB picture of coarse random colours."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def clip(frames: int, side: int = SIDE) -> list[Image.Image]:
    """Pictures that are the frames of a video."""
    return [picture(side, seed) for seed in range(frames)]


def flow(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The scheduler of most flow models."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def kl_vae(latent_channels: int = 4, **config: Any) -> diffusers.AutoencoderKL:
    """An image autoencoder of the kind of Stable Diffusion: 8 times smaller."""
    sizes: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": latent_channels,
    }
    return diffusers.AutoencoderKL(**sizes | config)


def wan_vae(**config: Any) -> diffusers.AutoencoderKLWan:
    """Wan's video autoencoder: 8 times smaller, 4 times fewer frames, 16 channels."""
    return diffusers.AutoencoderKLWan(**{"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} | config)


def qwen_vae(**config: Any) -> diffusers.AutoencoderKLQwenImage:
    """Qwen-Image's autoencoder: 8 times smaller, 16 channels."""
    sizes: dict[str, Any] = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return diffusers.AutoencoderKLQwenImage(**sizes | {"temperal_downsample": [False, True, True]} | config)


def mask(side: int = SIDE) -> Image.Image:
    """A mask for inpainting: the left half is white."""
    half = Image.new("L", (side, side))
    half.paste(255, (0, 0, side // 2, side))
    return half


def wake(module: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Give the parameters that are all zeros small random values: such layers do nothing before they are trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return module


def limit_area(pipeline_module: Any, side: int = SIDE) -> None:
    """Make a pipeline scale its input pictures to about side² pixels where it would scale them to 1024²."""
    scaled = pipeline_module.calculate_dimensions
    if not isinstance(scaled, functools.partial):
        pipeline_module.calculate_dimensions = functools.partial(_limited_area, scaled, side * side)


def _limited_area(scaled: Callable[[int, float], Any], limit: int, target_area: int, ratio: float) -> Any:
    return scaled(min(target_area, limit), ratio)


class TextEncoder(torch.nn.Module):
    """Stands where a pipeline asks its text encoder for no more than a dtype."""

    dtype = torch.float32
    device = torch.device("cpu")


def always(value: Any) -> Callable[..., Any]:
    """A function that returns this for any arguments: it replaces an encoder."""
    return lambda *arguments, **named: value


def tensors(made: Any) -> list[torch.Tensor]:
    """The tensors in the output of a pipeline; pictures and arrays become tensors."""
    if isinstance(made, torch.Tensor):
        return [made]
    if isinstance(made, (np.ndarray, Image.Image)):
        return [torch.from_numpy(np.ascontiguousarray(np.asarray(made)))]
    if isinstance(made, Mapping):
        made = list(made.values())
    return [one for part in made for one in tensors(part)] if isinstance(made, (list, tuple)) else []


def _own(value: Any) -> Any:
    """A copy of an argument: some pipelines write into theirs."""
    return copy.deepcopy(value) if isinstance(value, (list, dict, torch.Tensor, np.ndarray)) else value
