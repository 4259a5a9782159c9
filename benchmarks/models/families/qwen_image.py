"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)

from benchmarks.models.tiny import (
    TextEncoder,
    Tiny,
    flow,
    limit_area,
    mask,
    numbers,
    ones,
    picture,
    qwen_vae,
    tiny,
    wake,
)

TEXT, WIDTH = 12, 32


def _sizes(**config: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return sizes | config


def _parts(processor: bool = False, **config: Any) -> dict[str, Any]:
    scheduler = flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    transformer = diffusers.QwenImageTransformer2DModel(**_sizes(**config))
    parts = {"text_encoder": None, "tokenizer": None, "vae": qwen_vae(), "scheduler": scheduler}
    return {**parts, "transformer": transformer} | ({"processor": None} if processor else {})


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_embeds_mask": ones(1, TEXT),
    "true_cfg_scale": 1.0,
}
_SIZE = {"height": 64, "width": 64}
_IMAGE = {"image": picture(), "strength": 0.8}
_GUIDED = {
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_embeds_mask": ones(1, TEXT),
    "true_cfg_scale": 4.0,
}
_LARGER = {"width": 96}


@tiny("QwenImagePipeline")
def qwen_image() -> Tiny:
    return Tiny(diffusers.QwenImagePipeline(**_parts()), _REQUEST | _SIZE, _GUIDED, _LARGER)


@tiny("QwenImageImg2ImgPipeline")
def image_to_image() -> Tiny:
    return Tiny(diffusers.QwenImageImg2ImgPipeline(**_parts()), _REQUEST | _SIZE | _IMAGE, _GUIDED, _LARGER, 10)


@tiny("QwenImageInpaintPipeline")
def inpaint() -> Tiny:
    request = _REQUEST | _SIZE | _IMAGE | {"mask_image": mask()}
    return Tiny(diffusers.QwenImageInpaintPipeline(**_parts()), request, _GUIDED, _LARGER, 10)


@tiny("QwenImageEditPipeline")
def edit() -> Tiny:
    limit_area(pipeline_qwenimage_edit)
    pipe = diffusers.QwenImageEditPipeline(**_parts(processor=True))
    return Tiny(pipe, _REQUEST | _SIZE | {"image": picture()}, _GUIDED, _LARGER)


def _edit_plus(**config: Any) -> Tiny:
    limit_area(pipeline_qwenimage_edit_plus)
    pipe = diffusers.QwenImageEditPlusPipeline(**_parts(processor=True, **config))
    return Tiny(pipe, _REQUEST | _SIZE | {"image": [picture(), picture(seed=1)]}, _GUIDED, _LARGER)


@tiny("QwenImageEditPlusPipeline")
def edit_plus() -> Tiny:
    return _edit_plus()


@tiny("QwenImageEditPlusPipeline (2511)")
def edit_2511() -> Tiny:
    return _edit_plus(zero_cond_t=True)


@tiny("QwenImageEditInpaintPipeline")
def edit_inpaint() -> Tiny:
    limit_area(pipeline_qwenimage_edit_inpaint)
    pipe = diffusers.QwenImageEditInpaintPipeline(**_parts(processor=True))
    larger = {"image": picture().resize((128, 64)), "mask_image": mask().resize((128, 64))}  # 96×32
    return Tiny(pipe, _REQUEST | _IMAGE | {"mask_image": mask()}, _GUIDED, larger, 10)


@tiny("QwenImageLayeredPipeline")
def layered() -> Tiny:
    limit_area(pipeline_qwenimage_layered)
    parts = _parts(processor=True, use_additional_t_cond=True, use_layer3d_rope=True)
    parts |= {"text_encoder": TextEncoder(), "vae": qwen_vae(input_channels=4)}
    # with "latent", the pipeline fails: it returns a variable that it didn't set
    request = _REQUEST | {"prompt": "a cat", "image": picture().convert("RGBA"), "layers": 2, "output_type": "pt"}
    return Tiny(diffusers.QwenImageLayeredPipeline(**parts), request, _GUIDED, {"layers": 3})


def _controlnet(**config: Any) -> diffusers.QwenImageControlNetModel:
    controlnet = diffusers.QwenImageControlNetModel(**_sizes(num_layers=2), **config)
    wake(controlnet)
    return controlnet


@tiny("QwenImageControlNetPipeline")
def controlled() -> Tiny:
    pipe = diffusers.QwenImageControlNetPipeline(**_parts(), controlnet=_controlnet())
    larger = _LARGER | {"control_image": picture().resize((96, 64))}
    return Tiny(pipe, _REQUEST | _SIZE | {"control_image": picture()}, _GUIDED, larger)


@tiny("QwenImageControlNetInpaintPipeline")
def controlled_inpaint() -> Tiny:
    pipe = diffusers.QwenImageControlNetInpaintPipeline(**_parts(), controlnet=_controlnet(extra_condition_channels=4))
    larger = _LARGER | {"control_image": picture().resize((96, 64)), "control_mask": mask().resize((96, 64))}
    return Tiny(pipe, _REQUEST | _SIZE | {"control_image": picture(), "control_mask": mask()}, _GUIDED, larger)
