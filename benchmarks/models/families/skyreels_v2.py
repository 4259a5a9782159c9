"""SkyReels-V2."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, always, clip, numbers, picture, tiny, wan_vae

TEXT, WIDTH = 12, 32


def _parts(**config: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    transformer = diffusers.SkyReelsV2Transformer3DModel(**sizes | config)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", flow_shift=5.0, use_flow_sigmas=True
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae()}
    return {**parts, "scheduler": scheduler, "transformer": transformer}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 9,
}
_GUIDED = {"guidance_scale": 5.0}
_LARGER = {"width": 96, "num_frames": 13}


@tiny("SkyReelsV2Pipeline")
def skyreels_v2() -> Tiny:
    return Tiny(diffusers.SkyReelsV2Pipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("SkyReelsV2ImageToVideoPipeline")
def skyreels_v2_image_to_video() -> Tiny:
    parts = _parts(in_channels=36, image_dim=4, added_kv_proj_dim=24)
    pipe = diffusers.SkyReelsV2ImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)
    pipe.encode_image = always(numbers(1, 4, 4, seed=3))
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


#: Diffusion forcing: each frame has its own timestep.
_FORCING = _REQUEST | {"prompt": None}


@tiny("SkyReelsV2DiffusionForcingPipeline")
def skyreels_v2_forcing() -> Tiny:
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(**_parts(inject_sample_info=True))
    return Tiny(pipe, _FORCING, _GUIDED, _LARGER)


@tiny("SkyReelsV2DiffusionForcingPipeline (frame after frame)")
def skyreels_v2_forcing_causal() -> Tiny:
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(**_parts(inject_sample_info=True))
    return Tiny(pipe, _FORCING | {"ar_step": 2, "causal_block_size": 1}, _GUIDED, _LARGER)


@tiny("SkyReelsV2DiffusionForcingPipeline (long video)")
def skyreels_v2_forcing_long() -> Tiny:
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(**_parts(inject_sample_info=True))
    long = {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 20}
    return Tiny(pipe, _FORCING | long, _GUIDED, {"width": 96, "num_frames": 25})


@tiny("SkyReelsV2DiffusionForcingImageToVideoPipeline")
def skyreels_v2_forcing_image_to_video() -> Tiny:
    pipe = diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline(**_parts())
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("SkyReelsV2DiffusionForcingVideoToVideoPipeline")
def skyreels_v2_forcing_video_to_video() -> Tiny:
    pipe = diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline(**_parts())
    long = {"video": clip(9), "num_frames": 17, "base_num_frames": 9, "overlap_history": 5}
    return Tiny(pipe, _REQUEST | long, _GUIDED, {"width": 96, "num_frames": 25})
