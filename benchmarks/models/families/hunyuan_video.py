"""HunyuanVideo 1.0 and 1.5, and HunyuanImage."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.guiders import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance

from benchmarks.models.tiny import Tiny, always, flow, numbers, ones, picture, tiny

TEXT, WIDTH = 12, 32
#: The transformers are 32 wide, with heads of 16; the sizes of the rotary embedding add up to that.
_SIZES: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_refiner_layers": 1, "mlp_ratio": 2.0}
_TWO_STREAMS: dict[str, Any] = {**_SIZES, "num_layers": 3, "num_single_layers": 3, "text_embed_dim": WIDTH}
_VIDEO: dict[str, Any] = {
    **_TWO_STREAMS,
    "in_channels": 4,
    "out_channels": 4,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def _parts(transformer: Any) -> dict[str, Any]:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    parts = {"vae": vae, "scheduler": flow(shift=7.0), "transformer": transformer}
    return {**parts, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "pooled_prompt_embeds": numbers(1, 8, seed=2),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=3),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "negative_pooled_prompt_embeds": numbers(1, 8, seed=4),
    "true_cfg_scale": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 5,
}
_GUIDED = {"true_cfg_scale": 4.0}
_LARGER = {"width": 96, "num_frames": 9}


@tiny("HunyuanVideoPipeline")
def hunyuan_video() -> Tiny:
    transformer = diffusers.HunyuanVideoTransformer3DModel(**_VIDEO)
    return Tiny(diffusers.HunyuanVideoPipeline(**_parts(transformer)), _REQUEST, _GUIDED, _LARGER)


def _image_to_video(**config: Any) -> Tiny:
    transformer = diffusers.HunyuanVideoTransformer3DModel(**_VIDEO | config)
    pipe = diffusers.HunyuanVideoImageToVideoPipeline(**_parts(transformer), image_processor=None)
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("HunyuanVideoImageToVideoPipeline")
def hunyuan_video_image_to_video() -> Tiny:
    return _image_to_video(in_channels=9, image_condition_type="latent_concat", guidance_embeds=False)


@tiny("HunyuanVideoImageToVideoPipeline (the picture as first tokens)")
def hunyuan_video_first_tokens() -> Tiny:
    return _image_to_video(image_condition_type="token_replace")


@tiny("HunyuanSkyreelsImageToVideoPipeline")
def hunyuan_skyreels_image_to_video() -> Tiny:
    transformer = diffusers.HunyuanVideoTransformer3DModel(**_VIDEO | {"in_channels": 8, "guidance_embeds": False})
    pipe = diffusers.HunyuanSkyreelsImageToVideoPipeline(**_parts(transformer))
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("HunyuanVideoFramepackPipeline")
def hunyuan_video_framepack() -> Tiny:
    pictures = {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(**_VIDEO | pictures)
    pipe = diffusers.HunyuanVideoFramepackPipeline(**_parts(transformer), image_encoder=None, feature_extractor=None)
    pipe.encode_image = always(numbers(1, 4, 16, seed=5))
    request = _REQUEST | {"image": picture(), "latent_window_size": 3}
    return Tiny(pipe, request, _GUIDED, {"width": 96})


def _parts_15(task_type: str, guidance_scale: float) -> dict[str, Any]:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        **_SIZES,
        in_channels=9,
        out_channels=4,
        num_layers=4,
        text_embed_dim=WIDTH,
        text_embed_2_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
        task_type=task_type,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
    return {**_parts(transformer), "vae": vae, "guider": guider}


#: Two text encoders: a language model, and one that reads letters.
_TWO_TEXTS = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_embeds_mask": ones(1, TEXT),
    "prompt_embeds_2": numbers(1, 4, 16, seed=2),
    "prompt_embeds_mask_2": ones(1, 4),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=3),
    "negative_prompt_embeds_mask": ones(1, TEXT),
    "negative_prompt_embeds_2": numbers(1, 4, 16, seed=4),
    "negative_prompt_embeds_mask_2": ones(1, 4),
}
_REQUEST_15 = _TWO_TEXTS | {"height": 32, "width": 32, "num_frames": 5}
_LARGER_15 = {"width": 48, "num_frames": 9}


def _hunyuan_video_15(guidance_scale: float) -> Tiny:
    pipe = diffusers.HunyuanVideo15Pipeline(**_parts_15("t2v", guidance_scale))
    pipe.vision_num_semantic_tokens = 9
    return Tiny(pipe, _REQUEST_15, {}, _LARGER_15)


@tiny("HunyuanVideo15Pipeline")
def hunyuan_video_15() -> Tiny:
    return _hunyuan_video_15(1.0)


@tiny("HunyuanVideo15Pipeline (guidance)")
def hunyuan_video_15_guidance() -> Tiny:
    return _hunyuan_video_15(6.0)


def _hunyuan_video_15_image_to_video(guidance_scale: float) -> Tiny:
    parts = _parts_15("i2v", guidance_scale)
    pipe = diffusers.HunyuanVideo15ImageToVideoPipeline(**parts, image_encoder=None, feature_extractor=None)
    pipe.encode_image = always(numbers(1, 9, 12, seed=5))
    # the picture gives the height and width
    return Tiny(pipe, _TWO_TEXTS | {"image": picture(), "num_frames": 5}, {}, {"num_frames": 9})


@tiny("HunyuanVideo15ImageToVideoPipeline")
def hunyuan_video_15_image_to_video() -> Tiny:
    return _hunyuan_video_15_image_to_video(1.0)


@tiny("HunyuanVideo15ImageToVideoPipeline (guidance)")
def hunyuan_video_15_image_to_video_guidance() -> Tiny:
    return _hunyuan_video_15_image_to_video(6.0)


def _hunyuan_image(guider: Any, **config: Any) -> Tiny:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        **_TWO_STREAMS, in_channels=4, out_channels=4, text_embed_2_dim=16, rope_axes_dim=(8, 8), **config
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        scaling_factor=0.5,
        spatial_compression_ratio=8,
        sample_size=64,
    )
    parts = _parts(transformer) | {"vae": vae, "guider": guider, "ocr_guider": None}
    request = _TWO_TEXTS | {"height": 64, "width": 64}
    return Tiny(diffusers.HunyuanImagePipeline(**parts), request, {}, {"width": 96})


@tiny("HunyuanImagePipeline")
def hunyuan_image() -> Tiny:
    return _hunyuan_image(AdaptiveProjectedMixGuidance(guidance_scale=3.5, adaptive_projected_guidance_start_step=5))


@tiny("HunyuanImagePipeline (distilled)")
def hunyuan_image_distilled() -> Tiny:
    return _hunyuan_image(None, guidance_embeds=True, use_meanflow=True)


def _refiner(guider: Any, **config: Any) -> Tiny:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        **_TWO_STREAMS, in_channels=16, out_channels=8, rope_axes_dim=(4, 6, 6), patch_size=(1, 1, 1), **config
    )
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
    )
    parts = {"text_encoder": None, "tokenizer": None, "transformer": transformer, "vae": vae, "guider": guider}
    request = {name: value for name, value in _TWO_TEXTS.items() if "_2" not in name}
    request |= {"image": picture(), "height": 64, "width": 64}
    pipe = diffusers.HunyuanImageRefinerPipeline(**parts, scheduler=flow(shift=7.0))
    return Tiny(pipe, request, {}, {"width": 96})


@tiny("HunyuanImageRefinerPipeline")
def hunyuan_image_refiner() -> Tiny:
    return _refiner(AdaptiveProjectedMixGuidance(guidance_scale=3.5, adaptive_projected_guidance_start_step=5))


@tiny("HunyuanImageRefinerPipeline (distilled)")
def hunyuan_image_refiner_distilled() -> Tiny:
    return _refiner(None, guidance_embeds=True)
