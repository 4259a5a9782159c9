"""Kandinsky 6: videos with sound, and super-resolution."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, clip, flow, numbers, picture, tiny, wake

TEXT, WIDTH = 12, 32
CHANNELS = 4


def _video_and_audio(**request: Any) -> Tiny:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=WIDTH,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=4,
        axes_dims=(4, 6, 6),
        in_audio_dim=CHANNELS,
        out_audio_dim=CHANNELS,
        model_dim_a=16,
        time_dim_a=16,
        ff_dim_a=32,
        axes_dims_a=(4, 6, 6),
        visual_token_type_num_embeddings=2,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    encoders = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipe = diffusers.Kandinsky6TI2VAPipeline(
        **encoders,
        vae=vae,
        scheduler=flow(shift=7.0),
        transformer=wake(transformer),
        audio_vae=diffusers.MMAudioVAE(mel_bins=8, latent_channels=CHANNELS, hidden_channels=8, layers_per_block=1),
        vocoder=diffusers.MMAudioVocoder(num_mels=8, upsample_initial_channel=64),
    )
    request = {
        "prompt_embeds": numbers(1, TEXT, WIDTH),
        "pooled_prompt_embeds": numbers(1, 16, seed=2),
        "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=3),
        "negative_pooled_prompt_embeds": numbers(1, 16, seed=4),
        "guidance_scale": 1.0,
        "height": 64,
        "width": 64,
        "num_frames": 5,
        **request,
    }
    return Tiny(pipe, request, {"guidance_scale": 5.0}, {"width": 96, "num_frames": 9})


@tiny("Kandinsky6TI2VAPipeline")
def kandinsky6() -> Tiny:
    return _video_and_audio()


@tiny("Kandinsky6TI2VAPipeline (picture, no sound)")
def kandinsky6_image_to_video() -> Tiny:
    return _video_and_audio(image=picture(), sample_audio=False)


def _super_resolution(scheduler: Any, guesses: int = 1) -> diffusers.Kandinsky6SRPipeline:
    transformer = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS * guesses,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        nabla_window=(3, 3, 3),
        tile_sizes=((64, 64),),
    )
    vae = diffusers.Kandinsky6SRVAE(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(4, 8, 8, 8),
        decoder_block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
    )
    return diffusers.Kandinsky6SRPipeline(transformer=wake(transformer), vae=vae, scheduler=scheduler)


_SMALL_VIDEO = {"video": clip(5, 32), "resolution_scale": 2, "output_type": "pt"}


@tiny("Kandinsky6SRPipeline")
def kandinsky6_sr() -> Tiny:
    return Tiny(_super_resolution(flow(shift=5.0)), _SMALL_VIDEO, {}, {"video": clip(9, 32)})


@tiny("Kandinsky6SRPipeline (distilled, two tiles)")
def kandinsky6_sr_distilled() -> Tiny:
    pipe = _super_resolution(diffusers.PiflowScheduler(n_grid=3), guesses=3)
    wide = [frame.resize((48, 32)) for frame in clip(9)]
    return Tiny(pipe, _SMALL_VIDEO | {"video": wide[:5]}, {}, {"video": wide}, steps=4)
