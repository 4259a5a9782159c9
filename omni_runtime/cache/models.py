"""The table of transformer classes: what cannot be seen in a forward of a model, one row per class.

A model needs no row to be cached: where its blocks are, and how they are called, is found in its first forward
(`omni_runtime.cache.contract`). A row adds how block 0 modulates its input, which TeaCache and SeaCache watch; which
tokens are noise, and their grid; and published numbers. Nothing of the model's `forward` is repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

#: The arguments of a call, by name.
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Modulation:
    """How a block normalises and modulates its input: norm(h)·weight·(1 + scale) + shift.

    scale and shift are [B, D], [B, 1, D] or, for each token, [B, S, D]; weight is [D].
    """

    norm: Literal["layer", "rms"]
    scale: torch.Tensor
    shift: torch.Tensor | None
    weight: torch.Tensor | None
    eps: float

    def of_tokens(self, which: slice) -> Modulation:
        """That of some of the tokens."""
        scale, shift = (
            one if one is None or one.dim() < 3 or one.shape[1] == 1 else one[:, which]
            for one in (self.scale, self.shift)
        )
        assert scale is not None
        return replace(self, scale=scale, shift=shift)


#: (frames, height, width), in tokens.
Grid = tuple[int, int, int]
#: Tokens [first, end) of a sequence.
Tokens = tuple[int, int]


def _all_tokens(transformer: Any, arguments: Arguments) -> Tokens | None:
    return None


@dataclass(frozen=True)
class ModelRow:
    """One transformer class.

    Attributes:
        depths: the keys of its config that hold the numbers of its blocks, which are then known before the weights are
            loaded; empty for a class without a row of its own.
        between: the arguments of the forward that make the model do something between its blocks, or count them
            (ControlNet residuals). If they are all None, a skipped step leaves the loop over the blocks early.
        modulation: (block 0, its arguments) → how it modulates its input. None: TeaCache does not support the model.
        noise_tokens: (transformer, the forward's arguments) → which of block 0's tokens are noise; None for all of
            them. Tokens of images that are given change little, so they would make each distance smaller. It is called
            when the shape of the states changes, so in few forwards.
        noise_grid: the forward's arguments → the grid of the tokens, which are stored row by row; raises ValueError
            if they form no grid in this call. If `noise_tokens` leaves out whole frames, so does the cache. None:
            SeaCache does not support the model.
        tea_coefficients: TeaCache's polynomial, highest power first; None if none was fitted.
        mag_ratios: MagCache's ratio of each step; None if none were published.
        pipelines: the diffusers pipelines that run this transformer.
    """

    depths: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    modulation: Callable[[torch.nn.Module, Arguments], Modulation] | None = None
    noise_tokens: Callable[[Any, Arguments], Tokens | None] = _all_tokens
    noise_grid: Callable[[Arguments], Grid] | None = None
    tea_coefficients: tuple[float, ...] | None = None
    mag_ratios: tuple[float, ...] | None = None
    pipelines: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransformerFacts:
    """What the config.json says about a transformer, before its weights are loaded.

    `blocks` is the number of blocks; None for a class without a row, where it is unknown.
    """

    class_name: str
    blocks: int | None


def _qwen_modulation(block: Any, arguments: Arguments) -> Modulation:
    temb = arguments["temb"]
    if block.zero_cond_t:  # the second half modulates the reference tokens, which are not noise
        temb = temb.chunk(2, dim=0)[0]
    shift, scale = block.img_mod(temb).chunk(6, dim=-1)[:2]
    return Modulation("layer", scale, shift, None, block.img_norm1.eps)


def _qwen_noise_tokens(transformer: Any, arguments: Arguments) -> Tokens | None:
    """An edit's reference images come after the noise."""
    shapes = arguments.get("img_shapes")
    if not shapes or not isinstance(shapes[0], list) or len(shapes[0]) == 1:
        return None
    return 0, sum(map(math.prod, _qwen_noise(shapes[0], arguments)))


def _those(noisy: torch.Tensor) -> Tokens | None:
    """The tokens from the first to the last that is noisy; None if these are all of them, or none is.

    Args:
        noisy: bool, [S]. The host waits for it.
    """
    places = noisy.nonzero().flatten().tolist()
    found = (places[0], places[-1] + 1) if places else (0, 0)
    return found if 0 < found[1] - found[0] < len(noisy) else None


def _qwen_noise(segments: Sequence[Grid], arguments: Arguments) -> Sequence[Grid]:
    # Layered pipelines denoise all segments but the last. Only these pipelines pass `additional_t_cond`.
    return segments[:-1] if arguments.get("additional_t_cond") is not None else segments[:1]


def _qwen_noise_grid(arguments: Arguments) -> Grid:
    shapes = arguments.get("img_shapes")
    if not shapes:
        raise ValueError("the transformer was called without img_shapes, from which its tokens' grid is known")
    segments = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    noise = segments if len(segments) == 1 else _qwen_noise(segments, arguments)
    if len(noise) > 1:
        raise ValueError(f"the noise lies in {len(noise)} layers, which form no grid")
    frames, height, width = noise[0]
    return frames, height, width


def _z_image_modulation(block: Any, arguments: Arguments) -> Modulation:
    adaln = arguments.get("adaln_input")
    if adaln is None:
        adaln = arguments["adaln_noisy"]
    scale = block.adaLN_modulation(adaln).chunk(4, dim=-1)[0]
    norm = block.attention_norm1
    weight = norm.weight
    if weight.device != adaln.device:  # offloaded: its hook loads it when the layer is called, here with ones
        weight = norm(adaln.new_ones(1, weight.numel()))[0]
    return Modulation("rms", scale, None, weight, norm.eps)


def _z_image_noise_grid(arguments: Arguments) -> Grid:
    latents = arguments["x"]  # [C, F, H, W] of each sample
    if isinstance(latents[0], list):
        raise ValueError("the transformer was called with references among its latents: its tokens form no grid")
    _, frames, height, width = latents[0].shape
    patch, frame_patch = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    return frames // frame_patch, height // patch, width // patch


def _flux_noise_grid(arguments: Arguments) -> Grid:
    """The grid of the noise tokens, from their ids, which takes one transfer to the host.

    Only the ids give height and width. Reference images have another first id.
    """
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    noise = ids[ids[:, 0] == 0]
    if not len(noise):
        raise ValueError("none of the transformer's img_ids begins with 0, as those of a single image do")
    height, width = (int(last) + 1 for last in noise.amax(0)[1:3].tolist())
    return 1, height, width


def _flux_noise_tokens(transformer: Any, arguments: Arguments) -> Tokens | None:
    """Reference images (FLUX.1 Kontext, FLUX.2) have another first id than the noise."""
    ids = arguments.get("img_ids")
    if ids is None or not len(transformer.transformer_blocks):  # block 0 has the text, too
        return None
    return _those((ids[0] if ids.ndim == 3 else ids)[:, 0] == 0)


def _timed_noise_tokens(transformer: Any, arguments: Arguments) -> Tokens | None:
    """Where each token has a timestep, those of frames that are given are at 0 (LTX-Video, Wan 2.2 with 5 B)."""
    timestep = arguments.get("timestep")
    if timestep is None or timestep.ndim < 2 or timestep.shape[1] == 1:
        return None
    return _those(timestep[0].flatten() > 0)


def _hunyuan_noise_tokens(transformer: Any, arguments: Arguments) -> Tokens | None:
    """In image-to-video models that replace tokens, those of the first frame are the picture."""
    if transformer.config.image_condition_type != "token_replace":
        return None
    frames, height, width = _video_noise_grid(arguments)
    return (height * width, frames * height * width) if frames > 1 else None


def _flux_modulation(block: Any, arguments: Arguments) -> Modulation:
    """AdaLayerNormZero, or one with more than 6 parts (Stable Diffusion 3.5): shift and scale come first."""
    norm = block.norm1
    modulation = norm.linear(norm.silu(arguments["temb"]))
    parts = modulation.shape[-1] // norm.norm.normalized_shape[0]
    shift, scale = modulation.chunk(parts, dim=-1)[:2]
    return Modulation("layer", scale, shift, None, norm.norm.eps)


def _flux_2_modulation(block: Any, arguments: Arguments) -> Modulation:
    shift, scale = arguments["temb_mod_img"].chunk(6, dim=-1)[:2]
    return Modulation("layer", scale, shift, None, block.norm1.eps)


def _chroma_modulation(block: Any, arguments: Arguments) -> Modulation:
    shift, scale = arguments["temb"][:, 0], arguments["temb"][:, 1]  # of the 6 parts of the image, before the text's
    return Modulation("layer", scale, shift, None, block.norm1.norm.eps)


def _qwen_21_modulation(block: Any, arguments: Arguments) -> Modulation:
    scale = arguments["modulation"].chunk(4, dim=-1)[0]
    noise = arguments.get("target_token_mask")
    if noise is not None:  # the last row modulates the text and the references, as at t = 0
        scale = torch.where(noise[None, :, None], scale[:-1, None], scale[-1:, None])
    return Modulation("layer", scale, None, None, block.img_norm1.eps)


def _qwen_21_noise_grid(arguments: Arguments) -> Grid:
    if arguments.get("kv_cache_mode") is None:
        raise ValueError("the noise comes after the text in its sequence: use the pipeline's cache of keys and values")
    frames, height, width = arguments["img_shapes"][0][-1]
    return frames, height, width


def _table_modulation(block: Any, arguments: Arguments) -> Modulation:
    """Wan and LTX-Video: a table of the block is added to the time embedding, whose parts come before the last axis."""
    temb, table = arguments["temb"], block.scale_shift_table
    parts, width = table.shape[-2:]
    both = temb.unflatten(-1, (parts, width)) if temb.shape[-1] != width else temb
    shift, scale = (both.float() + table.float()).unbind(-2)[:2]
    return Modulation("rms" if hasattr(block, "ff") else "layer", scale, shift, None, block.norm1.eps)


def _video_noise_grid(arguments: Arguments) -> Grid:
    *_, frames, height, width = arguments["hidden_states"].shape  # [B, C, F, H, W]; a patch is 1×2×2
    return frames, height // 2, width // 2


def _picture_noise_grid(arguments: Arguments) -> Grid:
    *_, height, width = arguments["hidden_states"].shape  # [B, C, H, W]; a patch is 2×2
    return 1, height // 2, width // 2


def _ltx_noise_grid(arguments: Arguments) -> Grid:
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None:
        raise ValueError("the transformer was called without num_frames, height and width")
    return int(frames), int(height), int(width)


#: Qwen-Image in 50 steps, from the MagCache project.
_QWEN_IMAGE_RATIOS = (
    1.0, 1.64062, 1.45312, 1.1875, 1.17188, 1.05469, 1.21094, 1.10938, 1.11719, 1.13281,
    1.11719, 1.07812, 1.07031, 1.08594, 1.08594, 1.07812, 1.03906, 1.04688, 1.07812, 1.07031,
    1.03125, 1.07812, 1.04688, 1.04688, 1.04688, 1.03906, 1.01562, 1.03125, 1.02344, 1.02344,
    1.02344, 1.03906, 1.0, 1.01562, 1.0, 0.99219, 1.00781, 0.98047, 0.95703, 0.96875,
    0.99219, 0.92578, 0.92578, 0.90625, 0.85938, 0.80469, 0.87891, 0.75, 0.60938, 0.55078,
)  # fmt: skip
#: FLUX.1-dev in 28 steps, from the MagCache project.
_FLUX_RATIOS = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125,
    1.02344, 0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0,
    0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062,
)  # fmt: skip


#: TeaCache's polynomials of FLUX, HunyuanVideo and LTX-Video are from its project (github.com/ali-vilab/TeaCache).
#: Qwen-Image's is from ComfyUI-TeaCache, as vLLM-Omni names it (`diffusion/cache/teacache/config.py`, version 0.30).
#: Z-Image's came without a source that can be named; vLLM-Omni uses Qwen-Image's there, and calls it untuned.
#: The project's eight for Wan 2.1 (`TeaCache4Wan2.1/teacache_generate.py`) do not apply: they rescale the change of the
#: time embedding (`e`, or `e0` with `--use_ret_steps`), not of block 0's modulated input, which also has the picture in
#: it; and each is of one of four checkpoints, which share this class. So Wan has none: `omni calibrate tea_cache`.
MODELS: dict[str, ModelRow] = {
    "QwenImageTransformer2DModel": ModelRow(
        depths=("num_layers",),
        between=("controlnet_block_samples",),
        modulation=_qwen_modulation,
        noise_tokens=_qwen_noise_tokens,
        noise_grid=_qwen_noise_grid,
        tea_coefficients=(-450.0, 280.0, -45.0, 3.2, -0.02),
        mag_ratios=_QWEN_IMAGE_RATIOS,
        pipelines=(
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageControlNetPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageEditInpaintPipeline",
        ),
    ),
    "ZImageTransformer2DModel": ModelRow(
        depths=("n_layers",),
        between=("controlnet_block_samples",),
        modulation=_z_image_modulation,
        noise_grid=_z_image_noise_grid,
        tea_coefficients=(-75.4613422, -92.3596156, 57.5318402, -3.76790311, 0.227176809),
        pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline"),
    ),
    "FluxTransformer2DModel": ModelRow(
        depths=("num_layers", "num_single_layers"),
        between=("controlnet_block_samples", "controlnet_single_block_samples"),
        modulation=_flux_modulation,
        noise_tokens=_flux_noise_tokens,
        noise_grid=_flux_noise_grid,
        tea_coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
        mag_ratios=_FLUX_RATIOS,
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
    ),
    "Flux2Transformer2DModel": ModelRow(
        depths=("num_layers", "num_single_layers"),
        between=("kv_cache", "kv_cache_mode"),
        modulation=_flux_2_modulation,
        noise_tokens=_flux_noise_tokens,
        noise_grid=_flux_noise_grid,
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    ),
    "QwenImage21Transformer2DModel": ModelRow(
        depths=("num_layers",),
        between=("kv_cache",),
        modulation=_qwen_21_modulation,
        noise_grid=_qwen_21_noise_grid,
        pipelines=("QwenImage21Pipeline",),
    ),
    "ChromaTransformer2DModel": ModelRow(
        depths=("num_layers", "num_single_layers"),
        between=("controlnet_block_samples", "controlnet_single_block_samples"),
        modulation=_chroma_modulation,
        noise_grid=_flux_noise_grid,
        pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline"),
    ),
    "SD3Transformer2DModel": ModelRow(
        depths=("num_layers",),
        between=("block_controlnet_hidden_states", "skip_layers"),
        modulation=_flux_modulation,
        noise_grid=_picture_noise_grid,
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    ),
    "WanTransformer3DModel": ModelRow(
        depths=("num_layers",),
        modulation=_table_modulation,
        noise_tokens=_timed_noise_tokens,
        noise_grid=_video_noise_grid,
        pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    ),
    "HunyuanVideoTransformer3DModel": ModelRow(
        depths=("num_layers", "num_single_layers"),
        modulation=_flux_modulation,
        noise_tokens=_hunyuan_noise_tokens,
        noise_grid=_video_noise_grid,
        tea_coefficients=(733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
        pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    ),
    "LTXVideoTransformer3DModel": ModelRow(
        depths=("num_layers",),
        modulation=_table_modulation,
        noise_tokens=_timed_noise_tokens,
        noise_grid=_ltx_noise_grid,
        tea_coefficients=(21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
        pipelines=("LTXPipeline", "LTXImageToVideoPipeline"),
    ),
}


#: Of a class that is not in the table.
UNKNOWN = ModelRow()


def row_of(class_name: str) -> ModelRow:
    """The row of a transformer class; `UNKNOWN` if there is none."""
    return MODELS.get(class_name, UNKNOWN)


def describe(config: Mapping[str, Any]) -> TransformerFacts:
    """Read the facts from a transformer's config: its `_class_name` and depth.

    Raises:
        ValueError: the config lacks a key that the row's `depths` name.
    """
    class_name = config["_class_name"]
    depths = row_of(class_name).depths
    missing = [key for key in depths if not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"the config of {class_name} lacks {', '.join(missing)}, from which its blocks are counted")
    return TransformerFacts(class_name, sum(config[key] for key in depths) if depths else None)


def depth(transformer: Any) -> int:
    """The number of blocks in a transformer's config; 0 if it has none."""
    name = type(transformer).__name__
    try:
        return describe({**getattr(transformer, "config", {}), "_class_name": name}).blocks or 0
    except ValueError:
        return 0
