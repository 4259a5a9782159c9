"""LTX-2: videos with sound."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
from diffusers.pipelines.ltx2 import pipeline_ltx2_condition, pipeline_ltx2_hdr_lora, pipeline_ltx2_ic_lora
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

from benchmarks.models.tiny import OMIT, STEPS, Tiny, clip, flow, numbers, ones, picture, tiny

TEXT, WIDTH = 12, 16
CHANNELS = 4


def _transformer(**config: Any) -> diffusers.LTX2VideoTransformer3DModel:
    sizes: dict[str, Any] = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "vae_scale_factors": (2, 8, 8),
        "audio_in_channels": CHANNELS,
        "audio_out_channels": CHANNELS,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 4,
        "caption_channels": WIDTH,
        "rope_type": "split",
        "perturbed_attn": True,
    }
    return diffusers.LTX2VideoTransformer3DModel(**sizes | config)


def _parts(**config: Any) -> dict[str, Any]:
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_type="split",
    )
    # 8 times smaller, half as many frames
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    parts = {"text_encoder": None, "tokenizer": None, "vocoder": None, "connectors": connectors}
    return {**parts, "vae": vae, "audio_vae": audio_vae, "scheduler": flow(), "transformer": _transformer(**config)}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, 2 * WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "negative_prompt_embeds": numbers(1, TEXT, 2 * WIDTH, seed=2),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "guidance_scale": 1.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_scale": 1.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
    "audio_stg_scale": 0.0,
    "height": 32,
    "width": 32,
    "num_frames": 9,
}
_GUIDED = {"guidance_scale": 3.0, "audio_guidance_scale": 7.0}
_ALL_GUIDANCE = _GUIDED | {
    "stg_scale": 1.0,
    "spatio_temporal_guidance_blocks": [2],
    "modality_scale": 3.0,
    "audio_modality_scale": 3.0,
    "guidance_rescale": 0.7,
}
_LARGER = {"width": 64, "num_frames": 17}


@tiny("LTX2Pipeline")
def ltx2() -> Tiny:
    return Tiny(diffusers.LTX2Pipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("LTX2Pipeline (all guidances)")
def ltx2_all_guidances() -> Tiny:
    return Tiny(diffusers.LTX2Pipeline(**_parts()), _REQUEST, _ALL_GUIDANCE, _LARGER)


@tiny("LTX2ImageToVideoPipeline")
def ltx2_image_to_video() -> Tiny:
    pipe = diffusers.LTX2ImageToVideoPipeline(**_parts())
    return Tiny(pipe, _REQUEST | {"image": picture(32), "image_crf": 0}, _GUIDED, _LARGER)


@tiny("LTX2ConditionPipeline")
def ltx2_condition() -> Tiny:
    frames = pipeline_ltx2_condition.LTX2VideoCondition(frames=picture(32), crf=0)
    return Tiny(diffusers.LTX2ConditionPipeline(**_parts()), _REQUEST | {"conditions": frames}, _GUIDED, _LARGER)


@tiny("LTX2InContextPipeline")
def ltx2_in_context() -> Tiny:
    video = pipeline_ltx2_ic_lora.LTX2ReferenceCondition(frames=clip(9, 32))
    request = _REQUEST | {"reference_conditions": [video]}
    return Tiny(diffusers.LTX2InContextPipeline(**_parts()), request, _GUIDED, _LARGER)


@tiny("LTX2HDRPipeline")
def ltx2_hdr() -> Tiny:
    video = pipeline_ltx2_hdr_lora.LTX2HDRReferenceCondition(frames=clip(9, 32))
    request = {name: value for name, value in _REQUEST.items() if not name.startswith("audio_")}
    pipe = diffusers.LTX2HDRPipeline(**_parts())
    return Tiny(pipe, request | {"reference_conditions": [video]}, {"guidance_scale": 3.0}, _LARGER)


#: Dynamic frame rates: distilled, so without guidance, and with given noise levels.
_FRAME_RATES: dict[str, Any] = {
    "prompt_embeds": _REQUEST["prompt_embeds"],
    "prompt_attention_mask": _REQUEST["prompt_attention_mask"],
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "sigmas": np.linspace(1.0, 1 / STEPS, STEPS).tolist(),
    "num_inference_steps": OMIT,
}


@tiny("LTX2DFRPipeline")
def ltx2_dfr() -> Tiny:
    pipe = diffusers.LTX2DFRPipeline(**_parts(use_keyframes_abs_pos_embedding=True))
    return Tiny(pipe, _FRAME_RATES, {}, _LARGER)


@tiny("LTX2DFRTemporalRefinePipeline")
def ltx2_dfr_temporal_refine() -> Tiny:
    upsampler = LTX2LatentUpsamplerModel(
        in_channels=CHANNELS,
        mid_channels=32,
        num_blocks_per_stage=1,
        spatial_upsample=False,
        temporal_upsample=True,
        use_rational_resampler=False,
    )
    parts = _parts(use_keyframes_abs_pos_embedding=True) | {"temporal_latent_upsampler": upsampler}
    parts["scheduler"] = diffusers.LTXEulerAncestralRFScheduler(eta=0.4)
    first_pass = {
        "latents": numbers(1, CHANNELS, 5, 4, 4),
        "keyframes_latents": numbers(1, CHANNELS, 2, 4, 4, seed=2),
        "keyframe_positions": [4, 8],
        "audio_latents": numbers(1, 2, 9, 2, seed=3),
    }
    return Tiny(diffusers.LTX2DFRTemporalRefinePipeline(**parts), _FRAME_RATES | first_pass)
