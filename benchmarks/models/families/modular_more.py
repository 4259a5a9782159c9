"""More modular pipelines: turbo and distilled variants, image editing, and videos."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.models.transformers import transformer_wan_animate_2
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.models.families.cosmos import Tokenizer, cosmos_3_transformer
from benchmarks.models.families.modular import (
    FLUX_2,
    GUIDED,
    LARGER,
    LONGER,
    MASKS,
    NEGATIVE_MASKS,
    QWEN_IMAGE,
    REQUEST,
    TEXT,
    UNGUIDED,
    WAN,
    WIDTH,
    krea_2_transformer,
    ltx_2_parts,
    ltx_2_request,
    modular,
    qwen_image_21_transformer,
    unipc,
    wan_transformer,
)
from benchmarks.models.tiny import OMIT, Tiny, flow, numbers, picture, qwen_vae, tiny, wake, wan_vae


@tiny("ModularPipeline (FLUX.2 klein distilled)")
def flux_2_klein_distilled() -> Tiny:
    transformer = diffusers.Flux2Transformer2DModel(**FLUX_2, timestep_guidance_channels=32, guidance_embeds=False)
    scheduler = flow(use_dynamic_shifting=True)
    pipe = modular("Flux2KleinAutoBlocks", "text2image", scheduler=scheduler, transformer=transformer)
    return Tiny(pipe, REQUEST, larger=LARGER)


@tiny("ModularPipeline (Krea 2 Turbo)")
def krea_2_turbo() -> Tiny:
    scheduler = flow(use_dynamic_shifting=True)
    pipe = modular("Krea2TurboAutoBlocks", "text2image", scheduler=scheduler, transformer=krea_2_transformer())
    return Tiny(pipe, REQUEST | MASKS | {"prompt_embeds": numbers(1, TEXT, 2, WIDTH)}, larger=LARGER)


@tiny("ModularPipeline (Qwen-Image 2.1 Turbo)")
def qwen_image_21_turbo() -> Tiny:
    parts = {"scheduler": flow(use_dynamic_shifting=True), "transformer": qwen_image_21_transformer()}
    pipe = modular("QwenImage21TurboAutoBlocks", "text2image", **parts)
    masks = MASKS | {"image_pad_mask": torch.zeros(1, TEXT, dtype=torch.bool)}
    return Tiny(pipe, REQUEST | masks, larger=LARGER)


def _qwen_edit(blocks: str, workflow: str | None, **config: Any) -> diffusers.ModularPipeline:
    scheduler = flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    transformer = diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE | config)
    return modular(blocks, workflow, ["vae_encoder"], scheduler=scheduler, transformer=transformer, vae=qwen_vae())


_EDIT = REQUEST | MASKS | UNGUIDED | {"image_latents": numbers(1, 16, 1, 8, 8, seed=5)}
_EDIT_GUIDED = GUIDED | NEGATIVE_MASKS


@tiny("ModularPipeline (Qwen-Image-Edit)")
def qwen_image_edit() -> Tiny:
    pipe = _qwen_edit("QwenImageEditAutoBlocks", "image_conditioned")
    return Tiny(pipe, _EDIT, _EDIT_GUIDED, LARGER)


@tiny("ModularPipeline (Qwen-Image-Edit-Plus)")
def qwen_image_edit_plus() -> Tiny:
    pipe = _qwen_edit("QwenImageEditPlusAutoBlocks", None)
    pictures = [numbers(1, 16, 1, 8, 8, seed=seed) for seed in (5, 6)]
    return Tiny(pipe, _EDIT | {"image_latents": pictures}, _EDIT_GUIDED, LARGER)


@tiny("ModularPipeline (Qwen-Image-Layered)")
def qwen_image_layered() -> Tiny:
    pipe = _qwen_edit(
        "QwenImageLayeredAutoBlocks", None, use_layer3d_rope=True, use_additional_t_cond=True, zero_cond_t=False
    )
    # what its encoder returns: the frames come before the channels
    request = _EDIT | {"height": OMIT, "width": OMIT, "layers": 2, "image_latents": numbers(1, 1, 16, 8, 8, seed=5)}
    return Tiny(pipe, request, _EDIT_GUIDED, {"image_latents": numbers(1, 1, 16, 8, 12, seed=5)})


@tiny("ModularPipeline (Wan image-to-video)")
def wan_image_to_video() -> Tiny:
    transformer = wan_transformer(in_channels=36, image_dim=4, added_kv_proj_dim=24)
    parts = {"scheduler": unipc(), "transformer": transformer, "vae": wan_vae()}
    pipe = modular("WanImage2VideoAutoBlocks", "image2video", ["image_encoder"], **parts)
    embeds = {"image_embeds": numbers(1, 4, 4, seed=3), "image": picture(), "num_frames": 5}
    return Tiny(pipe, REQUEST | GUIDED | UNGUIDED | embeds, GUIDED, LONGER)


def _helios(blocks: str, scheduler: Any) -> diffusers.ModularPipeline:
    sizes = {name: size for name, size in WAN.items() if name != "rope_max_seq_len"}
    transformer = wake(diffusers.HeliosTransformer3DModel(**sizes, rope_dim=(4, 4, 4)))
    return modular(blocks, "text2video", scheduler=scheduler, transformer=transformer)


_HELIOS = REQUEST | GUIDED | UNGUIDED | {"num_frames": 9, "num_latent_frames_per_chunk": 3, "output": "latent_chunks"}
_PYRAMID = {"pyramid_num_inference_steps_list": [4, 4, 4], "num_inference_steps": OMIT}


@tiny("ModularPipeline (Helios)")
def helios() -> Tiny:
    pipe = _helios(
        "HeliosAutoBlocks", diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    )
    return Tiny(pipe, _HELIOS | {"num_frames": 17}, GUIDED, LARGER)


@tiny("ModularPipeline (Helios pyramid)")
def helios_pyramid() -> Tiny:
    pipe = _helios("HeliosPyramidAutoBlocks", diffusers.HeliosScheduler(gamma=0.3))
    return Tiny(pipe, _HELIOS | _PYRAMID, GUIDED, {"width": 128})


@tiny("ModularPipeline (Helios pyramid, distilled)")
def helios_pyramid_distilled() -> Tiny:
    pipe = _helios("HeliosPyramidDistilledAutoBlocks", diffusers.HeliosDMDScheduler(gamma=0.3))
    return Tiny(pipe, _HELIOS | _PYRAMID, larger={"width": 128})


@tiny("ModularPipeline (LTX-2.5)")
def ltx_25() -> Tiny:
    pipe = modular("LTX25AutoBlocks", "text2video", **ltx_2_parts())
    return ltx_2_request(pipe)


@tiny("ModularPipeline (Echo)")
def echo() -> Tiny:
    parts = ltx_2_parts()
    del parts["scheduler"]  # its sigmas are arguments, and its steps its own
    return replace(ltx_2_request(modular("EchoBlocks", **parts)), guided={})


def _cosmos_3(blocks: str, scheduler: Any, **config: Any) -> diffusers.ModularPipeline:
    parts = {"vae": wan_vae(), "transformer": cosmos_3_transformer(), "text_tokenizer": Tokenizer()}
    pipe = modular(blocks, "text2video", scheduler=scheduler, **parts)
    pipe.update_components(**config)
    return pipe


_COSMOS_3 = REQUEST | {
    "prompt_embeds": OMIT,
    "cond_input_ids": list(range(3, 20)),
    "uncond_input_ids": list(range(20, 30)),
    "num_frames": 5,
    "guidance_scale": 1.0,
}


@tiny("ModularPipeline (Cosmos 3)")
def cosmos_3() -> Tiny:
    return Tiny(_cosmos_3("Cosmos3OmniBlocks", unipc()), _COSMOS_3, {"guidance_scale": 5.0}, LONGER)


@tiny("ModularPipeline (Cosmos 3 distilled)")
def cosmos_3_distilled() -> Tiny:
    sigmas = [1.0, 0.9, 0.8, 0.7, 0.6, 0.45, 0.3, 0.15]
    return Tiny(_cosmos_3("Cosmos3DistilledBlocks", flow(), distilled_sigmas=sigmas), _COSMOS_3, larger=LONGER)


def _uncompiled(*args: Any, **kwargs: Any) -> Any:
    return create_block_mask(*args, **kwargs | {"_compile": False})


def _wan_animate_2(blocks: str, scheduler: Any) -> Tiny:
    transformer = diffusers.WanAnimate2Transformer3DModel(
        in_dim=36,
        dim=24,
        ffn_dim=48,
        freq_dim=32,
        text_dim=WIDTH,
        num_heads=2,
        num_layers=3,
        use_img_emb=False,
        text_len=TEXT,
    )
    # compiling the mask takes longer than everything else
    vars(transformer_wan_animate_2)["create_block_mask"] = _uncompiled
    parts = {"vae": wan_vae(), "transformer": wake(transformer), "scheduler": scheduler}
    pipe = modular(blocks, None, ["image_encoder", "video_encoder", "vae_encoder"], **parts)
    request = (
        REQUEST
        | GUIDED
        | UNGUIDED
        | {
            "prompt_ref_embeds": numbers(1, TEXT, WIDTH, seed=3),
            "condition_clip_context": numbers(1, 4, 24, seed=4),
            "reference_image_latents": numbers(20, 1, 8, 8, seed=5),
            "driving_video_pixels": numbers(1, 3, 5, 64, 64, seed=6),
            "num_segments": 1,
            "effective_segment": 4,
            "segment_frame_length": 5,
            "output": "segment_frames",
        }
    )
    larger = {
        "reference_image_latents": numbers(20, 1, 8, 12, seed=5),
        "driving_video_pixels": numbers(1, 3, 5, 64, 96, seed=6),
        "width": 96,
    }
    return Tiny(pipe, request, GUIDED, larger)


@tiny("ModularPipeline (Wan Animate 2)")
def wan_animate_2() -> Tiny:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return _wan_animate_2("WanAnimate2Blocks", scheduler)


@tiny("ModularPipeline (Wan Animate 2 distilled)")
def wan_animate_2_distilled() -> Tiny:
    return replace(_wan_animate_2("WanAnimate2DistilledBlocks", flow(shift=5.0)), guided={})
