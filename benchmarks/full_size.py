"""The models' transformers at their real size with random weights, and inputs of a forward, for timing.

Time depends on shapes and dtypes, not on the values of weights. Values are drawn so that nothing over- or underflows.
Sizes are the defaults of diffusers' classes, which are those of the released models: Qwen/Qwen-Image and its edit
models (2511 has a separate modulation for reference images), Qwen-Image 2.1, Tongyi-MAI/Z-Image,
black-forest-labs/FLUX.1-dev and FLUX.2-dev, Wan-AI/Wan2.1-T2V-14B, Lightricks/LTX-Video (2B) and HunyuanVideo. `small`
builds the same model with few channels, to run anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

Inputs = dict[str, Any]

TEXT_TOKENS, SMALL_TEXT_TOKENS = 128, 16


@dataclass(frozen=True)
class Model:
    """One transformer.

    Attributes:
        transformer: its class in diffusers.
        config: changes to the class's defaults.
        small: further changes for the small model.
        layers: the keys of the config that are numbers of blocks.
        inputs: (the transformer's config, side of the image in pixels) → a forward's arguments, on the CPU in fp32.
        sides: side in pixels of each measured image size, by name.
        reads: whether a forward reads values of its inputs, and so cannot run on the meta device.
    """

    transformer: str
    layers: tuple[str, ...]
    inputs: Callable[[Mapping[str, Any], int], Inputs]
    small: Mapping[str, Any]
    config: Mapping[str, Any]
    sides: Mapping[str, int]
    reads: bool = False


def _text(config: Mapping[str, Any], key: str) -> int:
    return TEXT_TOKENS if config[key] > 1024 else SMALL_TEXT_TOKENS


def _qwen(config: Mapping[str, Any], side: int, references: int = 0) -> Inputs:
    n = side // 16
    return {
        "hidden_states": torch.randn(1, n * n * (1 + references), config["in_channels"]),
        "encoder_hidden_states": torch.randn(1, _text(config, "joint_attention_dim"), config["joint_attention_dim"]),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, n, n)] * (1 + references)],
        "return_dict": False,
    }


def _qwen_edit(config: Mapping[str, Any], side: int) -> Inputs:
    return _qwen(config, side, references=1)


def _qwen_21(config: Mapping[str, Any], side: int) -> Inputs:
    n, text = side // 16, _text(config, "context_in_dim")
    return {
        "hidden_states": torch.randn(1, n * n, config["in_channels"]),
        "encoder_hidden_states": torch.randn(1, text, config["context_in_dim"]),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, n, n)]],
        "img_mask": torch.tensor([[False] * text + [True] * (n * n // 4)]),
        "return_dict": False,
    }


def _z_image(config: Mapping[str, Any], side: int) -> Inputs:
    text = torch.randn(_text(config, "cap_feat_dim"), config["cap_feat_dim"])
    return {
        "x": list(torch.randn(2, config["in_channels"], 1, side // 8, side // 8)),  # both branches of the guidance
        "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [text, text.flip(0)],
        "return_dict": False,
    }


def _flux(config: Mapping[str, Any], side: int) -> Inputs:
    n = side // 16
    text = 4 * _text(config, "joint_attention_dim")
    place = torch.arange(n).float()
    return {
        "hidden_states": torch.randn(1, n * n, config["in_channels"]),
        "encoder_hidden_states": torch.randn(1, text, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([torch.zeros(n, n), place[:, None].expand(n, n), place.expand(n, n)], -1).reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def _flux_2(config: Mapping[str, Any], side: int) -> Inputs:
    n = side // 16
    text = 4 * _text(config, "joint_attention_dim")
    zero, place = torch.zeros(1), torch.arange(n).float()
    return {
        "hidden_states": torch.randn(1, n * n, config["in_channels"]),
        "encoder_hidden_states": torch.randn(1, text, config["joint_attention_dim"]),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([4.0]),
        "img_ids": torch.cartesian_prod(zero, place, place, zero)[None],
        "txt_ids": torch.cartesian_prod(zero, zero, zero, torch.arange(text).float())[None],
        "return_dict": False,
    }


def _wan(config: Mapping[str, Any], side: int) -> Inputs:
    return {
        "hidden_states": torch.randn(1, config["in_channels"], 5, side // 8, side // 8),  # 17 frames
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 4 * _text(config, "text_dim"), config["text_dim"]),
        "return_dict": False,
    }


def _ltx(config: Mapping[str, Any], side: int) -> Inputs:
    n, frames = side // 32, 3  # 17 of the video's
    text = _text(config, "caption_channels")
    return {
        "hidden_states": torch.randn(1, frames * n * n, config["in_channels"]),
        "encoder_hidden_states": torch.randn(1, text, config["caption_channels"]),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, text),
        "num_frames": frames,
        "height": n,
        "width": n,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def _hunyuan_video(config: Mapping[str, Any], side: int) -> Inputs:
    text = 2 * _text(config, "text_embed_dim")
    return {
        "hidden_states": torch.randn(1, config["in_channels"], 5, side // 8, side // 8),  # 17 frames
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.int64),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }


_SIDES = {"512²": 512, "1024²": 1024}
_SMALL_QWEN = {
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "num_layers": 2,
}
_SMALL_QWEN_21 = {name: size for name, size in _SMALL_QWEN.items() if name != "joint_attention_dim"}
_SMALL_FLUX = _SMALL_QWEN | {"pooled_projection_dim": 32, "num_single_layers": 2}
_SMALL_FLUX_2 = {
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 8, 8, 8),
    "num_layers": 2,
    "num_single_layers": 2,
}
_SMALL_Z = {
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": [8, 12, 12],
}
_SMALL_HUNYUAN_VIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (8, 12, 12),
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
}
_SMALL_LTX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "num_layers": 2,
}
_SMALL_WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 48}

MODELS = {
    "qwen-image": Model("QwenImageTransformer2DModel", ("num_layers",), _qwen, _SMALL_QWEN, {}, _SIDES),
    "qwen-image-edit": Model("QwenImageTransformer2DModel", ("num_layers",), _qwen_edit, _SMALL_QWEN, {}, _SIDES),
    "qwen-image-edit-2511": Model(
        "QwenImageTransformer2DModel", ("num_layers",), _qwen_edit, _SMALL_QWEN, {"zero_cond_t": True}, _SIDES
    ),
    "qwen-image-2.1": Model(
        "QwenImage21Transformer2DModel",
        ("num_layers",),
        _qwen_21,
        _SMALL_QWEN_21 | {"context_in_dim": 32},
        {},
        _SIDES,
        reads=True,
    ),
    "z-image": Model("ZImageTransformer2DModel", ("n_layers",), _z_image, _SMALL_Z, {}, _SIDES),
    "flux": Model(
        "FluxTransformer2DModel",
        ("num_layers", "num_single_layers"),
        _flux,
        _SMALL_FLUX,
        {"guidance_embeds": True},
        _SIDES,
    ),
    "flux-2": Model("Flux2Transformer2DModel", ("num_layers", "num_single_layers"), _flux_2, _SMALL_FLUX_2, {}, _SIDES),
    "wan": Model(
        "WanTransformer3DModel",
        ("num_layers",),
        _wan,
        _SMALL_WAN | {"num_layers": 2},
        {},
        {f"17 frames {name}": side for name, side in _SIDES.items()},
    ),
    "hunyuan-video": Model(
        "HunyuanVideoTransformer3DModel",
        ("num_layers", "num_single_layers"),
        _hunyuan_video,
        _SMALL_HUNYUAN_VIDEO,
        {},
        {f"17 frames {name}": side for name, side in _SIDES.items()},
    ),
    "ltx": Model(
        "LTXVideoTransformer3DModel",
        ("num_layers",),
        _ltx,
        _SMALL_LTX,
        {},
        {f"17 frames {name}": side for name, side in _SIDES.items()},
    ),
}
SMALL_SIDE = 64


def build(
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    small: bool = False,
    layers: int | None = None,
) -> Any:
    """The transformer with random weights, with at most `layers` blocks of each kind.

    The same arguments give the same weights. On the meta device there are only shapes.
    """
    config = {**model.config, **(model.small if small else {})}
    kind = getattr(diffusers, model.transformer)
    with init_empty_weights(include_buffers=False):
        transformer = kind(**config)
        if layers is not None:
            counts = {key: min(layers, transformer.config[key]) for key in model.layers}
            transformer = kind(**config | counts)
    keep = getattr(kind, "_keep_in_fp32_modules", None) or ()
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    for name, parameter in list(transformer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        one = torch.empty(
            parameter.shape, device=device, dtype=torch.float32 if any(part in name for part in keep) else dtype
        )
        if parameter.dim() > 1:
            one.normal_(0.0, min(0.02, parameter.shape[-1] ** -0.5), generator=generator)
        else:  # biases, and the weights of norms
            one.normal_(0.0, 0.02, generator=generator).add_(float(leaf == "weight"))
        transformer.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(one, requires_grad=False))
    return transformer.to(device).eval()


def inputs(model: Model, transformer: Any, side: int, dtype: torch.dtype) -> Inputs:
    """A forward's arguments for the transformer, on its device; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model.inputs(transformer.config, side)
    device = next(transformer.parameters()).device

    def placed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            narrow = (
                value.is_floating_point() and value.dim() > 1 and value.shape[-1] > 4
            )  # times and positions keep their dtype
            return value.to(device, dtype if narrow else value.dtype)
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [placed(one) for one in value]
        return value

    return {name: placed(value) for name, value in made.items()}
