"""The transformer: a small QwenImageTransformer2DModel trained by flow matching on cached latents and caption
embeddings.

x = (1 - sigma) z + sigma n, and the model predicts n - z from x, sigma and the caption, as the pipeline's Euler
sampler expects. Latents z are normalised per channel and packed as the pipeline packs them: [batch, (side/16)^2, 64].
One caption in ten is empty ("" or " "), which teaches the negative branch of classifier-free guidance.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage

from .autoencoder import encode, latent_statistics, pictures_to_tensor, run_single_frames
from .muon import BatchedMuon
from .scenes import scene
from .text import TEXT_DIM
from .training import Budget, Fit, fit

__all__ = ["build_latents", "new_scheduler", "new_transformer", "pack", "train_transformer"]

LAYERS, HEADS, HEAD_DIM, ROPE_AXES = 7, 5, 32, (8, 12, 12)
BATCH = 64
LATENT_SEED, TRANSFORMER_SEED = 3, 4
EMPTY_SHARE = 0.1
RATE = 1e-3


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's own scheduler settings."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        time_shift_type="exponential",
        shift_terminal=0.02,
    )


def new_transformer(layers: int = LAYERS, heads: int = HEADS, seed: int = 0) -> QwenImageTransformer2DModel:
    """A fresh transformer whose modulation and output start at zero (adaLN-zero), which diffusers does not do."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
    )
    blocks = transformer.transformer_blocks
    zeroed = [layer for block in blocks for layer in (block.img_mod[1], block.txt_mod[1])]
    for layer in [*zeroed, transformer.norm_out.linear, transformer.proj_out]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[batch, 16, h, w] to [batch, h/2 * w/2, 64], the layout of QwenImagePipeline._pack_latents."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


@torch.no_grad()
def build_latents(
    vae: AutoencoderKLQwenImage,
    file: Path,
    side: int,
    count: int,
    device: torch.device,
    compiled: bool = True,
    batch: int = 128,
) -> tuple[list[float], list[float]]:
    """Render and encode `count` scenes, write posterior means and captions; returns mean and std per channel."""
    vae.to(device).eval()
    run_single_frames(vae)
    encode_batch = torch.compile(functools.partial(encode, vae)) if compiled else functools.partial(encode, vae)
    latents, captions = [], []
    for start in range(0, count, batch):
        scenes = [scene(LATENT_SEED, start + i, side) for i in range(batch)]
        captions += [drawn.caption for drawn, _ in scenes]
        pictures = pictures_to_tensor([picture for _, picture in scenes]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=compiled):
            mean, _ = encode_batch(pictures)
        latents.append(mean[:, :, 0].half().cpu())
        if start // batch % 50 == 0:
            print(f"latents: {start} of {count}", flush=True)
    stacked = torch.cat(latents)[:count]
    mean, std = latent_statistics(stacked)
    temporary = file.with_suffix(".part")
    torch.save({"latents": stacked, "captions": captions[:count], "mean": mean, "std": std}, temporary)
    temporary.replace(file)
    return mean, std


def sigma_shift(tokens: int) -> float:
    """The pipeline's mu for this many image tokens: linear between (256, 0.5) and (8192, 0.9)."""
    slope = (0.9 - 0.5) / (8192 - 256)
    return 0.5 + slope * (tokens - 256)


def draw_sigmas(count: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in (0, 1): three quarters logit-normal, a quarter uniform, both through the sampler's shift."""
    normal = torch.sigmoid(torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    chosen = torch.where(torch.rand(count, generator=generator) < 0.75, normal, uniform).clamp(1e-4, 1 - 1e-4)
    return torch.sigmoid(torch.logit(chosen) + sigma_shift(tokens))


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **_: object
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for [batch, tokens, heads, d].

    At 31 tokens the fused CPU kernel's bf16 backward is a third of an eager step: 0.97 s per 128 scenes against 0.60 s.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e4)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def real_rotation(
    x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], use_real: bool = False, use_real_unbind_dim: int = -1
) -> torch.Tensor:
    """The complex rotary product of [batch, tokens, heads, d] with (cosines, sines), in real arithmetic."""
    cosine, sine = table
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cosine - second * sine, first * sine + second * cosine), -1)
    return rotated.flatten(-2).to(x.dtype)


@contextlib.contextmanager
def fusible_operators(transformer: QwenImageTransformer2DModel, grid: int, text_length: int) -> Iterator[None]:
    """While training, attention and rotation in plain real arithmetic: the same function, and torch.compile fuses it.

    Compiled with these, a bf16 step takes 0.34 s per 128 scenes on one AMX core, eager without them 0.97 s.
    """
    device = next(transformer.parameters()).device
    tables = tuple(
        (table.real[:, None].contiguous(), table.imag[:, None].contiguous())
        for table in transformer.pos_embed([(1, grid, grid)], max_txt_seq_len=text_length, device=device)
    )
    replacements = {"apply_rotary_emb_qwen": real_rotation, "dispatch_attention_fn": plain_attention}
    originals = {name: getattr(transformer_qwenimage, name) for name in replacements}
    transformer.pos_embed.forward = lambda *args, **kwargs: tables
    try:
        for name, replacement in replacements.items():
            setattr(transformer_qwenimage, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(transformer_qwenimage, name, original)
        del transformer.pos_embed.forward


def batch_rows(step: int, batch: int, count: int) -> torch.Tensor:
    """Rows of training step `step`: every epoch is a new shuffle of all rows."""
    per_epoch = count // batch
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    return order[position * batch : (position + 1) * batch]


def new_optimizers(transformer: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the blocks' matrices, its updates scaled to AdamW's size; AdamW for the rest."""
    matrices = [p for name, p in transformer.named_parameters() if p.ndim == 2 and "transformer_blocks." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in chosen]
    return [
        BatchedMuon(matrices, lr=RATE, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def train_transformer(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    caption_rows: torch.Tensor,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    checkpoint: Path,
    budget: Budget,
    device: torch.device,
    compiled: bool = True,
    batch: int = BATCH,
) -> Fit:
    """Train on cached scenes; leaves the EMA weights in the transformer.

    Args:
        transformer: from new_transformer.
        latents: [count, 16, h, w], normalised, any float dtype.
        caption_rows: [count], the row of each scene's caption in `embeddings`.
        embeddings: [captions, length, TEXT_DIM]; the last two rows are the empty captions "" and " ".
        mask: [captions, length], True for tokens.
        checkpoint, budget: as for `fit`.
        device: where to train; bf16 autocast where `compiled`.
        compiled: use torch.compile.
        batch: scenes per step.
    """
    transformer.to(device).train()
    packed = pack(latents)
    count, tokens, _ = packed.shape
    grid = math.isqrt(tokens)
    empty = torch.tensor([len(embeddings) - 2, len(embeddings) - 1])
    shapes = [[(1, grid, grid)]] * batch

    def losses(
        clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        level = sigma[:, None, None]
        velocity = transformer(
            hidden_states=(1 - level) * clean + level * noise,
            timestep=sigma,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=text_mask,
            img_shapes=shapes,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.float(), noise - clean)

    step_losses = torch.compile(losses) if compiled else losses

    def loss_of_step(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(TRANSFORMER_SEED * 1_000_000_007 + step)
        rows = batch_rows(step, batch, count)
        clean = packed[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_sigmas(batch, tokens, generator)
        without_caption = torch.rand(batch, generator=generator) < EMPTY_SHARE
        which_empty = empty[torch.randint(2, (batch,), generator=generator)]
        captions = torch.where(without_caption, which_empty, caption_rows[rows])
        tensors = (clean, noise, sigma, embeddings[captions].float(), mask[captions])
        with torch.autocast(device.type, torch.bfloat16, enabled=compiled):
            return step_losses(*(tensor.to(device) for tensor in tensors))

    parameters = list(transformer.parameters())
    optimizers = new_optimizers(transformer)
    with fusible_operators(transformer, grid, embeddings.shape[1]):
        result = fit(parameters, optimizers, loss_of_step, checkpoint, budget, batch, ema_decay=0.999)
    with torch.no_grad():
        for parameter, value in zip(parameters, result.ema, strict=True):
            parameter.copy_(value)
    transformer.eval().requires_grad_(False)
    return result
