"""`emoji-z-image`: ZImagePipeline with small configurations.

The VAE encodes 4x4 pixels as one latent; Z-Image's VAE encodes 8x8. At 64 pixels this gives 64 image tokens of 2x2
latents, a multiple of 32, as Z-Image needs. With 8x8 there would be 16 tokens, padded to 32, so half the work would be
wasted, and the picture would be blurrier. Captions are padded to 32 tokens.

With 96 tokens, a scene costs more than in emoji-qwen-image with its 31 tokens: an estimated 220 million multiplications
per forward against 70 million (12 width^2 per token and block). So the width is that of emoji-qwen-image, although the
20 MB have room for twice the parameters, and a step has half as many scenes: in the same hour, more steps help more
than more parameters.

The pipeline passes 1 - sigma to the transformer and negates its output, so the transformer predicts latents - noise.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from .model import Autoencoder, Model
from .operators import plain_attention, real_rotation
from .prompts import caption_prompts
from .report import caption_sheets
from .text import TEXT_DIM, all_captions, encode_texts, freeze, new_tokenizer
from .transformer import build_latents, captioned_samples

__all__ = ["AUTOENCODER", "MODEL", "encode_captions", "new_transformer", "pack", "training_forward"]

LATENT_CHANNELS, WIDTHS = 8, (16, 32, 64)
LAYERS, REFINERS, HEADS, HEAD_DIM, ROPE_AXES = 6, 1, 5, 32, (8, 12, 12)
BATCH = 32
EMPTY_CAPTIONS = ("",)
SHIFT = 3.0
# The part of Qwen's template that the pipeline uses: a single message, and an answer with thinking enabled.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Autoencoder


def new_autoencoder(widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> AutoencoderKL:
    """A new VAE of FLUX's kind, without the convolutions next to the latents.

    It starts with little noise in the latents, so that they carry information from the first step on.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=list(widths),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] -= 6.0  # log-variance
    return vae


def configure(vae: AutoencoderKL, mean: list[float], std: list[float]) -> None:
    vae.register_to_config(shift_factor=mean[0], scaling_factor=1.0 / std[0])


AUTOENCODER = Autoencoder(
    new=new_autoencoder,
    channels=LATENT_CHANNELS,
    downscale=2 ** (len(WIDTHS) - 1),
    frames=False,
    per_channel=False,
    prepare=lambda vae: None,
    configure=configure,
    # Compiled by torch 2.13 for the CPU, the decoder's gradients are zero. Uncompiled, a step takes a tenth longer.
    compilable=False,
)


# Text


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = new_tokenizer(all_captions())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_text_encoder(tokenizer: Qwen2Tokenizer, seed: int = 0) -> Qwen3Model:
    """Three layers of width TEXT_DIM with random weights, frozen; the pipeline uses the second layer's output."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        num_hidden_layers=3,
        num_attention_heads=TEXT_DIM // 32,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    return freeze(Qwen3Model(config))


def encode_captions(
    tokenizer: Qwen2Tokenizer, encoder: Qwen3Model, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode captions as the pipeline does: padded embeddings [count, 32, TEXT_DIM] and mask [count, 32].

    Raises:
        ValueError: a caption has more than 32 tokens.
    """
    chats = [[{"role": "user", "content": caption}] for caption in captions]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    embeddings, mask = encode_texts(tokenizer, encoder, texts, layer=-2)
    missing = SEQ_MULTI_OF - embeddings.shape[1]
    if missing < 0:
        raise ValueError(f"a caption has {embeddings.shape[1]} tokens; training has room for {SEQ_MULTI_OF}")
    return torch.nn.functional.pad(embeddings, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))


# Transformer


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Z-Image's scheduler settings: a fixed shift."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False)


def logit_shift(tokens: int) -> float:
    """sigma -> 3 sigma / (1 + 2 sigma) adds log 3 to logit(sigma), whatever the number of tokens."""
    return math.log(SHIFT)


def new_transformer(
    layers: int = LAYERS, refiners: int = REFINERS, heads: int = HEADS, seed: int = 0
) -> ZImageTransformer2DModel:
    """A new transformer whose modulation and output start at zero (adaLN-zero), unlike in diffusers."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=LATENT_CHANNELS,
        dim=heads * HEAD_DIM,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=TEXT_DIM,
        axes_dims=list(ROPE_AXES),
        axes_lens=[1024, 512, 512],
    )
    final = transformer.all_final_layer["2-1"]
    modulated = [*transformer.noise_refiner, *transformer.layers]
    for layer in [*(block.adaLN_modulation[0] for block in modulated), final.adaLN_modulation[1], final.linear]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[batch, 8, h, w] to [batch, h/2 * w/2, 32], the layout of ZImageTransformer2DModel._patchify_image."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


class FusibleProcessor:
    """ZSingleStreamAttnProcessor in plain real arithmetic; `freqs_cis` is (cosines, sines)."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: object,
    ) -> torch.Tensor:
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (real_rotation(norm(x), *freqs_cis) for norm, x in ((attn.norm_q, query), (attn.norm_k, key)))
        attended = plain_attention(query.to(value.dtype), key.to(value.dtype), value, attention_mask)
        return attn.to_out[0](attended.flatten(2))


@contextlib.contextmanager
def training_forward(
    transformer: ZImageTransformer2DModel, grid: int, text_length: int
) -> Iterator[Callable[..., torch.Tensor]]:
    """The transformer's forward on a batch of one shape, with attention and rotation in plain real arithmetic.

    The model's own forward loops over lists of pictures; this calls the same submodules on whole tensors. Every caption
    is padded to `text_length` with the pad token; image tokens need no padding.

    Raises:
        ValueError: the image tokens or the captions do not fill multiples of 32.
    """
    if grid * grid % SEQ_MULTI_OF or text_length % SEQ_MULTI_OF:
        raise ValueError(f"{grid}x{grid} image tokens or {text_length} of text do not fill multiples of {SEQ_MULTI_OF}")
    device = next(transformer.parameters()).device
    of_image = transformer.create_coordinate_grid((1, grid, grid), (text_length + 1, 0, 0), device).flatten(0, 2)
    of_text = transformer.create_coordinate_grid((text_length, 1, 1), (1, 0, 0), device).flatten(0, 2)
    image_rotation, text_rotation, joint_rotation = (
        (table.real[:, None].contiguous(), table.imag[:, None].contiguous())
        for table in map(transformer.rope_embedder, (of_image, of_text, torch.cat([of_image, of_text])))
    )
    final = transformer.all_final_layer["2-1"]

    def predict(tokens: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        modulation = transformer.t_embedder((1 - sigma) * transformer.t_scale).type_as(tokens)
        x = transformer.all_x_embedder["2-1"](tokens)
        for block in transformer.noise_refiner:
            x = block(x, None, image_rotation, modulation)
        text = transformer.cap_embedder(text)
        text = torch.where(mask[..., None], text, transformer.cap_pad_token.to(text.dtype))
        for block in transformer.context_refiner:
            text = block(text, None, text_rotation)
        joint = torch.cat([x, text], dim=1)
        for block in transformer.layers:
            joint = block(joint, None, joint_rotation, modulation)
        return -final(joint[:, : tokens.shape[1]], c=modulation)

    blocks = [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]
    originals = [block.attention.processor for block in blocks]
    try:
        for block in blocks:
            block.attention.processor = FusibleProcessor()
        yield predict
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.attention.processor = original


MODEL = Model(
    name="emoji-z-image",
    pipeline=ZImagePipeline,
    autoencoder=AUTOENCODER,
    new_transformer=new_transformer,
    new_scheduler=new_scheduler,
    new_tokenizer=chat_tokenizer,
    new_text_encoder=new_text_encoder,
    build_samples=build_latents,
    load_samples=functools.partial(captioned_samples, encode_captions=encode_captions, empty=EMPTY_CAPTIONS),
    pack=pack,
    training_forward=training_forward,
    logit_shift=logit_shift,
    block_prefixes=("layers.", "noise_refiner.", "context_refiner."),
    batch=BATCH,
    prompts=caption_prompts,
    write_sheets=caption_sheets,
    defaults={"num_inference_steps": 50, "guidance_scale": 3.0},
)
