"""Stable Audio, ACE-Step and LongCat-Audio: sound and music."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

from benchmarks.models.tiny import Tiny, flow, numbers, ones, tiny, wake

TEXT, WIDTH = 12, 24


def _oobleck(channels: int) -> diffusers.AutoencoderOobleck:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        channel_multiples=[2, 4],
        decoder_channels=3,
        decoder_input_channels=channels,
        sampling_rate=4,
    )


@tiny("StableAudioPipeline")
def stable_audio() -> Tiny:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=32,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        cross_attention_input_dim=WIDTH,
        global_states_input_dim=2 * WIDTH,
        time_proj_dim=16,
    )
    pipe = diffusers.StableAudioPipeline(
        vae=_oobleck(8),
        text_encoder=None,
        projection_model=StableAudioProjectionModel(WIDTH, WIDTH, min_value=0, max_value=32),
        tokenizer=None,
        transformer=transformer,
        # its own scheduler, CosineDPMSolverMultistepScheduler, has further dependencies
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
    )
    request = {
        "prompt_embeds": numbers(1, TEXT, WIDTH),
        "attention_mask": ones(1, TEXT),
        "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
        "negative_attention_mask": ones(1, TEXT),
        "audio_end_in_s": 8.0,
        "guidance_scale": 1.0,
    }
    return Tiny(pipe, request, {"guidance_scale": 7.0}, {"num_waveforms_per_prompt": 2})


def _stable_audio_3(distilled: bool = False) -> dict[str, Any]:
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=4,
        num_heads=4,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
    )
    vae = diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    return {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "duration_embedder": diffusers.StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16),
        "transformer": wake(transformer),
        "scheduler": flow(num_train_timesteps=1, stochastic_sampling=distilled),
    }


_REQUEST_3 = {"prompt_embeds": numbers(1, TEXT, WIDTH), "encoder_attention_mask": ones(1, TEXT), "duration": 8.0}
_LARGER_3 = {"duration": 12.0}


@tiny("StableAudio3Pipeline")
def stable_audio_3() -> Tiny:
    request = _REQUEST_3 | {
        "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
        "negative_encoder_attention_mask": ones(1, TEXT),
    }
    pipe = diffusers.StableAudio3Pipeline(**_stable_audio_3())
    return Tiny(pipe, request, {"guidance_scale": 4.0}, _LARGER_3)


@tiny("StableAudio3Pipeline (distilled)")
def stable_audio_3_distilled() -> Tiny:
    pipe = diffusers.StableAudio3Pipeline(**_stable_audio_3(distilled=True))
    return Tiny(pipe, _REQUEST_3, larger=_LARGER_3)


@tiny("StableAudio3AudioToAudioPipeline")
def stable_audio_3_variation() -> Tiny:
    request = _REQUEST_3 | {"audio": numbers(1, 2, 128, scale=0.3), "init_noise_level": 0.7}
    pipe = diffusers.StableAudio3AudioToAudioPipeline(**_stable_audio_3())
    return Tiny(pipe, request, larger=_LARGER_3)


@tiny("StableAudio3InpaintPipeline")
def stable_audio_3_inpaint() -> Tiny:
    request = _REQUEST_3 | {"audio": numbers(1, 2, 128, scale=0.3), "mask_start_seconds": 2.0, "mask_end_seconds": 6.0}
    pipe = diffusers.StableAudio3InpaintPipeline(**_stable_audio_3())
    return Tiny(pipe, request, larger=_LARGER_3)


@tiny("AceStepPipeline")
def ace_step() -> Tiny:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
    }
    transformer = diffusers.AceStepTransformer1DModel(
        **sizes, num_hidden_layers=4, in_channels=24, audio_acoustic_hidden_dim=8
    )
    condition_encoder = diffusers.AceStepConditionEncoder(
        **sizes,
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    pipe = diffusers.AceStepPipeline(
        vae=_oobleck(8),
        text_encoder=None,
        tokenizer=None,
        transformer=wake(transformer),
        condition_encoder=condition_encoder,
        scheduler=flow(num_train_timesteps=1, shift=1.0),
    )
    pipe.encode_prompt = lambda **_: (
        numbers(1, TEXT, WIDTH),
        ones(1, TEXT).bool(),
        numbers(1, 6, WIDTH, seed=2),
        ones(1, 6).bool(),
    )
    request = {"prompt": "", "audio_duration": 8.0, "guidance_scale": 1.0}
    return Tiny(pipe, request, {"guidance_scale": 7.0}, {"audio_duration": 12.0})


@tiny("LongCatAudioDiTPipeline")
def longcat_audio() -> Tiny:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=4, dit_heads=4, dit_text_dim=WIDTH, latent_dim=8, text_conv=False, ff_mult=2.0
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=8,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=4,
    )
    pipe = diffusers.LongCatAudioDiTPipeline(vae, None, None, wake(transformer))
    pipe.encode_prompt = lambda *_: (numbers(1, TEXT, WIDTH), torch.tensor([TEXT]))
    request = {"prompt": "", "audio_duration_s": 8.0, "guidance_scale": 1.0}
    return Tiny(pipe, request, {"guidance_scale": 4.0}, {"audio_duration_s": 12.0})
