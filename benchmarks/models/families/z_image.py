"""Z-Image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from benchmarks.models.tiny import TextEncoder, Tiny, flow, kl_vae, mask, numbers, picture, tiny, wake

TEXT, WIDTH = 12, 32
_SHARED: dict[str, Any] = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 2}


def _parts(**config: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"n_layers": 4, "cap_feat_dim": WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]}
    transformer = diffusers.ZImageTransformer2DModel(**_SHARED | sizes | config)
    vae = kl_vae(16, scaling_factor=0.36, shift_factor=0.12)
    return {
        "text_encoder": None,
        "tokenizer": None,
        "vae": vae,
        "scheduler": flow(shift=3.0),
        "transformer": transformer,
    }


_REQUEST = {"prompt_embeds": [numbers(TEXT, WIDTH)], "guidance_scale": 0.0, "height": 64, "width": 64}
_IMAGE = {"image": picture(), "strength": 0.8}
_GUIDED = {"guidance_scale": 4.0, "negative_prompt_embeds": [numbers(TEXT, WIDTH, seed=2)]}
_LARGER = {"width": 96}
_LARGER_IMAGE = _LARGER | {"image": picture().resize((96, 64))}


@tiny("ZImagePipeline")
def z_image() -> Tiny:
    return Tiny(diffusers.ZImagePipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("ZImageImg2ImgPipeline")
def image_to_image() -> Tiny:
    return Tiny(diffusers.ZImageImg2ImgPipeline(**_parts()), _REQUEST | _IMAGE, _GUIDED, _LARGER_IMAGE, 10)


@tiny("ZImageInpaintPipeline")
def inpaint() -> Tiny:
    request = _REQUEST | _IMAGE | {"mask_image": mask()}
    return Tiny(diffusers.ZImageInpaintPipeline(**_parts()), request, _GUIDED, _LARGER_IMAGE, 10)


def _controlnet(**config: Any) -> diffusers.ZImageControlNetModel:
    controlnet = diffusers.ZImageControlNetModel(control_layers_places=[0, 2], **_SHARED | config)
    wake(controlnet)
    return controlnet


@tiny("ZImageControlNetPipeline")
def controlled() -> Tiny:
    pipe = diffusers.ZImageControlNetPipeline(**_parts(), controlnet=_controlnet(control_in_dim=16))
    return Tiny(pipe, _REQUEST | {"control_image": picture()}, _GUIDED, _LARGER)


@tiny("ZImageControlNetInpaintPipeline")
def controlled_inpaint() -> Tiny:
    controlnet = _controlnet(
        control_in_dim=33, control_refiner_layers_places=[0, 1], add_control_noise_refiner="control_noise_refiner"
    )
    pipe = diffusers.ZImageControlNetInpaintPipeline(**_parts(), controlnet=controlnet)
    request = _REQUEST | {"image": picture(), "mask_image": mask(), "control_image": picture(seed=1)}
    return Tiny(pipe, request, _GUIDED, _LARGER)


class _Siglip(TextEncoder):
    """Stands for the vision encoder: 4×4 patches of a picture."""

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=numbers(1, 16, WIDTH, seed=3))


class _SiglipInputs(dict[str, Any]):
    spatial_shapes = ((4, 4),)

    def to(self, device: torch.device) -> _SiglipInputs:
        return self


def _siglip_processor(**inputs: Any) -> _SiglipInputs:
    return _SiglipInputs()


def _omni() -> diffusers.ZImageOmniPipeline:
    parts = _parts(siglip_feat_dim=WIDTH)
    parts["vae"].to(torch.bfloat16)  # which is what the pipeline gives it
    return diffusers.ZImageOmniPipeline(**parts, siglip=_Siglip(), siglip_processor=_siglip_processor)


@tiny("ZImageOmniPipeline")
def omni() -> Tiny:
    guided = {"guidance_scale": 4.0, "negative_prompt_embeds": [[numbers(TEXT, WIDTH, seed=2)]]}
    return Tiny(_omni(), _REQUEST | {"prompt_embeds": [[numbers(TEXT, WIDTH)]]}, guided, _LARGER)


@tiny("ZImageOmniPipeline (image)")
def omni_with_image() -> Tiny:
    # embeddings of the parts of the prompt before and after the picture, and before the new one
    texts = [[[numbers(length, WIDTH, seed=seed + length) for length in (5, 4, 3)]] for seed in (1, 2)]
    guided = {"guidance_scale": 4.0, "negative_prompt_embeds": texts[1]}
    return Tiny(_omni(), _REQUEST | {"prompt_embeds": texts[0], "image": [picture()]}, guided, _LARGER)
