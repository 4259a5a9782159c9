"""Bria 3.2 and FIBO."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, picture, tiny, wan_vae

TEXT, WIDTH = 12, 32
_SIZES: dict[str, Any] = {
    "num_layers": 3,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 6, 6],
}
_SIZE = {"height": 64, "width": 64, "guidance_scale": 1.0}
_LARGER = {"width": 96}


def _parts(**parts: Any) -> dict[str, Any]:
    return {"text_encoder": None, "tokenizer": None, "scheduler": flow(use_dynamic_shifting=True), **parts}


@tiny("BriaPipeline")
def bria() -> Tiny:
    transformer = diffusers.BriaTransformer2DModel(in_channels=64, joint_attention_dim=WIDTH, **_SIZES)
    pipe = diffusers.BriaPipeline(**_parts(vae=kl_vae(16, shift_factor=0.0), transformer=transformer))
    request = {"prompt_embeds": numbers(1, TEXT, WIDTH), **_SIZE}
    guided = {"negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2), "guidance_scale": 4.0}
    return Tiny(pipe, request, guided, _LARGER)


def _fibo_parts() -> dict[str, Any]:
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=16, joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH, **_SIZES
    )
    return _parts(vae=wan_vae(), transformer=transformer)


def _encode_prompt(**others: Any) -> tuple[Any, ...]:
    """Embeddings, ids, masks and the text encoder's layers, for the prompt and for the negative one."""
    prompts = [numbers(1, TEXT, 2 * WIDTH, seed=seed) for seed in (1, 2)]
    layers = [[numbers(1, TEXT, WIDTH, seed=seed + layer) for layer in range(7)] for seed in (10, 20)]
    mask = torch.ones(1, TEXT)
    return (*prompts, torch.zeros(TEXT, 3), mask, mask, *layers)


@tiny("BriaFiboPipeline")
def fibo() -> Tiny:
    pipe = diffusers.BriaFiboPipeline(**_fibo_parts())
    pipe.encode_prompt = _encode_prompt
    return Tiny(pipe, {"prompt": "{}", **_SIZE}, {"guidance_scale": 4.0}, _LARGER)


@tiny("BriaFiboEditPipeline")
def fibo_edit() -> Tiny:
    pipe = diffusers.BriaFiboEditPipeline(**_fibo_parts())
    pipe.encode_prompt = _encode_prompt
    request = {"prompt": {"edit_instruction": "a cat"}, "image": picture(), **_SIZE}
    return Tiny(pipe, request, {"guidance_scale": 4.0}, _LARGER)
