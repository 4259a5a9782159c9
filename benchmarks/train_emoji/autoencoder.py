"""Training of a model's VAE on rendered scenes, its reconstructions, and the statistics of its latents.

Pictures are [batch, 3, side, side] in [-1, 1], latents [batch, channels, side/downscale, side/downscale]; for VAEs
with a frame axis, the axis is added here at the call. Clips have their own: [batch, 3, frames, side, side].

The transformer depends only on the encoder and the latents' statistics. The whole VAE is trained first. Then the
encoder is frozen, and the decoder trains on alone, before, during or after the transformer.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .model import Autoencoder
from .training import Budget, Fit, fit

__all__ = [
    "all_parameters",
    "decode",
    "decoder_parameters",
    "encode",
    "latent_statistics",
    "pictures_to_tensor",
    "psnr",
    "reconstruct",
    "reconstruction_psnr",
    "train_autoencoder",
]

TRAIN_SEED, DECODER_SEED, TEST_SEED = 1, 2, 9
KL_WEIGHT = 1e-3


def encode(row: Autoencoder, vae: torch.nn.Module, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the posterior, both [batch, channels, h, w]."""
    moments = vae.encoder(pictures.unsqueeze(2) if row.frames else pictures)
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    mean, log_variance = (moments.squeeze(2) if row.frames else moments).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(row: Autoencoder, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Pictures, not clamped, so that a training loss keeps its gradient beyond -1 and 1."""
    latents = latents.unsqueeze(2) if row.frames else latents
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    pictures = vae.decoder(latents)
    return pictures.squeeze(2) if row.frames else pictures


def pictures_to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 [..., side, side, 3] pictures or clips to floats [batch, 3, ..., side, side] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).movedim(-1, 1)  # channels last in memory
    return stacked.float() / 127.5 - 1.0


def all_parameters(row: Autoencoder, vae: torch.nn.Module) -> list[torch.nn.Parameter]:
    """All parameters that a sample passes through, in a fixed order; a single frame passes by the time axis."""
    return [p for name, p in vae.named_parameters() if row.latent_frames or "time_conv" not in name]


def decoder_parameters(row: Autoencoder, vae: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The part of `all_parameters` after the latents, in a fixed order."""
    decoder = {id(p) for part in (vae.post_quant_conv, vae.decoder) if part is not None for p in part.parameters()}
    return [p for p in all_parameters(row, vae) if id(p) in decoder]


def train_autoencoder(
    row: Autoencoder,
    vae: torch.nn.Module,
    checkpoint: Path,
    side: int,
    budget: Budget,
    device: torch.device,
    decoder_only: bool = False,
    compiled: bool = True,
    batch: int | None = None,
) -> Fit:
    """Train the VAE, or only its decoder with a frozen encoder; afterwards, the VAE has the EMA weights."""
    vae.to(device).train()
    row.prepare(vae)
    parameters = decoder_parameters(row, vae) if decoder_only else all_parameters(row, vae)
    trained = {id(p) for p in parameters}
    for parameter in vae.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    seed = DECODER_SEED if decoder_only else TRAIN_SEED
    batch = batch or row.batch
    frames = [row.latent_frames] if row.latent_frames else []
    latent_shape = (batch, row.channels, *frames, side // row.downscale, side // row.downscale)

    def losses(pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, log_variance = encode(row, vae, pictures)
        restored = decode(row, vae, mean + noise * (0.5 * log_variance).exp()).float()
        mean, log_variance = mean.float(), log_variance.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        return F.l1_loss(restored, pictures) + F.mse_loss(restored, pictures) + KL_WEIGHT * kl

    step_losses = torch.compile(losses) if compiled and row.compilable else losses

    def loss_of_step(step: int) -> torch.Tensor:
        pictures = pictures_to_tensor([row.sample(seed, step * batch + i, side)[1] for i in range(batch)]).to(device)
        noise = torch.randn(latent_shape, generator=torch.Generator().manual_seed(step)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=compiled):
            return step_losses(pictures, noise)

    optimizer = torch.optim.AdamW(parameters, lr=row.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    result = fit(parameters, [optimizer], loss_of_step, checkpoint, budget, batch, ema_decay=0.999)
    with torch.no_grad():
        for parameter, value in zip(parameters, result.ema, strict=True):
            parameter.copy_(value)
    vae.eval().requires_grad_(False)
    return result


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """10 log10(1 / mse) in dB for each picture of two batches of floats in [0, 1]."""
    return -10.0 * torch.log10((a.double() - b.double()).square().flatten(1).mean(1).clamp_min(1e-10))


@torch.no_grad()
def reconstruct(row: Autoencoder, vae: torch.nn.Module, pictures: list[np.ndarray], batch: int = 32) -> torch.Tensor:
    """uint8 pictures encoded (posterior mean) and decoded by the model's public methods: [batch, 3, side, side] in
    [0, 1]."""
    restored = []
    parameter = next(vae.parameters())
    for start in range(0, len(pictures), batch):
        x = pictures_to_tensor(pictures[start : start + batch]).to(parameter.device, parameter.dtype)
        y = vae.decode(vae.encode(x.unsqueeze(2) if row.frames else x).latent_dist.mode()).sample
        restored.append(((y.squeeze(2) if row.frames else y).float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(restored)


def reconstruction_psnr(row: Autoencoder, vae: torch.nn.Module, pictures: list[np.ndarray]) -> torch.Tensor:
    """PSNR in dB of each picture's reconstruction by `reconstruct`; of clips, of each frame, clip by clip."""
    restored, true = reconstruct(row, vae, pictures), pictures_to_tensor(pictures) / 2 + 0.5
    if row.latent_frames:
        restored, true = (clips.transpose(1, 2).flatten(0, 1) for clips in (restored, true))
    return psnr(restored, true)


def latent_statistics(row: Autoencoder, latents: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of latents [count, channels, h, w], per channel or over all, rounded as they are stored."""
    values = latents.float().transpose(0, 1).flatten(1) if row.per_channel else latents.float().reshape(1, -1)
    mean, std = values.mean(1).tolist(), values.std(1).tolist()
    if not all(math.isfinite(v) for v in [*mean, *std]):
        raise FloatingPointError("latents are not finite")
    return [round(v, 6) for v in mean], [round(v, 6) for v in std]
