"""Modular pipelines: the blocks that denoise, without those that encode the prompt and decode the latents."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import modular_pipelines
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ComponentSpec

from benchmarks.models.tiny import OMIT, Tiny, flow, numbers, ones, tiny, wake

TEXT, WIDTH = 12, 32
#: Blocks that are left out; what the first of them return is then an input of the pipeline.
_LEFT_OUT = {"text_encoder", "decode", "prompt_upsampler", "prompt_upsample", "prompt_enhancer", "before_encode"}


def _pipe(blocks: str, workflow: str | None = None, **components: Any) -> diffusers.ModularPipeline:
    made = getattr(modular_pipelines, blocks)()
    if workflow:
        made = made.get_workflow(workflow)
    for name in [name for name in made.sub_blocks if name.split(".")[0] in _LEFT_OUT]:
        made.sub_blocks.pop(name)
    _silence(made)
    pipe = made.init_pipeline()
    pipe.update_components(**components)
    return pipe


def _silence(blocks: diffusers.ModularPipelineBlocks) -> None:
    """Switch the progress bars of all inner blocks off; the pipeline reaches the outermost only."""
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        _silence(block)


def _guidance(scale: float) -> diffusers.ClassifierFreeGuidance:
    config = FrozenDict({"guidance_scale": scale})
    return ComponentSpec("guider", diffusers.ClassifierFreeGuidance, config=config).create()


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "height": 64,
    "width": 64,
    "output": "latents",
    "output_type": OMIT,
    "return_dict": OMIT,
}
_UNGUIDED = {"guider": _guidance(1.0)}
_GUIDED = {"guider": _guidance(4.0), "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2)}
_MASKS = {"prompt_embeds_mask": ones(1, TEXT).bool()}
_NEGATIVE_MASKS = {"negative_prompt_embeds_mask": ones(1, TEXT).bool()}
_LARGER = {"width": 96}


def _flux(**config: Any) -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


@tiny("ModularPipeline (FLUX.1)")
def flux() -> Tiny:
    pipe = _pipe("FluxAutoBlocks", "text2image", scheduler=flow(use_dynamic_shifting=True), transformer=_flux())
    return Tiny(pipe, _REQUEST | {"pooled_prompt_embeds": numbers(1, 24, seed=3)}, larger=_LARGER)


_FLUX_2: dict[str, Any] = {
    "in_channels": 32,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 4, 4, 4),
}


@tiny("ModularPipeline (FLUX.2)")
def flux_2() -> Tiny:
    transformer = diffusers.Flux2Transformer2DModel(**_FLUX_2, timestep_guidance_channels=32)
    pipe = _pipe("Flux2AutoBlocks", "text2image", scheduler=flow(use_dynamic_shifting=True), transformer=transformer)
    return Tiny(pipe, _REQUEST, larger=_LARGER)


@tiny("ModularPipeline (FLUX.2 klein)")
def flux_2_klein() -> Tiny:
    transformer = diffusers.Flux2Transformer2DModel(**_FLUX_2, timestep_guidance_channels=32, guidance_embeds=False)
    scheduler = flow(use_dynamic_shifting=True)
    pipe = _pipe("Flux2KleinBaseAutoBlocks", "text2image", scheduler=scheduler, transformer=transformer)
    return Tiny(pipe, _REQUEST | _UNGUIDED, _GUIDED, _LARGER)


@tiny("ModularPipeline (FLUX.3)")
def flux_3() -> Tiny:
    transformer = diffusers.Flux3Transformer2DModel(**_FLUX_2, cond_in_channels=32, timestep_channels=32)
    pipe = _pipe("Flux3AutoBlocks", "text2image", transformer=transformer)
    return Tiny(pipe, _REQUEST | _UNGUIDED, _GUIDED, _LARGER)


@tiny("ModularPipeline (FLUX.3 distilled)")
def flux_3_distilled() -> Tiny:
    transformer = diffusers.Flux3Transformer2DModel(**_FLUX_2, cond_in_channels=32, timestep_channels=32, flow_map=True)
    pipe = _pipe("Flux3DistilledAutoBlocks", "text2image", transformer=transformer)
    return Tiny(pipe, _REQUEST, larger=_LARGER)


def _wan() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=32,
    )


def _unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


_LONGER = {"width": 96, "num_frames": 9}


@tiny("ModularPipeline (Wan)")
def wan() -> Tiny:
    pipe = _pipe("WanBlocks", scheduler=_unipc(), transformer=_wan())
    return Tiny(pipe, _REQUEST | _UNGUIDED | _GUIDED | _UNGUIDED | {"num_frames": 5}, _GUIDED, _LONGER)


@tiny("ModularPipeline (Wan 2.2)")
def wan_22() -> Tiny:
    pipe = _pipe("Wan22Blocks", scheduler=_unipc(), transformer=_wan(), transformer_2=_wan())
    unguided = _GUIDED | _UNGUIDED | {"guider_2": _guidance(1.0), "num_frames": 5}
    return Tiny(pipe, _REQUEST | unguided, _GUIDED | {"guider_2": _guidance(3.0)}, _LONGER)


@tiny("ModularPipeline (Qwen-Image)")
def qwen_image() -> Tiny:
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    pipe = _pipe("QwenImageAutoBlocks", "text2image", scheduler=scheduler, transformer=transformer)
    return Tiny(pipe, _REQUEST | _MASKS | _UNGUIDED, _GUIDED | _NEGATIVE_MASKS, _LARGER)


@tiny("ModularPipeline (Qwen-Image 2.1)")
def qwen_image_21() -> Tiny:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = flow(use_dynamic_shifting=True)
    pipe = _pipe("QwenImage21AutoBlocks", "text2image", scheduler=scheduler, transformer=transformer)
    masks = _MASKS | {"image_pad_mask": ones(1, TEXT) * 0}
    negative = _NEGATIVE_MASKS | {"negative_image_pad_mask": ones(1, TEXT) * 0}
    return Tiny(pipe, _REQUEST | masks | _UNGUIDED, _GUIDED | negative, _LARGER)


@tiny("ModularPipeline (Z-Image)")
def z_image() -> Tiny:
    transformer = diffusers.ZImageTransformer2DModel(
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    pipe = _pipe("ZImageAutoBlocks", "text2image", scheduler=flow(shift=3.0), transformer=transformer)
    request = _REQUEST | _UNGUIDED | {"prompt_embeds": [numbers(TEXT, WIDTH)]}
    return Tiny(pipe, request, _GUIDED | {"negative_prompt_embeds": [numbers(TEXT, WIDTH, seed=2)]}, _LARGER)


@tiny("ModularPipeline (Stable Diffusion 3)")
def stable_diffusion_3() -> Tiny:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        qk_norm="rms_norm",
    )
    pipe = _pipe("StableDiffusion3AutoBlocks", "text2image", scheduler=flow(shift=3.0), transformer=transformer)
    request = _REQUEST | _UNGUIDED | {"pooled_prompt_embeds": numbers(1, 64, seed=3)}
    return Tiny(pipe, request, _GUIDED | {"negative_pooled_prompt_embeds": numbers(1, 64, seed=4)}, _LARGER)


@tiny("ModularPipeline (Krea 2)")
def krea_2() -> Tiny:
    transformer = diffusers.Krea2Transformer2DModel(
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = _pipe("Krea2AutoBlocks", "text2image", scheduler=flow(use_dynamic_shifting=True), transformer=transformer)
    request = _REQUEST | _MASKS | _UNGUIDED | {"prompt_embeds": numbers(1, TEXT, 2, WIDTH)}
    guided = _GUIDED | _NEGATIVE_MASKS | {"negative_prompt_embeds": numbers(1, TEXT, 2, WIDTH, seed=2)}
    return Tiny(pipe, request, guided, _LARGER)


@tiny("ModularPipeline (LTX-Video)")
def ltx() -> Tiny:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=WIDTH,
    )
    pipe = _pipe("LTXAutoBlocks", "text2video", scheduler=flow(), transformer=transformer)
    request = _REQUEST | _UNGUIDED | {"prompt_attention_mask": ones(1, TEXT), "num_frames": 9}
    guided = _GUIDED | {"negative_prompt_attention_mask": ones(1, TEXT)}
    return Tiny(pipe, request, guided, {"width": 96, "num_frames": 17})


@tiny("ModularPipeline (ERNIE-Image)")
def ernie_image() -> Tiny:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=4,
        ffn_hidden_size=64,
        in_channels=32,
        out_channels=32,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    pipe = _pipe("ErnieImageAutoBlocks", "text2image", scheduler=flow(shift=3.0), transformer=wake(transformer))
    request = _REQUEST | _UNGUIDED | {"prompt_embeds": [numbers(TEXT, WIDTH)]}
    return Tiny(pipe, request, _GUIDED | {"negative_prompt_embeds": [numbers(TEXT, WIDTH, seed=2)]}, _LARGER)
