"""The models whose blocks have a fused forward, for tests that are the same for all."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import tiny
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
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
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 2} | arguments)
