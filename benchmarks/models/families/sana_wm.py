"""Sana-WM: videos along the path of a camera."""

from __future__ import annotations

import diffusers
import numpy as np

from benchmarks.models.tiny import Tiny, flow, numbers, ones, picture, tiny, wake

TEXT, WIDTH = 12, 24


def _path(frames: int) -> np.ndarray:
    """The camera moves forward."""
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 1, frames)
    return poses


@tiny("SanaWMPipeline")
def sana_wm() -> Tiny:
    transformer = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        caption_channels=WIDTH,
        chunk_plucker_channels=12,
    )
    # 8 times smaller, half as many frames
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
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
    pipe = diffusers.SanaWMPipeline(None, None, vae, wake(transformer), flow(shift=3.0))
    request = {
        "image": picture(32),
        "prompt": "",
        "prompt_embeds": numbers(1, TEXT, WIDTH),
        "prompt_attention_mask": ones(1, TEXT),
        "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
        "negative_prompt_attention_mask": ones(1, TEXT),
        "guidance_scale": 1.0,
        "c2w": _path(9),
        "intrinsics": [32.0, 32.0, 16.0, 16.0],
        "height": 32,
        "width": 32,
    }
    return Tiny(pipe, request, {"guidance_scale": 5.0}, {"width": 64, "c2w": _path(13)})
