"""The models whose blocks have a fused forward, for tests that are the same for all."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import peft
import rows
import tiny
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from fused import unfused_fails


@dataclass(frozen=True)
class Model:
    """A tiny pipeline.

    Attributes:
        build: builds the pipeline.
        classes: the classes of its blocks.
        blocks: the number of its blocks.
        lora: the layers of its blocks that get an adapter; a fused forward calls all of them.
        options: arguments for `build` with which all widths are divisible by 64.
    """

    build: Callable[..., Any]
    classes: tuple[type[torch.nn.Module], ...]
    blocks: int
    lora: tuple[str, ...]
    options: dict[str, Any]

    def all_fused(self) -> contextlib.AbstractContextManager[None]:
        """While open, a block that runs unfused raises an error."""
        return unfused_fails(*self.classes)

    def blocks_of(self, pipe: Any) -> list[torch.nn.Module]:
        return [module for module in pipe.transformer.modules() if isinstance(module, self.classes)]

    def add_lora(self, pipe: Any) -> None:
        """Add an adapter with random weights, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(self.lora), init_lora_weights=False)
            pipe.transformer.add_adapter(config, "lora")


def flux_2() -> diffusers.Flux2KleinPipeline:
    """Text to image without a text encoder: `latents` passes embeddings."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.Flux2KleinPipeline(scheduler, vae.eval(), None, None, modulated(rows.flux_2(), 1.5))


def ltx() -> diffusers.LTXPipeline:
    """Text to video without a text encoder: `latents` passes embeddings."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.LTXPipeline(scheduler, None, None, None, modulated(rows.ltx(), 0.1))


def hunyuan_video() -> diffusers.HunyuanVideoPipeline:
    """Text to video without a text encoder: `latents` passes embeddings."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.HunyuanVideoPipeline(None, None, modulated(rows.hunyuan_video(), 0.3), None, scheduler, None, None)


def modulated(transformer: Any, factor: float) -> Any:
    """Scale a random transformer's modulation, so that it is smooth in time and caches find something to reuse."""
    for name, parameter in transformer.named_parameters():
        modulates = ("modulation", "time_embed.linear", "scale_shift_table", "norm.linear", "norm1", "norm1_context")
        if any(part in name for part in modulates):
            parameter.data *= factor
    return transformer


#: Pipeline → the arguments of a request to one without a text encoder.
REQUESTS: dict[str, dict[str, Any]] = {
    "Flux2KleinPipeline": {"height": 16, "width": 16, "guidance_scale": 4.0},
    "HunyuanVideoPipeline": {"height": 32, "width": 32, "num_frames": 5},
    "LTXPipeline": {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0},
}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = ("add_k_proj", "add_q_proj", "to_add_out")
FEED_FORWARD = ("net.0.proj", "net.2")
MODELS = {
    "qwen_image": Model(
        tiny.qwen_image, (QwenImageTransformerBlock,), 4, (*ATTENTION, *JOINT, *FEED_FORWARD, "img_mod.1"), {}
    ),
    "z_image": Model(
        tiny.z_image,
        (ZImageTransformerBlock,),
        6,
        (*ATTENTION, "w1", "w2", "w3", "layers.0.adaLN_modulation.0"),
        {"dim": 192, "n_heads": 6, "n_kv_heads": 6},
    ),
    "flux": Model(
        tiny.flux,
        (FluxTransformerBlock, FluxSingleTransformerBlock),
        4,
        (*ATTENTION, *JOINT, *FEED_FORWARD, "norm1.linear", "norm.linear", "proj_mlp", "proj_out"),
        {},
    ),
    "flux_2": Model(
        flux_2,
        (Flux2TransformerBlock, Flux2SingleTransformerBlock),
        5,
        (
            *(*ATTENTION, *JOINT, "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "attn.to_qkv_mlp_proj"),
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(3)),
        ),
        {},
    ),
    "hunyuan_video": Model(
        hunyuan_video,
        (HunyuanVideoTransformerBlock, HunyuanVideoSingleTransformerBlock),
        4,
        (*ATTENTION, *JOINT, *FEED_FORWARD, "norm1.linear", "norm.linear", "proj_mlp", "proj_out"),
        {},
    ),
    "ltx": Model(ltx, (LTXVideoTransformerBlock,), 2, (*ATTENTION, *FEED_FORWARD), {}),
    "wan": Model(
        tiny.wan,
        (WanTransformerBlock,),
        2,
        (*ATTENTION, *FEED_FORWARD),
        {"attention_head_dim": 32, "ffn_dim": 128},
    ),
}


def latents(pipe: Any, **arguments: Any) -> torch.Tensor:
    """The latents of a request of two steps."""
    request = REQUESTS.get(type(pipe).__name__)
    arguments = {"num_inference_steps": 2} | arguments
    if request is None:
        return tiny.generate(pipe, output_type="latent", **arguments)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1, 7, 32, generator=generator)
    embeds, there = {"prompt_embeds": first, "negative_prompt_embeds": second}, torch.arange(7)[None] < 5
    if type(pipe).__name__ == "LTXPipeline":
        embeds |= {"prompt_attention_mask": there, "negative_prompt_attention_mask": there}
    if type(pipe).__name__ == "HunyuanVideoPipeline":
        embeds = {"prompt_embeds": first, "prompt_attention_mask": there, "pooled_prompt_embeds": first[:, 0, :16]}
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        (made,) = pipe(**embeds, **request, generator=generator, output_type="latent", return_dict=False, **arguments)
    return made
