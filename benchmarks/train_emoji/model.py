"""What the training program has to know of a model: one `Autoencoder` and one `Model` row each.

The rows are in qwen_image.py, z_image.py and qwen_image_edit.py, the table of them in models.py. All that the rows do
not say is shared: scenes, training loop, losses, optimizers, report.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
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
        new_transformer, new_scheduler, new_tokenizer: fresh parts.
        new_text_encoder: from the tokenizer; frozen.
        encode_captions: (tokenizer, text encoder, captions) to what the pipeline makes of them, padded: embeddings
            [count, length, width] and mask [count, length].
        empty_captions: the captions that teach the negative branch of classifier-free guidance.
        pack: latents [batch, channels, h, w] to the tokens [batch, tokens, width] that losses are taken over.
        training_forward: (transformer, grid, text length) to a context that gives the transformer as a function that is
            fast to train: (tokens, sigma [batch], embeddings, mask) to the predicted noise - latents, as tokens.
        logit_shift: image tokens to what the sampler's shift adds to logit(sigma).
        block_prefixes: names of the transformer's parameters that belong to blocks begin so.
        batch: samples per training step of the transformer.
        defaults: what `generate` adds to height and width.
    """

    name: str
    pipeline: type
    autoencoder: Autoencoder
    new_transformer: Callable[[], torch.nn.Module]
    new_scheduler: Callable[[], Any]
    new_tokenizer: Callable[[], Any]
    new_text_encoder: Callable[[Any], torch.nn.Module]
    encode_captions: Callable[[Any, Any, list[str]], tuple[torch.Tensor, torch.Tensor]]
    empty_captions: tuple[str, ...]
    pack: Callable[[torch.Tensor], torch.Tensor]
    training_forward: Callable[[Any, int, int], AbstractContextManager[Callable[..., torch.Tensor]]]
    logit_shift: Callable[[int], float]
    block_prefixes: tuple[str, ...]
    batch: int
    defaults: dict[str, Any] = field(default_factory=dict)
