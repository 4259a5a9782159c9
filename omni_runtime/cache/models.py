"""The table of transformer classes: what the block-list seam must know of a model, one row per class.

To add a model whose blocks form one sequence (in one or several module lists), add a row to `MODELS`: where the lists
are, how a block names its hidden states, what it returns, and, for TeaCache, how block 0 modulates its input. Nothing
of the model's `forward` is repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from omni_kernels.patching.backends import nearest

#: The arguments of a call, by name.
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Modulation:
    """How a block norms and modulates its input: norm(h)·weight·(1 + scale) + shift.

    scale and shift are [B, D] or [B, 1, D], weight [D].
    """

    norm: Literal["layer", "rms"]
    scale: torch.Tensor
    shift: torch.Tensor | None
    weight: torch.Tensor | None
    eps: float


def _all_tokens(arguments: Arguments) -> int | None:
    return None


@dataclass(frozen=True)
class ModelRow:
    """One transformer class.

    Attributes:
        block_lists: attributes of the transformer that hold its blocks, in the order in which they run.
        hidden, encoder: the block's arguments for the image and the text stream; `encoder` None for a single stream.
        returns: what a block returns: (encoder, hidden), or the hidden states alone.
        between: arguments of the transformer's forward that make it work between blocks (ControlNet residuals).
        depth: keys of the transformer's config that add up to the number of blocks.
        modulation: block 0 and its arguments → how it modulates its input; None where only TeaCache is to do without.
        noise_tokens: the forward's arguments → how many leading tokens are noise; None for all.
        tea_coefficients: TeaCache's polynomial, highest power first; None where none was fitted.
        pipelines: the diffusers pipelines that run this transformer.
    """

    block_lists: tuple[str, ...]
    hidden: str
    encoder: str | None
    returns: Literal["encoder_first", "hidden"]
    depth: tuple[str, ...]
    between: tuple[str, ...] = ()
    modulation: Callable[[torch.nn.Module, Arguments], Modulation] | None = None
    noise_tokens: Callable[[Arguments], int | None] = _all_tokens
    tea_coefficients: tuple[float, ...] | None = None
    pipelines: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransformerFacts:
    """What can be known of a transformer from its config.json, before its weights are loaded.

    `blocks` is None for a class without a row, whose blocks nobody can count.
    """

    class_name: str
    blocks: int | None


def _qwen_modulation(block: Any, arguments: Arguments) -> Modulation:
    temb = arguments["temb"]
    if block.zero_cond_t:  # the second half modulates the reference tokens, which are no noise
        temb = temb.chunk(2, dim=0)[0]
    shift, scale = block.img_mod(temb).chunk(6, dim=-1)[:2]
    return Modulation("layer", scale, shift, None, block.img_norm1.eps)


def _qwen_noise_tokens(arguments: Arguments) -> int | None:
    """An edit's reference images stand behind the noise, and never change: they would dilute every distance."""
    shapes = arguments.get("img_shapes")
    if not shapes or not isinstance(shapes[0], list) or len(shapes[0]) == 1:
        return None
    segments = shapes[0]
    # Layered pipelines denoise all segments but the last, and they alone condition the time embedding further.
    noise = segments[:-1] if arguments.get("additional_t_cond") is not None else segments[:1]
    return sum(map(math.prod, noise))


def _z_image_modulation(block: Any, arguments: Arguments) -> Modulation:
    adaln = arguments.get("adaln_input")
    if adaln is None:
        adaln = arguments["adaln_noisy"]
    scale = block.adaLN_modulation(adaln).chunk(4, dim=-1)[0]
    norm = block.attention_norm1
    weight = norm.weight
    if weight.device != adaln.device:  # an offload hook fetches it when the layer is called
        weight = norm(adaln.new_ones(1, weight.numel()))[0]
    return Modulation("rms", scale, None, weight, norm.eps)


def _flux_modulation(block: Any, arguments: Arguments) -> Modulation:
    norm = block.norm1
    shift, scale = norm.linear(norm.silu(arguments["temb"])).chunk(6, dim=-1)[:2]
    return Modulation("layer", scale, shift, None, norm.norm.eps)


MODELS: dict[str, ModelRow] = {
    "QwenImageTransformer2DModel": ModelRow(
        block_lists=("transformer_blocks",),
        hidden="hidden_states",
        encoder="encoder_hidden_states",
        returns="encoder_first",
        depth=("num_layers",),
        between=("controlnet_block_samples",),
        modulation=_qwen_modulation,
        noise_tokens=_qwen_noise_tokens,
        tea_coefficients=(-450.0, 280.0, -45.0, 3.2, -0.02),
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
        block_lists=("layers",),
        hidden="x",
        encoder=None,
        returns="hidden",
        depth=("n_layers",),
        between=("controlnet_block_samples",),
        modulation=_z_image_modulation,
        tea_coefficients=(-75.4613422, -92.3596156, 57.5318402, -3.76790311, 0.227176809),
        pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline"),
    ),
    "FluxTransformer2DModel": ModelRow(
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        hidden="hidden_states",
        encoder="encoder_hidden_states",
        returns="encoder_first",
        depth=("num_layers", "num_single_layers"),
        between=("controlnet_block_samples", "controlnet_single_block_samples"),
        modulation=_flux_modulation,
        tea_coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
    ),
}


def row_of(class_name: str) -> ModelRow:
    """The row of a transformer class.

    Raises:
        ValueError: there is none; the message says what a row needs.
    """
    row = MODELS.get(class_name)
    if row is None:
        raise ValueError(
            f"no cache knows the transformer class {class_name!r} yet: {nearest(class_name, MODELS)}. "
            "To add it, give omni_runtime.cache.models.MODELS a ModelRow under that name: its block lists, the names "
            "of a block's hidden-state arguments, what a block returns, and, for tea_cache, how block 0 modulates its "
            "input"
        )
    return row


def describe(config: Mapping[str, Any]) -> TransformerFacts:
    """The facts in a transformer's config.json (its `_class_name` and depth).

    Raises:
        ValueError: the config lacks what its row counts blocks by.
    """
    class_name = config["_class_name"]
    row = MODELS.get(class_name)
    if row is None:
        return TransformerFacts(class_name, None)
    missing = [key for key in row.depth if not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"the config of {class_name} lacks {', '.join(missing)}, from which its blocks are counted")
    return TransformerFacts(class_name, sum(config[key] for key in row.depth))


def block_lists(transformer: torch.nn.Module, row: ModelRow) -> Sequence[torch.nn.ModuleList]:
    """The transformer's block lists, by its row.

    Raises:
        ValueError: an attribute that the row names is missing or no module list.
    """
    lists = []
    for name in row.block_lists:
        blocks = getattr(transformer, name, None)
        if not isinstance(blocks, torch.nn.ModuleList):
            raise ValueError(
                f"{type(transformer).__name__}.{name} is {type(blocks).__name__}, not a list of blocks as its row in "
                "omni_runtime.cache.models.MODELS says"
            )
        lists.append(blocks)
    return lists
