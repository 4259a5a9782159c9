"""HunyuanDiT."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, kl_vae, numbers, ones, picture, tiny, wake

TEXT, TEXT_T5, WIDTH, WIDTH_T5 = 6, 8, 32, 24


def _sizes() -> dict[str, Any]:
    return {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 32,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH_T5,
        "pooled_projection_dim": 16,
        "text_len": TEXT,
        "text_len_t5": TEXT_T5,
    }


def _parts() -> dict[str, Any]:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return {
        **parts,
        "vae": kl_vae(4),
        "transformer": diffusers.HunyuanDiT2DModel(**_sizes(), num_layers=6),
        "scheduler": diffusers.DDPMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "prompt_embeds_2": numbers(1, TEXT_T5, WIDTH_T5, seed=2),
    "prompt_attention_mask_2": ones(1, TEXT_T5),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=3),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "negative_prompt_embeds_2": numbers(1, TEXT_T5, WIDTH_T5, seed=4),
    "negative_prompt_attention_mask_2": ones(1, TEXT_T5),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "use_resolution_binning": False,
}
_GUIDED = {"guidance_scale": 5.0}
_LARGER = {"width": 96}


@tiny("HunyuanDiTPipeline")
def hunyuandit() -> Tiny:
    return Tiny(diffusers.HunyuanDiTPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("HunyuanDiTPAGPipeline")
def perturbed_attention() -> Tiny:
    # the pipeline has no perturbed attention without classifier-free guidance
    request, guided = _REQUEST | {"pag_scale": 0.0}, _GUIDED | {"pag_scale": 3.0}
    return Tiny(diffusers.HunyuanDiTPAGPipeline(**_parts()), request, guided, _LARGER)


@tiny("HunyuanDiTControlNetPipeline")
def controlnet() -> Tiny:
    control = wake(diffusers.HunyuanDiT2DControlNetModel(**_sizes(), transformer_num_layers=6))
    pipe = diffusers.HunyuanDiTControlNetPipeline(**_parts(), controlnet=control)
    return Tiny(pipe, _REQUEST | {"control_image": picture()}, _GUIDED, _LARGER)
