"""What is made from Wan: ChronoEdit, Lucy Edit, AnyFlow and Helios."""

from __future__ import annotations

from typing import Any

import diffusers

from benchmarks.models.tiny import OMIT, Tiny, always, clip, flow, numbers, picture, tiny, wake, wan_vae

TEXT, WIDTH = 12, 32
_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
}


def _parts(transformer: Any, scheduler: Any = None) -> dict[str, Any]:
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae(), "scheduler": scheduler or flow(shift=5.0)}
    return {**parts, "transformer": wake(transformer)}


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


@tiny("ChronoEditPipeline")
def chronoedit() -> Tiny:
    transformer = diffusers.ChronoEditTransformer3DModel(
        **_SIZES, in_channels=36, image_dim=4, added_kv_proj_dim=24, rope_max_seq_len=32
    )
    pipe = diffusers.ChronoEditPipeline(**_parts(transformer), image_encoder=None, image_processor=None)
    pipe.encode_image = always(numbers(1, 4, 4, seed=3))
    return Tiny(pipe, _REQUEST | {"image": picture(), "num_frames": 5}, _GUIDED, {"width": 96})


@tiny("ChronoEditPipeline (temporal reasoning)")
def chronoedit_reasoning() -> Tiny:
    model = chronoedit()
    model.pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", flow_shift=5.0, use_flow_sigmas=True
    )
    # after three steps, the frames between the first and the last are dropped
    thoughts = {"num_frames": 13, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 3}
    return Tiny(model.pipe, {**model.arguments, **thoughts}, _GUIDED, {"width": 96})


@tiny("LucyEditPipeline")
def lucy_edit() -> Tiny:
    transformer = diffusers.WanTransformer3DModel(**_SIZES, in_channels=32, rope_max_seq_len=32)
    pipe = diffusers.LucyEditPipeline(**_parts(transformer), expand_timesteps=True)
    return Tiny(pipe, _REQUEST | {"video": clip(9)}, _GUIDED, _LARGER | {"video": clip(13)})


#: Without guidance, the pipelines take no negative embeddings: they would make a batch of two of them.
_ANYFLOW = _REQUEST | {"negative_prompt_embeds": OMIT}
_ANYFLOW_GUIDED = _GUIDED | {"negative_prompt_embeds": _REQUEST["negative_prompt_embeds"]}


def _flow_map() -> diffusers.FlowMapEulerDiscreteScheduler:
    return diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)


@tiny("AnyFlowPipeline")
def anyflow() -> Tiny:
    transformer = diffusers.AnyFlowTransformer3DModel(**_SIZES, rope_max_seq_len=32)
    pipe = diffusers.AnyFlowPipeline(**_parts(transformer, _flow_map()))
    return Tiny(pipe, _ANYFLOW, _ANYFLOW_GUIDED, _LARGER)


@tiny("AnyFlowFARPipeline")
def anyflow_far() -> Tiny:
    transformer = diffusers.AnyFlowFARTransformer3DModel(**_SIZES, rope_max_seq_len=32, chunk_partition=(1, 1))
    pipe = diffusers.AnyFlowFARPipeline(**_parts(transformer, _flow_map()))
    # frame after frame, with few steps for each
    return Tiny(pipe, _ANYFLOW | {"num_frames": 5}, _ANYFLOW_GUIDED, {"width": 96}, steps=4)


def _helios() -> diffusers.HeliosTransformer3DModel:
    return diffusers.HeliosTransformer3DModel(**_SIZES, rope_dim=(4, 4, 4))


@tiny("HeliosPipeline")
def helios() -> Tiny:
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    pipe = diffusers.HeliosPipeline(**_parts(_helios(), scheduler))
    # two chunks of frames, one after the other
    request = _REQUEST | {"num_frames": 17, "num_latent_frames_per_chunk": 3}
    return Tiny(pipe, request, _GUIDED, {"width": 96})


@tiny("HeliosPyramidPipeline")
def helios_pyramid() -> Tiny:
    pipe = diffusers.HeliosPyramidPipeline(**_parts(_helios(), diffusers.HeliosScheduler(gamma=0.3)))
    request = _REQUEST | {
        "num_frames": 9,
        "num_latent_frames_per_chunk": 3,
        "pyramid_num_inference_steps_list": [4, 4, 4],
        "num_inference_steps": OMIT,
    }
    return Tiny(pipe, request, _GUIDED, {"width": 128})
