"""Training of a model's transformer by flow matching, on cached latents and caption embeddings.

With x = (1 - sigma) z + sigma n, the velocity n - z is predicted from x, sigma and the caption, as the pipelines' Euler
sampler expects. Latents z are normalised, and packed into tokens by the model's row. One caption in ten is empty, to
train the negative branch of classifier-free guidance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from .autoencoder import encode, latent_statistics, pictures_to_tensor
from .model import Autoencoder, Model
from .muon import BatchedMuon
from .training import Budget, Fit, fit, save

__all__ = [
    "Samples",
    "batch_encoder",
    "batches",
    "build_latents",
    "captioned_samples",
    "normalised_tokens",
    "train_transformer",
]

Drawn = TypeVar("Drawn")
CaptionEncoder = Callable[[Any, Any, list[str]], tuple[torch.Tensor, torch.Tensor]]

LATENT_SEED, TRANSFORMER_SEED = 3, 4
EMPTY_SHARE = 0.1
RATE = 1e-3


@dataclass(frozen=True)
class Samples:
    """The training data of a transformer.

    Attributes:
        tokens: [count, tokens, width], normalised and packed latents, any float dtype.
        text_rows: [count, 1 + empty captions], rows of `embeddings`: each sample's caption, then its empty ones.
        embeddings: [rows, length, TEXT_DIM].
        mask: [rows, length], True for tokens.
        reference: [count, tokens, width], the tokens of the picture to be edited; None if there is none.
    """

    tokens: torch.Tensor
    text_rows: torch.Tensor
    embeddings: torch.Tensor
    mask: torch.Tensor
    reference: torch.Tensor | None = None


def batch_encoder(
    row: Autoencoder, vae: torch.nn.Module, device: torch.device, compiled: bool
) -> Callable[[list[np.ndarray]], torch.Tensor]:
    """A function from uint8 pictures to posterior means, fp16 on the CPU; all batches must have the same size."""
    vae.to(device).eval()
    row.prepare(vae)
    plain = functools.partial(encode, row, vae)
    encode_batch = torch.compile(plain) if compiled else plain

    def encode_pictures(pictures: list[np.ndarray]) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=compiled):
            return encode_batch(pictures_to_tensor(pictures).to(device))[0].half().cpu()

    return encode_pictures


def batches(draw: Callable[[int], Drawn], count: int, batch: int = 128) -> Iterator[list[Drawn]]:
    """Yield draw(0), draw(1), ... in batches of one size; the last batch is filled up with further draws."""
    for start in range(0, count, batch):
        if start // batch % 50 == 0:
            print(f"encoded: {start} of {count}", flush=True)
        yield [draw(start + i) for i in range(batch)]


def build_latents(
    model: Model,
    vae: torch.nn.Module,
    file: Path,
    side: int,
    count: int,
    device: torch.device,
    compiled: bool = True,
) -> None:
    """Render and encode `count` captioned scenes; write posterior means, captions, and the means' statistics."""
    row = model.autoencoder
    encode_pictures = batch_encoder(row, vae, device, compiled)
    latents, captions = [], []
    for scenes in batches(lambda index: row.sample(LATENT_SEED, index, side), count, 8 * row.batch):
        captions += [drawn.caption for drawn, _ in scenes]
        latents.append(encode_pictures([picture for _, picture in scenes]))
    stacked = torch.cat(latents)[:count]
    mean, std = latent_statistics(row, stacked)
    save({"latents": stacked, "captions": captions[:count], "mean": mean, "std": std}, file)


def captioned_samples(model: Model, cached: dict, encode_captions: CaptionEncoder, empty: tuple[str, ...]) -> Samples:
    """The samples from the file that `build_latents` wrote; each caption is encoded once.

    Args:
        encode_captions: (tokenizer, text encoder, captions) → the pipeline's padded embeddings [count, length, width]
            and mask [count, length].
        empty: the captions that train the negative branch of classifier-free guidance.
    """
    captions = sorted(set(cached["captions"]))
    row_of = {caption: row for row, caption in enumerate(captions)}
    tokenizer = model.new_tokenizer()
    embeddings, mask = encode_captions(tokenizer, model.new_text_encoder(tokenizer), [*captions, *empty])
    own = torch.tensor([row_of[caption] for caption in cached["captions"]])
    without = torch.arange(len(captions), len(embeddings)).expand(len(own), -1)
    return Samples(
        tokens=normalised_tokens(model, cached, cached["latents"]),
        text_rows=torch.cat([own[:, None], without], dim=1),
        embeddings=embeddings.bfloat16(),
        mask=mask,
    )


def normalised_tokens(model: Model, cached: dict, latents: torch.Tensor) -> torch.Tensor:
    """Latents [count, channels, ..., h, w] as the transformer's input tokens, fp16."""
    mean, std = (torch.tensor(cached[name]).view(1, -1, *[1] * (latents.ndim - 2)) for name in ("mean", "std"))
    return model.pack(((latents.float() - mean) / std).half())


def draw_sigmas(count: int, logit_shift: float, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in (0, 1): three quarters logit-normal, a quarter uniform, both through the sampler's shift."""
    normal = torch.sigmoid(torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    chosen = torch.where(torch.rand(count, generator=generator) < 0.75, normal, uniform).clamp(1e-4, 1 - 1e-4)
    return torch.sigmoid(torch.logit(chosen) + logit_shift)


def batch_rows(step: int, batch: int, count: int) -> torch.Tensor:
    """Rows of training step `step`: every epoch is a new shuffle of all rows."""
    per_epoch = count // batch
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    return order[position * batch : (position + 1) * batch]


def new_optimizers(transformer: torch.nn.Module, block_prefixes: tuple[str, ...]) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the blocks' matrices, its updates scaled to AdamW's size; AdamW for the rest."""
    matrices = [p for name, p in transformer.named_parameters() if p.ndim == 2 and name.startswith(block_prefixes)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in chosen]
    return [
        BatchedMuon(matrices, lr=RATE, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def train_transformer(
    model: Model,
    transformer: torch.nn.Module,
    samples: Samples,
    checkpoint: Path,
    budget: Budget,
    device: torch.device,
    compiled: bool = True,
    batch: int | None = None,
) -> Fit:
    """Train on cached samples; afterwards, the transformer has the EMA weights.

    Args:
        model: the row whose `new_transformer` made the transformer.
        samples: at least `batch` samples.
        checkpoint, budget: as for `fit`.
        device: where to train.
        compiled: use torch.compile and bf16 autocast.
        batch: samples per step; None: the row's own number.
    """
    transformer.to(device).train()
    batch = batch or model.batch
    count, tokens, _ = samples.tokens.shape
    empties = samples.text_rows.shape[1] - 1
    shift = model.logit_shift(tokens)

    def loss_of_step(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(TRANSFORMER_SEED * 1_000_000_007 + step)
        rows = batch_rows(step, batch, count)
        clean = samples.tokens[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_sigmas(batch, shift, generator)
        without_caption = torch.rand(batch, generator=generator) < EMPTY_SHARE
        which_empty = 1 + torch.randint(empties, (batch,), generator=generator)
        captions = samples.text_rows[rows, torch.where(without_caption, which_empty, 0)]
        tensors = [clean, noise, sigma, samples.embeddings[captions].float(), samples.mask[captions]]
        if samples.reference is not None:
            tensors.append(samples.reference[rows].float())
        with torch.autocast(device.type, torch.bfloat16, enabled=compiled):
            return step_losses(*(tensor.to(device) for tensor in tensors))

    parameters = list(transformer.parameters())
    optimizers = new_optimizers(transformer, model.block_prefixes)
    with model.training_forward(transformer, math.isqrt(tokens), samples.embeddings.shape[1]) as predict:

        def losses(
            clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, *conditions: torch.Tensor
        ) -> torch.Tensor:
            level = sigma[:, None, None]
            velocity = predict((1 - level) * clean + level * noise, sigma, *conditions)
            return F.mse_loss(velocity.float(), noise - clean)

        step_losses = torch.compile(losses) if compiled else losses
        result = fit(parameters, optimizers, loss_of_step, checkpoint, budget, batch, ema_decay=0.999)
    with torch.no_grad():
        for parameter, value in zip(parameters, result.ema, strict=True):
            parameter.copy_(value)
    transformer.eval().requires_grad_(False)
    return result
