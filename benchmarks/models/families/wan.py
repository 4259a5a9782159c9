"""Wan and what is built on it."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import OMIT, Tiny, always, clip, flow, numbers, picture, tiny, wan_vae

TEXT, WIDTH = 12, 32


_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def _transformer(**config: Any) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(**_SIZES | config)


def _parts(**config: Any) -> dict[str, Any]:
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae(), "scheduler": flow(shift=3.0)}
    return {**parts, "transformer": _transformer(**config)}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 5,
}
_GUIDED = {"guidance_scale": 4.0}
_LARGER = {"width": 96, "num_frames": 9}


@tiny("WanPipeline")
def wan() -> Tiny:
    return Tiny(diffusers.WanPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("WanPipeline (2.2, two transformers)")
def wan_22() -> Tiny:
    pipe = diffusers.WanPipeline(**_parts(), transformer_2=_transformer(), boundary_ratio=0.6)
    return Tiny(pipe, _REQUEST, _GUIDED, _LARGER)


@tiny("WanPipeline (2.2, a timestep for each token)")
def wan_22_5b() -> Tiny:
    return Tiny(diffusers.WanPipeline(**_parts(), expand_timesteps=True), _REQUEST, _GUIDED, _LARGER)


#: Wan 2.1 sees the picture twice: as latents (16), with a mask (4), and as embeddings.
_PICTURE = {"in_channels": 36, "image_dim": 4, "added_kv_proj_dim": 24}


def _image_to_video(parts: dict[str, Any], **config: Any) -> diffusers.WanImageToVideoPipeline:
    pipe = diffusers.WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None, **config)
    pipe.encode_image = always(numbers(1, 4, 4, seed=3))
    return pipe


@tiny("WanImageToVideoPipeline")
def wan_image_to_video() -> Tiny:
    return Tiny(_image_to_video(_parts(**_PICTURE)), _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("WanImageToVideoPipeline (2.2, two transformers)")
def wan_22_image_to_video() -> Tiny:
    parts = {**_parts(in_channels=36), "transformer_2": _transformer(in_channels=36)}
    return Tiny(_image_to_video(parts, boundary_ratio=0.6), _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("WanImageToVideoPipeline (2.2, a timestep for each token)")
def wan_22_5b_image_to_video() -> Tiny:
    pipe = _image_to_video(_parts(), expand_timesteps=True)
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("WanVideoToVideoPipeline")
def wan_video_to_video() -> Tiny:
    pipe = diffusers.WanVideoToVideoPipeline(**_parts())
    request = _REQUEST | {"video": clip(5), "num_frames": OMIT, "num_inference_steps": 10}
    return Tiny(pipe, request, _GUIDED, {"width": 96, "video": clip(9)})


@tiny("WanVACEPipeline")
def wan_vace() -> Tiny:
    transformer = diffusers.WanVACETransformer3DModel(**_SIZES, vace_layers=[0, 2], vace_in_channels=96)
    request = _REQUEST | {"video": clip(5), "mask": [picture(seed=9).convert("L")] * 5}
    larger = _LARGER | {"video": clip(9), "mask": [picture(seed=9).convert("L")] * 9}
    return Tiny(diffusers.WanVACEPipeline(**{**_parts(), "transformer": transformer}), request, _GUIDED, larger)


@tiny("WanAnimatePipeline")
def wan_animate() -> Tiny:
    faces = {
        "image_dim": 4,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    transformer = diffusers.WanAnimateTransformer3DModel(**_SIZES | {"num_layers": 4} | faces)
    parts = {**_parts(), "transformer": transformer, "image_processor": None, "image_encoder": None}
    request = _REQUEST | {
        "num_frames": OMIT,
        "image": picture(),
        "pose_video": clip(9),
        "face_video": clip(9, 16),
        "segment_frame_length": 9,
    }
    pipe = diffusers.WanAnimatePipeline(**parts)
    pipe.encode_image = always(numbers(1, 4, 4, seed=3))
    return Tiny(pipe, request, _GUIDED, {"width": 96})
