"""Modular pipelines: the blocks that denoise, without those that encode the prompt and decode the latents."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import diffusers
import torch
from diffusers import modular_pipelines
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ComponentSpec

from benchmarks.models.tiny import (
    OMIT,
    STEPS,
    Tiny,
    clip,
    flow,
    kl_vae,
    numbers,
    ones,
    picture,
    qwen_vae,
    tiny,
    wake,
    wan_vae,
)

TEXT, WIDTH = 12, 32
#: Blocks that are left out; what the first of them return is then an input of the pipeline.
_LEFT_OUT = {
    *("before_encode", "duration", "prompt_enhancer", "prompt_upsample", "prompt_upsampler"),
    *("semantic_generator", "text_encoder", "decode"),
}


def modular(
    blocks: str, workflow: str | None = None, without: Collection[str] = (), **components: Any
) -> diffusers.ModularPipeline:
    """The denoising blocks of a modular pipeline, with these components; `without` names more that are left out."""
    made = getattr(modular_pipelines, blocks)()
    if workflow:
        made = made.get_workflow(workflow)
    for name in [name for name in made.sub_blocks if name.split(".")[0] in {*_LEFT_OUT, *without}]:
        made.sub_blocks.pop(name)
    _silence(made)
    pipe = _kind(blocks)(blocks=made)
    pipe.update_components(**components)
    return pipe


@functools.cache
def _kind(blocks: str) -> type:
    """The pipeline class of diffusers that these blocks are the default of: several share a model's name."""
    kinds = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("ModularPipeline")]
    (found,) = [kind for kind in kinds if vars(kind).get("default_blocks_name") == blocks]
    return found


def _silence(blocks: diffusers.ModularPipelineBlocks) -> None:
    """Switch the progress bars of all inner blocks off; the pipeline reaches the outermost only."""
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        _silence(block)


def guidance(scale: float) -> diffusers.ClassifierFreeGuidance:
    return _guider(diffusers.ClassifierFreeGuidance, guidance_scale=scale)


def _guider(kind: type, **config: Any) -> Any:
    return ComponentSpec("guider", kind, config=FrozenDict(config)).create()


REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "height": 64,
    "width": 64,
    "output": "latents",
    "output_type": OMIT,
    "return_dict": OMIT,
}
UNGUIDED = {"guider": guidance(1.0)}
GUIDED = {"guider": guidance(4.0), "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2)}
MASKS = {"prompt_embeds_mask": ones(1, TEXT).bool()}
NEGATIVE_MASKS = {"negative_prompt_embeds_mask": ones(1, TEXT).bool()}
LARGER = {"width": 96}


def _flux() -> diffusers.FluxTransformer2DModel:
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
    pipe = modular("FluxAutoBlocks", "text2image", scheduler=flow(use_dynamic_shifting=True), transformer=_flux())
    return Tiny(pipe, REQUEST | {"pooled_prompt_embeds": numbers(1, 24, seed=3)}, larger=LARGER)


@tiny("ModularPipeline (FLUX.1 image-to-image)")
def flux_image_to_image() -> Tiny:
    vae = kl_vae(16, scaling_factor=0.36, shift_factor=0.12)
    scheduler = flow(use_dynamic_shifting=True)
    pipe = modular("FluxAutoBlocks", "image2image", scheduler=scheduler, transformer=_flux(), vae=vae)
    request = REQUEST | {"pooled_prompt_embeds": numbers(1, 24, seed=3), "image": picture(), "strength": 0.9}
    return Tiny(pipe, request, larger=LARGER)


FLUX_2: dict[str, Any] = {
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
    transformer = diffusers.Flux2Transformer2DModel(**FLUX_2, timestep_guidance_channels=32)
    pipe = modular("Flux2AutoBlocks", "text2image", scheduler=flow(use_dynamic_shifting=True), transformer=transformer)
    return Tiny(pipe, REQUEST, larger=LARGER)


@tiny("ModularPipeline (FLUX.2 klein)")
def flux_2_klein() -> Tiny:
    transformer = diffusers.Flux2Transformer2DModel(**FLUX_2, timestep_guidance_channels=32, guidance_embeds=False)
    scheduler = flow(use_dynamic_shifting=True)
    pipe = modular("Flux2KleinBaseAutoBlocks", "text2image", scheduler=scheduler, transformer=transformer)
    return Tiny(pipe, REQUEST | UNGUIDED, GUIDED, LARGER)


@tiny("ModularPipeline (FLUX.3)")
def flux_3() -> Tiny:
    transformer = diffusers.Flux3Transformer2DModel(**FLUX_2, cond_in_channels=32, timestep_channels=32)
    pipe = modular("Flux3AutoBlocks", "text2image", transformer=transformer)
    return Tiny(pipe, REQUEST | UNGUIDED, GUIDED, LARGER)


@tiny("ModularPipeline (FLUX.3 distilled)")
def flux_3_distilled() -> Tiny:
    transformer = diffusers.Flux3Transformer2DModel(**FLUX_2, cond_in_channels=32, timestep_channels=32, flow_map=True)
    pipe = modular("Flux3DistilledAutoBlocks", "text2image", transformer=transformer)
    return Tiny(pipe, REQUEST, larger=LARGER)


WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def wan_transformer(**config: Any) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(**WAN | config)


def unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


LONGER = {"width": 96, "num_frames": 9}


@tiny("ModularPipeline (Wan)")
def wan() -> Tiny:
    pipe = modular("WanBlocks", scheduler=unipc(), transformer=wan_transformer())
    return Tiny(pipe, REQUEST | GUIDED | UNGUIDED | {"num_frames": 5}, GUIDED, LONGER)


@tiny("ModularPipeline (Wan 2.2)")
def wan_22() -> Tiny:
    pipe = modular("Wan22Blocks", scheduler=unipc(), transformer=wan_transformer(), transformer_2=wan_transformer())
    unguided = GUIDED | UNGUIDED | {"guider_2": guidance(1.0), "num_frames": 5}
    return Tiny(pipe, REQUEST | unguided, GUIDED | {"guider_2": guidance(3.0)}, LONGER)


QWEN_IMAGE: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


@tiny("ModularPipeline (Qwen-Image)")
def qwen_image() -> Tiny:
    transformer = diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE)
    scheduler = flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    pipe = modular("QwenImageAutoBlocks", "text2image", scheduler=scheduler, transformer=transformer)
    return Tiny(pipe, REQUEST | MASKS | UNGUIDED, GUIDED | NEGATIVE_MASKS, LARGER)


def qwen_image_21_transformer() -> diffusers.QwenImage21Transformer2DModel:
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


@tiny("ModularPipeline (Qwen-Image 2.1)")
def qwen_image_21() -> Tiny:
    parts = {"scheduler": flow(use_dynamic_shifting=True), "transformer": qwen_image_21_transformer()}
    pipe = modular("QwenImage21AutoBlocks", "text2image", **parts)
    masks = MASKS | {"image_pad_mask": torch.zeros(1, TEXT, dtype=torch.bool)}
    negative = NEGATIVE_MASKS | {"negative_image_pad_mask": torch.zeros(1, TEXT, dtype=torch.bool)}
    return Tiny(pipe, REQUEST | masks | UNGUIDED, GUIDED | negative, LARGER)


def _z_image() -> diffusers.ZImageTransformer2DModel:
    return diffusers.ZImageTransformer2DModel(
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )


@tiny("ModularPipeline (Z-Image)")
def z_image() -> Tiny:
    pipe = modular("ZImageAutoBlocks", "text2image", scheduler=flow(shift=3.0), transformer=_z_image())
    request = REQUEST | UNGUIDED | {"prompt_embeds": [numbers(TEXT, WIDTH)]}
    return Tiny(pipe, request, GUIDED | {"negative_prompt_embeds": [numbers(TEXT, WIDTH, seed=2)]}, LARGER)


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
    pipe = modular("StableDiffusion3AutoBlocks", "text2image", scheduler=flow(shift=3.0), transformer=transformer)
    request = REQUEST | UNGUIDED | {"pooled_prompt_embeds": numbers(1, 64, seed=3)}
    return Tiny(pipe, request, GUIDED | {"negative_pooled_prompt_embeds": numbers(1, 64, seed=4)}, LARGER)


def krea_2_transformer() -> diffusers.Krea2Transformer2DModel:
    return diffusers.Krea2Transformer2DModel(
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


@tiny("ModularPipeline (Krea 2)")
def krea_2() -> Tiny:
    parts = {"scheduler": flow(use_dynamic_shifting=True), "transformer": krea_2_transformer()}
    pipe = modular("Krea2AutoBlocks", "text2image", **parts)
    request = REQUEST | MASKS | UNGUIDED | {"prompt_embeds": numbers(1, TEXT, 2, WIDTH)}
    guided = GUIDED | NEGATIVE_MASKS | {"negative_prompt_embeds": numbers(1, TEXT, 2, WIDTH, seed=2)}
    return Tiny(pipe, request, guided, LARGER)


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
    pipe = modular("LTXAutoBlocks", "text2video", scheduler=flow(), transformer=transformer)
    masks = {"prompt_attention_mask": ones(1, TEXT), "negative_prompt_attention_mask": ones(1, TEXT)}
    request = REQUEST | GUIDED | UNGUIDED | masks | {"num_frames": 9}
    return Tiny(pipe, request, GUIDED, {"width": 96, "num_frames": 17})


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
    pipe = modular("ErnieImageAutoBlocks", "text2image", scheduler=flow(shift=3.0), transformer=wake(transformer))
    request = REQUEST | UNGUIDED | {"prompt_embeds": [numbers(TEXT, WIDTH)]}
    return Tiny(pipe, request, GUIDED | {"negative_prompt_embeds": [numbers(TEXT, WIDTH, seed=2)]}, LARGER)


@tiny("ModularPipeline (HunyuanVideo 1.5)")
def hunyuan_video_15() -> Tiny:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=65,
        out_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=24,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    pipe = modular("HunyuanVideo15AutoBlocks", "text2video", scheduler=flow(shift=5.0), transformer=transformer)
    texts = {"prompt_embeds_2": numbers(1, 8, 24, seed=3), "prompt_embeds_mask_2": ones(1, 8)}
    negative = {"negative_prompt_embeds_2": numbers(1, 8, 24, seed=4), "negative_prompt_embeds_mask_2": ones(1, 8)}
    request = REQUEST | MASKS | UNGUIDED | texts | {"num_frames": 5}
    return Tiny(pipe, request, GUIDED | NEGATIVE_MASKS | negative, LONGER)


@tiny("ModularPipeline (Ideogram 4)")
def ideogram_4() -> Tiny:
    def transformer() -> diffusers.Ideogram4Transformer2DModel:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=WIDTH,
            mrope_section=(4, 2, 2),
        )

    pipe = modular(
        "Ideogram4AutoBlocks",
        "text2image",
        scheduler=flow(),
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )
    texts = {"text_features": numbers(1, TEXT, WIDTH), "text_lengths": [TEXT], "prompt_embeds": OMIT}
    return Tiny(pipe, REQUEST | texts | {"guidance_schedule": (7.0,) * STEPS}, larger=LARGER)


@tiny("ModularPipeline (Anima)")
def anima() -> Tiny:
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=WIDTH,
        target_dim=WIDTH,
        model_dim=WIDTH,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=16,
        min_sequence_length=16,
    )
    transformer = diffusers.CosmosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        text_embed_dim=WIDTH,
        adaln_lora_dim=8,
        max_size=(4, 16, 16),
        extra_pos_embed_type=None,
        concat_padding_mask=False,  # for which diffusers needs torchvision
    )
    parts = {"scheduler": flow(shift=3.0), "transformer": transformer, "text_conditioner": conditioner}
    pipe = modular("AnimaAutoBlocks", "text2image", **parts)

    def texts(prefix: str, seed: int) -> dict[str, Any]:
        return {
            f"{prefix}qwen_prompt_embeds": numbers(1, TEXT, WIDTH, seed=seed),
            f"{prefix}qwen_attention_mask": ones(1, TEXT),
            f"{prefix}t5_input_ids": torch.arange(TEXT)[None],
            f"{prefix}t5_attention_mask": ones(1, TEXT),
        }

    request = REQUEST | UNGUIDED | texts("", 1) | {"prompt_embeds": OMIT}
    return Tiny(pipe, request, {"guider": guidance(4.0)} | texts("negative_", 2), LARGER)


@tiny("ModularPipeline (MiniMax-H3)")
def minimax_h3() -> Tiny:
    transformer = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        ffn_dim=48,
        text_dim=WIDTH,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=32,
        rope_freq_dim=2,
    )
    pipe = modular(
        "MiniMaxH3Blocks",
        "t2va",
        scheduler=diffusers.MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
        transformer=transformer,
    )
    request = REQUEST | {
        "prompt_embeds": numbers(1, TEXT, WIDTH),
        "text_token_tags": ones(TEXT),
        "height": 32,
        "width": 32,
        "output": ["latents", "audio_latents"],
    }
    return Tiny(pipe, request, larger={"width": 64})


@tiny("ModularPipeline (MiniMax-Music 3)")
def minimax_music_3() -> Tiny:
    transformer = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=24,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=48,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )
    encoder = diffusers.MiniMaxMusic3ConditionEncoder(condition_hidden_dim=16, num_condition_layers=2, out_dim=24)
    pipe = modular(
        "MiniMaxMusic3Blocks",
        scheduler=flow(invert_sigmas=True, num_train_timesteps=1),
        transformer=transformer,
        condition_encoder=encoder,
    )
    sizes = dict.fromkeys(("prompt_embeds", "height", "width"), OMIT)
    request = REQUEST | sizes | {"frame_hiddens": numbers(1, 20, 32), "output": "latent_chunks"}
    # longer ones are made of overlapping windows
    larger = {"frame_hiddens": numbers(1, 240, 32)}
    return Tiny(pipe, request | UNGUIDED, {"guider": guidance(2.0)}, larger)


@tiny("ModularPipeline (FLUX.1 Kontext)")
def flux_kontext() -> Tiny:
    vae = kl_vae(16, scaling_factor=0.36, shift_factor=0.12)
    scheduler = flow(use_dynamic_shifting=True)
    pipe = modular("FluxKontextAutoBlocks", "image_conditioned", scheduler=scheduler, transformer=_flux(), vae=vae)
    image = {"image": picture(), "_auto_resize": False, "max_area": 64 * 64}
    larger = LARGER | {"max_area": 96 * 64}
    return Tiny(pipe, REQUEST | {"pooled_prompt_embeds": numbers(1, 24, seed=3)} | image, larger=larger)


def _flux_2_vae() -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=8
    )


@tiny("ModularPipeline (FLUX.2 editing)")
def flux_2_edit() -> Tiny:
    transformer = diffusers.Flux2Transformer2DModel(**FLUX_2, timestep_guidance_channels=32)
    parts = {"scheduler": flow(use_dynamic_shifting=True), "transformer": transformer, "vae": _flux_2_vae()}
    pipe = modular("Flux2AutoBlocks", "image_conditioned", **parts)
    return Tiny(pipe, REQUEST | {"image": [picture()]}, larger=LARGER)


@tiny("ModularPipeline (FLUX.3 editing)")
def flux_3_edit() -> Tiny:
    transformer = diffusers.Flux3Transformer2DModel(**FLUX_2, cond_in_channels=32, timestep_channels=32)
    pipe = modular("Flux3AutoBlocks", "image_conditioned", transformer=transformer, vae=_flux_2_vae())
    return Tiny(pipe, REQUEST | UNGUIDED | {"image": [picture()]}, GUIDED, LARGER)


@tiny("ModularPipeline (Stable Diffusion XL)")
def stable_diffusion_xl() -> Tiny:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=24 + 6 * 8,
        cross_attention_dim=WIDTH,
    )
    parts = {"scheduler": diffusers.EulerDiscreteScheduler(), "unet": unet, "vae": kl_vae()}
    pipe = modular("StableDiffusionXLAutoBlocks", "text2image", **parts)
    request = REQUEST | UNGUIDED | {"pooled_prompt_embeds": numbers(1, 24, seed=3)}
    return Tiny(pipe, request, GUIDED | {"negative_pooled_prompt_embeds": numbers(1, 24, seed=4)}, LARGER)


@tiny("ModularPipeline (Wan 2.2 image-to-video)")
def wan_22_image_to_video() -> Tiny:
    transformers = {name: wan_transformer(in_channels=36) for name in ("transformer", "transformer_2")}
    pipe = modular("Wan22Image2VideoBlocks", scheduler=unipc(), vae=wan_vae(), **transformers)
    request = REQUEST | GUIDED | UNGUIDED | {"guider_2": guidance(1.0), "num_frames": 5, "image": picture()}
    return Tiny(pipe, request, GUIDED | {"guider_2": guidance(3.0)}, LONGER)


@tiny("ModularPipeline (Wan 2.2 VACE)")
def wan_22_vace() -> Tiny:
    sizes = WAN | {"num_layers": 4, "vace_layers": [0, 2]}
    transformer, transformer_2 = (wake(diffusers.WanVACETransformer3DModel(**sizes)) for _ in range(2))
    parts = {"scheduler": unipc(), "vae": wan_vae(), "transformer": transformer, "transformer_2": transformer_2}
    pipe = modular("Wan22VaceBlocks", **parts)
    request = REQUEST | GUIDED | UNGUIDED | {"guider_2": guidance(1.0), "num_frames": 5, "video": clip(5)}
    return Tiny(pipe, request, GUIDED | {"guider_2": guidance(3.0)}, LONGER | {"video": clip(9)})


@tiny("ModularPipeline (Qwen-Image ControlNet)")
def qwen_image_controlnet() -> Tiny:
    scheduler = flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    control = wake(diffusers.QwenImageControlNetModel(**QWEN_IMAGE | {"num_layers": 2}))
    transformer = diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE)
    parts = {"scheduler": scheduler, "transformer": transformer, "controlnet": control, "vae": qwen_vae()}
    pipe = modular("QwenImageAutoBlocks", "controlnet_text2image", **parts)
    request = REQUEST | MASKS | UNGUIDED | {"control_image": picture()}
    return Tiny(pipe, request, GUIDED | NEGATIVE_MASKS, LARGER)


@tiny("ModularPipeline (Z-Image image-to-image)")
def z_image_image_to_image() -> Tiny:
    vae = kl_vae(16, scaling_factor=0.36, shift_factor=0.12)
    pipe = modular("ZImageAutoBlocks", "image2image", scheduler=flow(shift=3.0), transformer=_z_image(), vae=vae)
    texts = {"prompt_embeds": [numbers(TEXT, WIDTH)]}
    negative = {"negative_prompt_embeds": [numbers(TEXT, WIDTH, seed=2)]}
    request = REQUEST | UNGUIDED | texts | {"image": picture(), "strength": 0.9}
    return Tiny(pipe, request, GUIDED | negative, LARGER)


def ltx_2_parts() -> dict[str, Any]:
    """The components of an LTX-2 pipeline."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        vae_scale_factors=(8, 32, 32),
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=4,
        caption_channels=WIDTH,
        rope_type="split",
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=16
    )
    return {"scheduler": flow(), "transformer": transformer, "audio_vae": audio_vae}


def ltx_2_request(pipe: diffusers.ModularPipeline) -> Tiny:
    """A pipeline of LTX-2, and how to call it."""
    texts = {
        f"{sign}connector_{name}": value
        for seed, sign in ((1, ""), (2, "negative_"))
        for name, value in (
            ("prompt_embeds", numbers(1, TEXT, WIDTH, seed=seed)),
            ("audio_prompt_embeds", numbers(1, TEXT, WIDTH, seed=seed + 2)),
            ("attention_mask", ones(1, TEXT)),
        )
    }
    request = REQUEST | texts | {"prompt_embeds": OMIT, "batch_size": 1, "dtype": torch.float32, "num_frames": 9}
    no_guidance = _guider(diffusers.LTX2Guidance)
    request |= {"output": ["latents", "audio_latents"], "guider": no_guidance, "audio_guider": no_guidance}
    scales = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [2]}
    guided = {
        "guider": _guider(diffusers.LTX2Guidance, guidance_scale=3.0, **scales),
        "audio_guider": _guider(diffusers.LTX2Guidance, guidance_scale=7.0),
    }
    return Tiny(pipe, request, guided, {"width": 96, "num_frames": 17})


@tiny("ModularPipeline (LTX-2)")
def ltx_2() -> Tiny:
    return ltx_2_request(modular("LTX2AutoBlocks", "text2video", **ltx_2_parts()))
