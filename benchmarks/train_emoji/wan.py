"""`emoji-wan`: WanPipeline with small configurations, for clips of 17 frames of 64x64 pixels.

The VAE is that of Wan 2.1: it encodes the first frame by itself, then four frames at a time, so a clip is 5 latents of
[16, 8, 8], and the transformer has 5 * 4 * 4 = 80 tokens. It starts from emoji-qwen-image's VAE, which has the same
layers and was trained on single frames. Of every four frames, its encoder keeps the last one, as that VAE encodes it,
so it needs no training. The decoder learns the frames in between from the latents on either side, as motion is smooth.
At the full frame rate (32x32 and 64x64 pixels), the decoder's convolutions keep to single frames, too. Training runs
all of them as 2-D, and a clip at once instead of in chunks; both are exact.

The scheduler is flow matching by Euler with a constant shift, one of the two that Wan is used with. It evaluates the
model once a step and keeps no history, so a difference between two runs is that of the caches. UniPC, the default of
Wan's checkpoints, mixes earlier model outputs into each step, and so hides what a cache does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import types
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanRMS_norm
from diffusers.models.transformers import transformer_wan
from safetensors.torch import load_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from omni_runtime.generation.loading import EMBEDDED

from .clip_report import clip_sheets
from .clips import FRAMES, all_clip_captions, clip, clip_prompts, draw_clip
from .model import Autoencoder, Model
from .operators import plain_attention
from .text import TEXT_DIM, encode_texts, freeze
from .transformer import build_latents, captioned_samples

__all__ = ["AUTOENCODER", "MODEL", "encode_captions", "new_transformer", "pack", "run_whole_clips", "training_forward"]

LATENT_CHANNELS, LATENT_FRAMES = 16, 5
LAYERS, HEADS, HEAD_DIM = 6, 5, 32
TEXT_LENGTH = 16  # tokens that a caption is padded to; the pipeline's own 512 would cost more than the clip
EMPTY_CAPTIONS = ("",)
SHIFT = 3.0
SINGLE_FRAMES = "emoji-qwen-image"  # the model whose VAE it starts from


# Autoencoder


#: The decoder's layers that see every frame. Like the whole encoder, they keep to single frames.
FULL_RATE = ("decoder.up_blocks.2.", "decoder.up_blocks.3.", "decoder.conv_out")
CHUNK = 4  # frames to a latent


def new_autoencoder() -> AutoencoderKLWan:
    """The single-frame VAE as a VAE for clips: it encodes the last of four frames, and repeats it when it decodes."""
    folder = EMBEDDED / SINGLE_FRAMES / "vae"
    config = json.loads((folder / "config.json").read_text())
    names = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")
    vae = AutoencoderKLWan(
        **{name: config[name] for name in names},
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanResample) and module.mode in ("downsample3d", "upsample3d"):
                convolution = module.time_conv
                identity = torch.eye(module.dim).repeat(convolution.out_channels // module.dim, 1)
                convolution.weight.zero_()
                convolution.weight[:, :, -1, 0, 0] = identity
                convolution.bias.zero_()
    return vae.float()


def frames_first(x: torch.Tensor) -> torch.Tensor:
    """[batch, channels, frames, h, w] to [batch * frames, channels, h, w]."""
    return x.transpose(1, 2).flatten(0, 1)


def frames_back(x: torch.Tensor, batch: int) -> torch.Tensor:
    """The reverse of `frames_first`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def with_past(x: torch.Tensor, past: int) -> torch.Tensor:
    """Each frame with its `past` predecessors (zeros before the first frame) as further channels, the oldest first."""
    frames = x.shape[2]
    padded = F.pad(x, (0, 0, 0, 0, past, 0))
    return torch.cat([padded[:, :, start : start + frames] for start in range(past + 1)], dim=1)


def over_time(convolution: WanCausalConv3d, x: torch.Tensor, past: int) -> torch.Tensor:
    """A causal convolution over each frame and its `past` predecessors, as a 2-D one."""
    weight = convolution.weight[:, :, -1 - past :].transpose(1, 2).flatten(1, 2)
    padding = (convolution._padding[2], convolution._padding[0])
    return frames_back(F.conv2d(frames_first(with_past(x, past)), weight, convolution.bias, 1, padding), len(x))


def run_whole_clips(vae: AutoencoderKLWan) -> None:
    """Make the encoder and the decoder take a whole clip at once, and the encoder skip the frames that it drops.

    Exact for weights that start as `new_autoencoder` makes them, with whatever the decoder has learnt.
    """

    def normalise(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * self.gamma

    def resample(self: WanResample, x: torch.Tensor, feat_cache: None = None, feat_idx: object = None) -> torch.Tensor:
        if self.mode == "upsample3d":  # two frames of every latent but the first
            rest = over_time(self.time_conv, x[:, :, 1:], 2).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
            x = torch.cat([x[:, :, :1], rest], dim=2)
        return frames_back(self.resample(frames_first(x)), len(x))

    def encode_kept(x: torch.Tensor) -> torch.Tensor:
        return type(vae.encoder).forward(vae.encoder, x[:, :, ::CHUNK])

    vae.encoder.forward = encode_kept
    for name, module in vae.named_modules():
        if isinstance(module, WanCausalConv3d):
            past = 0 if name.startswith(("encoder.", *FULL_RATE)) else module.kernel_size[0] - 1
            module.forward = functools.partial(over_time, module, past=past)
        elif isinstance(module, WanRMS_norm):
            module.forward = types.MethodType(normalise, module)
        elif isinstance(module, WanResample):
            module.forward = types.MethodType(resample, module)


def configure(vae: AutoencoderKLWan, mean: list[float], std: list[float]) -> None:
    vae.register_to_config(latents_mean=mean, latents_std=std)


AUTOENCODER = Autoencoder(
    new=new_autoencoder,
    channels=LATENT_CHANNELS,
    downscale=8,
    frames=False,
    per_channel=True,
    prepare=run_whole_clips,
    configure=configure,
    sample=clip,
    draw=draw_clip,
    latent_frames=LATENT_FRAMES,
    encoder_of=SINGLE_FRAMES,
    decoder_minutes=60,
    batch=1,
    rate=3e-4,
)


# Text


def new_tokenizer() -> T5Tokenizer:
    """A token for each word of the captions, and one for each letter; T5's own kind of vocabulary."""
    captions = all_clip_captions()
    words = dict.fromkeys(word for caption in captions for word in caption.split())
    letters = sorted({letter for word in words for letter in word})
    special = ("<pad>", "</s>", "<unk>")
    pieces = [*((piece, 0.0) for piece in special), *(("▁" + word, -1.0) for word in words)]
    return T5Tokenizer(vocab=[*pieces, ("▁", -10.0), *((letter, -10.0) for letter in letters)], extra_ids=0)


def new_text_encoder(tokenizer: T5Tokenizer, seed: int = 0) -> UMT5EncoderModel:
    """Two layers of width TEXT_DIM with random weights, frozen."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=2 * TEXT_DIM,
        num_layers=2,
        num_heads=TEXT_DIM // 32,
        dropout_rate=0.0,
    )
    return freeze(UMT5EncoderModel(config))


def encode_captions(
    tokenizer: T5Tokenizer, encoder: UMT5EncoderModel, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode captions as the pipeline does: embeddings [count, TEXT_LENGTH, TEXT_DIM], 0 after the end, and mask.

    Wan's transformer gets no mask. So the zeros count, and there must be as many as the pipeline gives.
    """
    embeddings, mask = encode_texts(tokenizer, encoder, captions)
    further = TEXT_LENGTH - embeddings.shape[1]
    return F.pad(embeddings, (0, 0, 0, further)), F.pad(mask, (0, further))


# Transformer


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Wan's own settings for 480p."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def logit_shift(tokens: int) -> float:
    """The same for every number of tokens: sigma' = shift sigma / (1 + (shift - 1) sigma)."""
    return math.log(SHIFT)


def new_transformer(layers: int = LAYERS, heads: int = HEADS, seed: int = 0) -> WanTransformer3DModel:
    """A new transformer whose modulation and output start at zero (adaLN-zero), unlike in diffusers."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=4 * heads * HEAD_DIM,
        num_layers=layers,
    )
    zeroed = [transformer.condition_embedder.time_proj, transformer.proj_out]
    zeroed += [block.attn2.to_out[0] for block in transformer.blocks]
    for layer in zeroed:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for part in (transformer, *transformer.blocks):
        torch.nn.init.zeros_(part.scale_shift_table)
    return transformer


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[batch, 16, frames, h, w] to [batch, frames * h/2 * w/2, 64], in the order of the transformer's tokens."""
    batch, channels, frames, height, width = latents.shape
    patches = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    return patches.reshape(batch, frames * height // 2 * (width // 2), channels * 4)


def unpack(tokens: torch.Tensor, frames: int) -> torch.Tensor:
    """The reverse of `pack`, for square latents."""
    side = math.isqrt(tokens.shape[1] // frames)
    patches = tokens.reshape(len(tokens), frames, side, side, -1, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
    return patches.flatten(5, 6).flatten(3, 4)


@contextlib.contextmanager
def training_forward(
    transformer: WanTransformer3DModel, grid: int, text_length: int
) -> Iterator[Callable[..., torch.Tensor]]:
    """The transformer with attention in plain arithmetic, which torch.compile can fuse; the results are the same.

    `grid` is that of a square picture, and has no meaning for a clip.
    """

    def predict(tokens: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return pack(
            transformer(
                hidden_states=unpack(tokens, LATENT_FRAMES),
                timestep=1000 * sigma,
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
        )

    original = transformer_wan.dispatch_attention_fn
    transformer_wan.dispatch_attention_fn = plain_attention
    try:
        yield predict
    finally:
        transformer_wan.dispatch_attention_fn = original


MODEL = Model(
    name="emoji-wan",
    pipeline=WanPipeline,
    autoencoder=AUTOENCODER,
    new_transformer=new_transformer,
    new_scheduler=new_scheduler,
    new_tokenizer=new_tokenizer,
    new_text_encoder=new_text_encoder,
    build_samples=build_latents,
    load_samples=functools.partial(captioned_samples, encode_captions=encode_captions, empty=EMPTY_CAPTIONS),
    pack=pack,
    training_forward=training_forward,
    logit_shift=logit_shift,
    block_prefixes=("blocks.",),
    batch=32,
    prompts=clip_prompts,
    write_sheets=clip_sheets,
    scenes=8_000,
    transformer_minutes=(55, 165),
    samples_measured=24,
    prompts_measured=8,
    defaults={
        "num_frames": FRAMES,
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "negative_prompt": "",
        "max_sequence_length": TEXT_LENGTH,
    },
)
