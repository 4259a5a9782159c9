"""PRX."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from benchmarks.models.tiny import Tiny, flow, kl_vae, numbers, tiny, wake

TEXT, WIDTH = 12, 32


def _parts(**config: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "context_in_dim": WIDTH,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 4,
        "axes_dim": [8, 8],
    }
    transformer = diffusers.PRXTransformer2DModel(**sizes | config)
    wake(transformer)
    return {"text_encoder": None, "tokenizer": None, "scheduler": flow(shift=3.0), "transformer": transformer}


_REQUEST = {
    "prompt_embeds": numbers(1, TEXT, WIDTH),
    "prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
    "guidance_scale": 1.0,
    "use_resolution_binning": False,
}
_GUIDED = {
    "negative_prompt_embeds": numbers(1, TEXT, WIDTH, seed=2),
    "negative_prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
    "guidance_scale": 4.0,
}


@tiny("PRXPipeline")
def prx() -> Tiny:
    pipe = diffusers.PRXPipeline(**_parts(in_channels=16, patch_size=2), vae=kl_vae(16, shift_factor=0.0))
    return Tiny(pipe, _REQUEST | {"height": 64, "width": 64}, _GUIDED, {"width": 96})


@tiny("PRXPixelPipeline")
def prx_pixel() -> Tiny:
    parts = _parts(in_channels=3, patch_size=4, bottleneck_size=16, resolution_embeds=True)
    last = parts["transformer"].final_layer.linear
    with torch.no_grad():  # the model predicts the picture: a trained one predicts about the same one in all steps
        last.weight.mul_(0.1)
        last.bias.normal_(std=0.5)
    pipe = diffusers.PRXPixelPipeline(**parts)
    return Tiny(pipe, _REQUEST | {"height": 16, "width": 16}, _GUIDED, {"width": 24})
