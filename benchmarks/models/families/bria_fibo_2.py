"""Bria FIBO 2."""

from __future__ import annotations

import diffusers

from benchmarks.models.families.flux_2 import flux_2_vae
from benchmarks.models.tiny import Tiny, flow, numbers, picture, tiny, wake

TEXT, WIDTH, INJECTED = 12, 32, (1, 3)


def _pipe() -> diffusers.BriaFibo2Pipeline:
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=8,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=WIDTH,
        injection_layer_ids=INJECTED,
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 64, 64),
    )
    wake(transformer)
    pipe = diffusers.BriaFibo2Pipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux_2_vae(),
        text_encoder=None,
        processor=None,
    )
    pipe.default_sample_size = 8  # input pictures are scaled to 64² pixels
    return pipe


_REQUEST = {
    "prompt_embeds": numbers(1, 1 + len(INJECTED), TEXT, WIDTH),
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
}
_GUIDED = {"guidance_scale": 4.0, "negative_prompt_embeds": numbers(1, 1 + len(INJECTED), TEXT, WIDTH, seed=2)}
_LARGER = {"width": 96}


@tiny("BriaFibo2Pipeline")
def fibo_2() -> Tiny:
    return Tiny(_pipe(), _REQUEST, _GUIDED, _LARGER)


@tiny("BriaFibo2Pipeline (image)")
def with_image() -> Tiny:
    return Tiny(_pipe(), _REQUEST | {"image": [picture()]}, _GUIDED, _LARGER)
