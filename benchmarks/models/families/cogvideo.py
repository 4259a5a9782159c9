"""CogVideoX."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import OMIT, Tiny, clip, numbers, picture, tiny

TEXT, WIDTH = 12, 32
CHANNELS = 4


def _parts(scheduler: Any = None, **config: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 16,
        "text_embed_dim": WIDTH,
        "num_layers": 4,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
    }
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2
    )
    scheduler = scheduler or diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler}
    return {**parts, "transformer": diffusers.CogVideoXTransformer3DModel(**sizes | config)}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 5,
}
_GUIDED = {"guidance_scale": 6.0}
_LARGER = {"width": 96, "num_frames": 9}


@tiny("CogVideoXPipeline")
def cogvideox() -> Tiny:
    return Tiny(diffusers.CogVideoXPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("CogVideoXPipeline (DPM scheduler, guidance that grows)")
def cogvideox_dpm() -> Tiny:
    scheduler = diffusers.CogVideoXDPMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    pipe = diffusers.CogVideoXPipeline(**_parts(scheduler))
    return Tiny(pipe, _REQUEST, _GUIDED | {"use_dynamic_cfg": True}, _LARGER)


@tiny("CogVideoXPipeline (1.5, patches in time)")
def cogvideox_15() -> Tiny:
    pipe = diffusers.CogVideoXPipeline(**_parts(patch_size_t=2, patch_bias=False, sample_width=12))
    return Tiny(pipe, _REQUEST | {"num_frames": 13}, _GUIDED, {"width": 96, "num_frames": 21})


@tiny("CogVideoXImageToVideoPipeline")
def cogvideox_image_to_video() -> Tiny:
    pipe = diffusers.CogVideoXImageToVideoPipeline(**_parts(in_channels=2 * CHANNELS))
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("CogVideoXVideoToVideoPipeline")
def cogvideox_video_to_video() -> Tiny:
    request = _REQUEST | {"video": clip(5), "num_frames": OMIT, "num_inference_steps": 10}
    pipe = diffusers.CogVideoXVideoToVideoPipeline(**_parts())
    return Tiny(pipe, request, _GUIDED, {"width": 96, "video": clip(9)})


@tiny("CogVideoXFunControlPipeline")
def cogvideox_fun_control() -> Tiny:
    request = _REQUEST | {"control_video": clip(5), "num_frames": OMIT}
    pipe = diffusers.CogVideoXFunControlPipeline(**_parts(in_channels=2 * CHANNELS))
    return Tiny(pipe, request, _GUIDED, {"width": 96, "control_video": clip(9)})
