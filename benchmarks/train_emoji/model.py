"""What the training program has to know of a model: one `Autoencoder` and one `Model` row each.

The rows are in qwen_image.py, z_image.py and qwen_image_edit.py, the table of them in models.py. All that the rows do
not say is shared: scenes, training loop, losses, optimizers, report.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Autoencoder", "Model"]


@dataclass(frozen=True)
class Autoencoder:
    """How a VAE class is made, trained and configured.

    Attributes:
        new: a fresh one.
        channels: of its latents.
        downscale: pixels per latent and axis.
        frames: pictures and latents have a frame axis, [batch, channels, 1, height, width].
        per_channel: latents are normalised per channel; otherwise by one mean and one deviation.
        prepare: makes an instance faster to train, the function it computes staying the same.
        compilable: whether torch.compile may train it.
        configure: writes the latents' mean and deviation, lists of 1 or `channels` numbers, into the configuration.
    """

    new: Callable[[], torch.nn.Module]
    channels: int
    downscale: int
    frames: bool
    per_channel: bool
    prepare: Callable[[torch.nn.Module], None]
    configure: Callable[[torch.nn.Module, list[float], list[float]], None]
    compilable: bool = True


@dataclass(frozen=True)
class Model:
    """A pipeline's classes with small configurations, and how its transformer is trained.

    Attributes:
        name: of the embedded model.
        pipeline: the diffusers class.
        autoencoder: its VAE's row.
        parent: the model whose folder gives the VAE and a first transformer; None where all is trained from nothing.
        new_transformer, new_scheduler, new_tokenizer: fresh parts.
        further_parts: the tokenizer to the components that the pipeline class has besides the usual five.
        new_text_encoder: from the tokenizer; frozen.
        build_samples: (model, vae, file, side, count, device, compiled) writes encoded samples, with their "mean" and
            "std", to the file.
        load_samples: (model, content of that file) to what the transformer trains on.
        pack: latents [batch, channels, h, w] to the tokens [batch, tokens, width] that losses are taken over.
        training_forward: (transformer, grid, text length) to a context that gives the transformer as a function that is
            fast to train: (tokens, sigma [batch], embeddings, mask), and the reference's tokens where there is one, to
            the predicted noise - latents, as tokens.
        logit_shift: image tokens to what the sampler's shift adds to logit(sigma).
        block_prefixes: names of the transformer's parameters that belong to blocks begin so.
        batch: samples per training step of the transformer.
        prompts: (folder, side) to the content of prompts.json; writes the pictures that those need into the folder.
        defaults: what `generate` adds to height and width.
        pipeline_settings: side to the content of pipeline.json, for what the pipeline class needs to be told.
        write_sheets: (model, pipeline, folder, work) writes contact_sheet.png into the folder and what else is to be
            looked at; returns the figures that only this model has.
    """

    name: str
    pipeline: type
    autoencoder: Autoencoder
    new_transformer: Callable[[], torch.nn.Module]
    new_scheduler: Callable[[], Any]
    new_tokenizer: Callable[[], Any]
    new_text_encoder: Callable[[Any], torch.nn.Module]
    build_samples: Callable[..., None]
    load_samples: Callable[[Any, dict], Any]
    pack: Callable[[torch.Tensor], torch.Tensor]
    training_forward: Callable[[Any, int, int], AbstractContextManager[Callable[..., torch.Tensor]]]
    logit_shift: Callable[[int], float]
    block_prefixes: tuple[str, ...]
    batch: int
    prompts: Callable[[Path, int], dict[str, Any]]
    write_sheets: Callable[..., dict[str, Any]]
    defaults: dict[str, Any]
    parent: str | None = None
    further_parts: Callable[[Any], dict[str, Any]] = lambda tokenizer: {}
    pipeline_settings: Callable[[int], dict[str, Any]] | None = None
