"""The VAE: a small AutoencoderKLQwenImage, its training on rendered scenes, and its latents' statistics.

Pictures are [batch, 3, 1, side, side] in [-1, 1], latents [batch, 16, 1, side/8, side/8]. With a single frame the past
of a causal 3-D convolution is zero padding, so only its last temporal slice counts and it equals a 2-D convolution;
training runs it as one (exact, a third of the work), and the slices that never count are set to zero.

The transformer depends on the encoder and on the latents' statistics alone. The whole is trained first; then the
encoder is frozen for good, and the decoder goes on learning by itself, before, during or after the transformer.
"""

from __future__ import annotations

import math
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm

from .scenes import scene
from .training import Budget, Fit, fit

__all__ = [
    "all_parameters",
    "decoder_parameters",
    "encode",
    "latent_statistics",
    "new_autoencoder",
    "pictures_to_tensor",
    "psnr",
    "reconstruction_psnr",
    "run_single_frames",
    "train_autoencoder",
]

LATENT_CHANNELS = 16
BASE_DIM = 16
BATCH = 16
TRAIN_SEED, DECODER_SEED, TEST_SEED = 1, 2, 9
KL_WEIGHT = 1e-3
RATE = 1.5e-3


def new_autoencoder(base_dim: int = BASE_DIM, seed: int = 0) -> AutoencoderKLQwenImage:
    """A fresh VAE, 8x8 pixels to one 16-channel latent: 2.6 M parameters, of which a single frame uses a third."""
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, QwenImageCausalConv3d):
                module.weight[:, :, :-1] = 0.0
    return vae


def run_single_frames(vae: AutoencoderKLQwenImage) -> None:
    """Make this VAE instance run causal 3-D convolutions as 2-D ones; exact for one frame, wrong for more."""

    def convolve(self: QwenImageCausalConv3d, x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
        padding = (self._padding[2], self._padding[0])
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding).unsqueeze(2)

    def normalize(self: QwenImageRMS_norm, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * self.gamma

    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = types.MethodType(convolve, module)
        elif isinstance(module, QwenImageRMS_norm):
            module.forward = types.MethodType(normalize, module)


def encode(vae: AutoencoderKLQwenImage, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the posterior, both [batch, 16, 1, h, w]."""
    mean, log_variance = vae.quant_conv(vae.encoder(pictures)).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Pictures, not clamped, so that a training loss keeps its gradient beyond -1 and 1."""
    return vae.decoder(vae.post_quant_conv(latents))


def pictures_to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 [side, side, 3] pictures to floats [batch, 3, 1, side, side] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # channels last in memory
    return (stacked.float() / 127.5 - 1.0).unsqueeze(2)


def all_parameters(vae: AutoencoderKLQwenImage) -> list[torch.nn.Parameter]:
    """All parameters that a single frame passes through, in a fixed order."""
    return [parameter for name, parameter in vae.named_parameters() if "time_conv" not in name]


def decoder_parameters(vae: AutoencoderKLQwenImage) -> list[torch.nn.Parameter]:
    """Those of them behind the latents, in a fixed order."""
    modules = (vae.post_quant_conv, vae.decoder)
    return [p for module in modules for name, p in module.named_parameters() if "time_conv" not in name]


def train_autoencoder(
    vae: AutoencoderKLQwenImage,
    checkpoint: Path,
    side: int,
    budget: Budget,
    device: torch.device,
    decoder_only: bool = False,
    compiled: bool = True,
    batch: int = BATCH,
) -> Fit:
    """Train the VAE, or its decoder behind the frozen encoder; leaves the EMA weights in it."""
    vae.to(device).train()
    run_single_frames(vae)
    parameters = decoder_parameters(vae) if decoder_only else all_parameters(vae)
    trained = {id(p) for p in parameters}
    for parameter in vae.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    seed = DECODER_SEED if decoder_only else TRAIN_SEED

    def losses(pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, log_variance = encode(vae, pictures)
        restored = decode(vae, mean + noise * (0.5 * log_variance).exp()).float()
        mean, log_variance = mean.float(), log_variance.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        return F.l1_loss(restored, pictures) + F.mse_loss(restored, pictures) + KL_WEIGHT * kl

    step_losses = torch.compile(losses) if compiled else losses

    def loss_of_step(step: int) -> torch.Tensor:
        pictures = pictures_to_tensor([scene(seed, step * batch + i, side)[1] for i in range(batch)]).to(device)
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(batch, LATENT_CHANNELS, 1, side // 8, side // 8, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=compiled):
            return step_losses(pictures, noise)

    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
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
def reconstruction_psnr(vae: AutoencoderKLQwenImage, pictures: list[np.ndarray], batch: int = 32) -> torch.Tensor:
    """PSNR in dB of encoding (posterior mean) and decoding each uint8 picture, through the model's public methods."""
    values = []
    parameter = next(vae.parameters())
    for start in range(0, len(pictures), batch):
        x = pictures_to_tensor(pictures[start : start + batch]).to(parameter.device, parameter.dtype)
        restored = vae.decode(vae.encode(x).latent_dist.mode()).sample
        values.append(psnr((restored.float() / 2 + 0.5).clamp(0, 1), x.float() / 2 + 0.5))
    return torch.cat(values)


def latent_statistics(latents: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel of latents [count, 16, h, w], rounded as the configuration stores them."""
    mean, std = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
    if not all(math.isfinite(v) for v in [*mean.tolist(), *std.tolist()]):
        raise FloatingPointError("latents are not finite")
    return [round(v, 6) for v in mean.tolist()], [round(v, 6) for v in std.tolist()]
