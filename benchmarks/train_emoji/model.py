"""The description of a model for the training program: one `Autoencoder` and one `Model` row each.

The rows are in qwen_image.py, z_image.py, qwen_image_edit.py and wan.py, their table in models.py. Everything else is
shared: scenes, training loop, losses, optimizers, report.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .scenes import Scene, render, scene

__all__ = ["Autoencoder", "Model"]


@dataclass(frozen=True)
class Autoencoder:
    """How a VAE class is made, trained and configured.

    Attributes:
        new: creates the VAE.
        channels: number of latent channels.
        downscale: pixels per latent and axis.
        frames: whether the VAE wants a frame axis that pictures and latents lack, [batch, channels, 1, height, width].
        per_channel: whether latents are normalised per channel, or by one mean and one deviation.
        prepare: makes an instance faster to train, without changing its results.
        compilable: whether torch.compile may train it.
        configure: writes the latents' mean and deviation, lists of 1 or `channels` numbers, into the configuration.
        sample: (seed, index, side) → what is in a training picture or clip, and its pixels, uint8 [..., side, side, 3].
        draw: (random numbers, Twemoji file, side) → the pixels of a sample of that emoji.
        latent_frames: latents along the time axis of a clip; None: the samples are pictures.
        encoder_of: the model whose trained VAE it starts from, whose encoder it keeps; only its decoder is trained.
        decoder_minutes: how long the decoder is trained alone by default.
        batch, rate: samples and learning rate of a training step.
    """

    new: Callable[[], torch.nn.Module]
    channels: int
    downscale: int
    frames: bool
    per_channel: bool
    prepare: Callable[[torch.nn.Module], None]
    configure: Callable[[torch.nn.Module, list[float], list[float]], None]
    compilable: bool = True
    sample: Callable[[int, int, int], tuple[Scene, np.ndarray]] = scene
    draw: Callable[[random.Random, str, int], np.ndarray] = lambda rng, stem, side: render(rng, (stem,), None, side)
    latent_frames: int | None = None
    encoder_of: str | None = None
    decoder_minutes: float = 0
    batch: int = 16
    rate: float = 1.5e-3


@dataclass(frozen=True)
class Model:
    """A pipeline's classes with small configurations, and how its transformer is trained.

    Attributes:
        name: name of the embedded model.
        pipeline: the diffusers class.
        autoencoder: its VAE's row.
        parent: the model whose folder provides the VAE and the initial transformer; None: all is trained from scratch.
        new_transformer, new_scheduler, new_tokenizer: create the parts.
        further_parts: tokenizer → the pipeline's components besides the usual five.
        new_text_encoder: tokenizer → the frozen text encoder.
        build_samples: (model, vae, file, side, count, device, compiled) writes encoded samples, with their "mean" and
            "std", to the file.
        load_samples: (model, content of that file) → the transformer's training data.
        pack: latents [batch, channels, h, w] → the tokens [batch, tokens, width] of the loss.
        training_forward: (transformer, grid, text length) → a context manager whose value is the transformer as a
            function that is fast to train: (tokens, sigma [batch], embeddings, mask and, if there is a reference, its
            tokens) → the predicted noise - latents, as tokens.
        logit_shift: number of image tokens → the amount that the sampler's shift adds to logit(sigma).
        block_prefixes: prefixes of the names of the transformer's parameters that belong to blocks.
        batch: samples per training step of the transformer.
        prompts: (folder, side) → the content of prompts.json; also writes the pictures of the prompts into the folder.
        defaults: default arguments of `generate` besides height and width.
        pipeline_settings: side → the content of pipeline.json, with settings for the pipeline class.
        write_sheets: (model, pipeline, folder, work) writes contact_sheet.png into the folder, and other sheets;
            returns the figures that only this model has.
        scenes: scenes whose latents the transformer trains on.
        transformer_minutes: the training time of the transformer at the end of each run.
        samples_measured, prompts_measured: samples that the VAE restores, and prompts of fewer steps, for the figures.
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
    scenes: int = 60_000
    transformer_minutes: tuple[float, ...] = (60,)
    samples_measured: int = 256
    prompts_measured: int = 16
    parent: str | None = None
    further_parts: Callable[[Any], dict[str, Any]] = lambda tokenizer: {}
    pipeline_settings: Callable[[int], dict[str, Any]] | None = None
