"""LTX-Video."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import Tiny, always, flow, numbers, ones, picture, tiny

TEXT, WIDTH = 12, 32


def _parts() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=WIDTH,
    )
    # 8 times smaller, 8 times fewer frames; the full-size one is 32 times smaller
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
    )
    parts = {"text_encoder": None, "tokenizer": None, "vae": vae, "transformer": transformer}
    return {**parts, "scheduler": flow()}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": ones(1, TEXT),
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_attention_mask": ones(1, TEXT),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "num_frames": 9,
}
_GUIDED = {"guidance_scale": 3.0}
_LARGER = {"width": 96, "num_frames": 17}


@tiny("LTXPipeline")
def ltx() -> Tiny:
    return Tiny(diffusers.LTXPipeline(**_parts()), _REQUEST, _GUIDED, _LARGER)


@tiny("LTXImageToVideoPipeline")
def ltx_image_to_video() -> Tiny:
    pipe = diffusers.LTXImageToVideoPipeline(**_parts())
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("LTXConditionPipeline")
def ltx_condition() -> Tiny:
    pipe = diffusers.LTXConditionPipeline(**_parts())
    return Tiny(pipe, _REQUEST | {"image": picture()}, _GUIDED, _LARGER)


@tiny("LTXI2VLongMultiPromptPipeline")
def ltx_long_multi_prompt() -> Tiny:
    pipe = diffusers.LTXI2VLongMultiPromptPipeline(**_parts())
    texts = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    pipe.encode_prompt = always(tuple(_REQUEST[name] for name in texts))
    # two windows of frames, one after the other
    request = {name: value for name, value in _REQUEST.items() if name not in texts}
    request |= {"prompt": "one | two", "cond_image": picture(), "num_frames": 33}
    request |= {"temporal_tile_size": 24, "temporal_overlap": 8}
    return Tiny(pipe, request, _GUIDED, _LARGER | {"num_frames": 49})
