"""Cosmos 1, 2, 2.5 and 3."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available
from torch.nn import functional

from benchmarks.models.tiny import OMIT, Tiny, clip, flow, numbers, picture, tiny, wake, wan_vae

TEXT, WIDTH = 12, 32
_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 2.0,
    "text_embed_dim": WIDTH,
    "adaln_lora_dim": 8,
    "max_size": (8, 32, 32),
}
if not is_torchvision_available():  # the models need it just for this
    resize = SimpleNamespace(resize=lambda mask, size, interpolation: functional.interpolate(mask, size))
    for module in (transformer_cosmos, controlnet_cosmos):
        vars(module)["transforms"] = SimpleNamespace(
            functional=resize, InterpolationMode=SimpleNamespace(NEAREST="nearest")
        )


class _SafetyChecker(torch.nn.Module):
    """Stands where the pipelines insist on a safety checker; nothing is checked, as nothing is decoded."""

    device = torch.device("cpu")
    dtype = torch.float32


def _transformer(**config: Any) -> torch.nn.Module:
    sizes = {**_SIZES, "in_channels": 17, "out_channels": 16, "num_layers": 4}
    return wake(diffusers.CosmosTransformer3DModel(**sizes | config))


def _parts(**parts: Any) -> dict[str, Any]:
    defaults = {"text_encoder": None, "tokenizer": None, "vae": wan_vae(), "safety_checker": _SafetyChecker()}
    return {**defaults, "scheduler": flow(use_karras_sigmas=True), **parts}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 5,
}
_GUIDED = {"guidance_scale": 7.0}
_LARGER = {"width": 96, "num_frames": 9}


def _cosmos_1(pipeline: Any, in_channels: int, **request: Any) -> Tiny:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
    )
    pipe = pipeline(**_parts(transformer=_transformer(in_channels=in_channels), vae=vae, scheduler=scheduler))
    return Tiny(pipe, _REQUEST | {"num_frames": 9, **request}, _GUIDED, {"width": 96, "num_frames": 17})


@tiny("CosmosTextToWorldPipeline")
def cosmos_text_to_world() -> Tiny:
    return _cosmos_1(diffusers.CosmosTextToWorldPipeline, 16)


@tiny("CosmosVideoToWorldPipeline")
def cosmos_video_to_world() -> Tiny:
    return _cosmos_1(diffusers.CosmosVideoToWorldPipeline, 17, image=picture())


@tiny("Cosmos2TextToImagePipeline")
def cosmos2_text_to_image() -> Tiny:
    pipe = diffusers.Cosmos2TextToImagePipeline(**_parts(transformer=_transformer(in_channels=16)))
    return Tiny(pipe, _REQUEST | {"num_frames": OMIT}, _GUIDED, {"width": 96})


@tiny("Cosmos2VideoToWorldPipeline")
def cosmos2_video_to_world() -> Tiny:
    pipe = diffusers.Cosmos2VideoToWorldPipeline(**_parts(transformer=_transformer()))
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


def _scheduler_25() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


@tiny("Cosmos2_5_PredictBasePipeline")
def cosmos25_predict() -> Tiny:
    pipe = diffusers.Cosmos2_5_PredictBasePipeline(**_parts(transformer=_transformer(), scheduler=_scheduler_25()))
    return Tiny(pipe, _REQUEST | {"video": clip(5), "num_latent_conditional_frames": 1}, _GUIDED, _LARGER)


@tiny("Cosmos2_5_TransferPipeline")
def cosmos25_transfer() -> Tiny:
    pictures = {"img_context_dim_in": WIDTH, "img_context_dim_out": WIDTH, "extra_pos_embed_type": "learnable"}
    transformer = _transformer(controlnet_block_every_n=2, img_context_num_tokens=4, **pictures)
    controlnet = diffusers.CosmosControlNetModel(
        **_SIZES, n_controlnet_blocks=2, in_channels=18, latent_channels=18, model_channels=32, **pictures
    )
    parts = _parts(transformer=transformer, scheduler=_scheduler_25(), controlnet=wake(controlnet))
    # two chunks of frames, one after the other
    frames = {"controls": clip(9), "num_frames": 9, "num_frames_per_chunk": 5}
    return Tiny(diffusers.Cosmos2_5_TransferPipeline(**parts), _REQUEST | frames, _GUIDED, {"width": 96})


class Tokenizer:
    """Makes a token of each letter."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        """All special tokens are one."""
        return 2

    def apply_chat_template(self, conversations: Any, **settings: Any) -> Any:
        """The letters of the last message."""
        return SimpleNamespace(input_ids=[3 + ord(letter) % 60 for letter in conversations[-1]["content"]])


def cosmos_3_transformer() -> diffusers.Cosmos3OmniTransformer:
    transformer = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        latent_channel=16,
        patch_latent_dim=64,
        num_attention_heads=2,
        num_hidden_layers=4,
        num_key_value_heads=1,
        rope_axes_dim=[4, 2, 2],
        vocab_size=64,
    )
    return wake(transformer)


@tiny("Cosmos3OmniPipeline")
def cosmos3_omni() -> Tiny:
    pipe = diffusers.Cosmos3OmniPipeline(
        transformer=cosmos_3_transformer(),
        text_tokenizer=Tokenizer(),
        vae=wan_vae(),
        scheduler=_scheduler_25(),
        enable_safety_checker=False,
        default_use_system_prompt=False,
    )
    request = {"prompt": "a dog", "guidance_scale": 1.0, "height": 64, "width": 64, "num_frames": 5}
    templates = {"add_resolution_template": False, "add_duration_template": False}
    return Tiny(pipe, request | templates, _GUIDED | {"negative_prompt": "bad"}, _LARGER)
