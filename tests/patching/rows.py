"""Tiny transformers whose blocks have a fused forward, for the tests in `test_transformers.py`.

Each row says how a transformer is made and called, and what can differ in its blocks. A change takes the blocks, and
returns the reasons why some of them are then not fused, by their place.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21TransformerBlock

Change = Callable[[Sequence[Any]], Mapping[int, str]]


@dataclass(frozen=True)
class Row:
    """One transformer.

    Attributes:
        make: makes it, the same each time.
        arguments: (transformer, seed, **case) → the arguments of one call.
        cases: the calls that are tried.
        classes: the classes of its blocks.
        odd: changes of the blocks with which some are left alone.
        later: changes that also count if they come after patching, with how far the result then moves at least.
        boxes: paths of layers that a fused forward calls, by the block's place.
    """

    make: Callable[[], Any]
    arguments: Callable[..., dict[str, Any]]
    cases: Mapping[str, Mapping[str, Any]]
    classes: tuple[type[torch.nn.Module], ...]
    odd: Sequence[Change]
    later: Mapping[Change, float]
    boxes: Mapping[int, Sequence[str]]

    def blocks(self, transformer: Any) -> list[Any]:
        """Its blocks, in order."""
        return [module for module in transformer.modules() if isinstance(module, self.classes)]

    @property
    def module(self) -> Any:
        """The module of diffusers in which its classes are."""
        return sys.modules[self.classes[0].__module__]


def random_norms(model: torch.nn.Module) -> Any:
    """The model, ready to be called, with random weights of its norms, which are 1 until someone trains them."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model.eval()


def draw(transformer: Any, seed: int) -> Callable[..., torch.Tensor]:
    """A function that draws normal numbers of a shape, in the dtype of the transformer's last layer."""
    generator, dtype = torch.Generator().manual_seed(seed), transformer.proj_out.weight.dtype
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def doubled(module: torch.nn.Module) -> None:
    """Make a module return twice as much."""
    module.register_forward_hook(
        lambda module, args, output: tuple(2 * t for t in output) if isinstance(output, tuple) else 2 * output
    )


def another_processor(attn: Any) -> None:
    """Give an attention a processor of another class, which returns twice as much."""

    class Theirs(type(attn.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            return tuple(2 * t for t in result) if isinstance(result, tuple) else 2 * result

    attn.set_processor(Theirs())


# FLUX.2


def flux_2() -> Any:
    torch.manual_seed(0)
    return random_norms(
        diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 8, 8, 8),
        )
    )


def flux_2_arguments(transformer: Any, seed: int = 0, batch: int = 1, texts: int | None = None, side: int = 4) -> Any:
    randn = draw(transformer, seed)
    place, words = torch.arange(1.0 * side), torch.arange(7.0)
    zero = torch.zeros(1)
    return {
        "hidden_states": randn(batch, side * side, 16),
        "encoder_hidden_states": randn(batch if texts is None else texts, 7, 32),
        "timestep": torch.tensor([0.25, 0.5][:batch]),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": torch.cartesian_prod(zero, place, place, zero),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, words),
        "return_dict": False,
    }


def flux_2_layer_norm(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[0].norm2_context = torch.nn.LayerNorm(64)
    return {0: "norm2_context has weights or normalises several dimensions"}


def flux_2_eps(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[0].attn.norm_added_k.eps = blocks[2].attn.norm_k.eps = 1e-3
    return {
        0: "attn.norm_added_k has eps 0.001; attn.norm_added_q has 1e-06",
        2: "attn.norm_k has eps 0.001; attn.norm_q has 1e-06",
    }


def flux_2_fused_projections(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[1].attn.fuse_projections()
    return {1: "attn has fused projections"}


def flux_2_processors(blocks: Sequence[Any]) -> Mapping[int, str]:
    for block in blocks[1:3]:
        another_processor(block.attn)
    return {
        1: "attn.processor is Theirs, not Flux2AttnProcessor",
        2: "attn.processor is Theirs, not Flux2ParallelSelfAttnProcessor",
    }


def flux_2_hooks(blocks: Sequence[Any]) -> Mapping[int, str]:
    doubled(blocks[0].ff.act_fn.gate_fn)
    doubled(blocks[1].norm1)
    doubled(blocks[2].attn.mlp_act_fn)
    doubled(blocks[3].norm)
    return {
        0: "ff.act_fn.gate_fn is hooked",
        1: "norm1 is hooked",
        2: "attn.mlp_act_fn is hooked",
        3: "norm is hooked",
    }


# LTX


def ltx(**config: Any) -> Any:
    torch.manual_seed(0)
    return random_norms(
        diffusers.LTXVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            num_layers=2,
            caption_channels=32,
            **config,
        )
    )


def ltx_arguments(
    transformer: Any,
    seed: int = 0,
    batch: int = 1,
    masked: bool = False,
    by_token: bool = False,
    placed: bool = False,
    side: int = 4,
) -> Any:
    """A video of two frames; `placed`: each sample's tokens are elsewhere in time and space."""
    randn, S = draw(transformer, seed), side * side // 2
    timestep = torch.tensor([250.0, 500.0][:batch])
    if by_token:
        timestep = timestep[:, None] * (torch.arange(S) >= S // 2)
    given = {
        "hidden_states": randn(batch, S, 16),
        "encoder_hidden_states": randn(batch, 7, 32),
        "timestep": timestep,
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [4]])[:batch] if masked else None,
        "return_dict": False,
    }
    if placed:
        return given | {"video_coords": 100 * torch.rand(batch, 3, S, generator=torch.Generator().manual_seed(seed))}
    return given | {
        "num_frames": 2,
        "height": side // 2,
        "width": side // 2,
        "rope_interpolation_scale": (1 / 3, 32.0, 32.0),
    }


def ltx_bias(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[0].norm2.weight = torch.nn.Parameter(torch.rand(64))
    blocks[0].norm2.bias = torch.nn.Parameter(torch.rand(64))
    return {0: "norm2 has a bias"}


def ltx_eps(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[0].attn1.norm_k.eps = 1e-3
    return {0: "attn1.norm_k has eps 0.001; attn1.norm_q has 1e-05"}


def ltx_gelu(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[1].ff.net[0].approximate = "none"
    return {1: "ff.net.0 has approximate='none', not 'tanh'"}


def ltx_fused_projections(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[0].attn1.fuse_projections()
    blocks[1].attn2.fuse_projections()
    return {0: "attn1 has fused projections", 1: "attn2 has fused projections"}


def ltx_processors(blocks: Sequence[Any]) -> Mapping[int, str]:
    another_processor(blocks[0].attn1)
    another_processor(blocks[1].attn2)
    return {
        0: "attn1.processor is Theirs, not LTXVideoAttnProcessor",
        1: "attn2.processor is Theirs, not LTXVideoAttnProcessor",
    }


def ltx_hooks(blocks: Sequence[Any]) -> Mapping[int, str]:
    doubled(blocks[0].attn2.norm_k)
    doubled(blocks[1].norm2)
    return {0: "attn2.norm_k is hooked", 1: "norm2 is hooked"}


# Qwen-Image 2.1


def qwen_image_21(causal: bool = True) -> Any:
    torch.manual_seed(0)
    return random_norms(
        diffusers.QwenImage21Transformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=2,
            context_in_dim=32,
            axes_dims_rope=(8, 12, 12),
            causal_condition=causal,
        )
    )


def qwen_image_21_arguments(
    transformer: Any, seed: int = 0, batch: int = 1, reference: bool = False, masked: bool = False, side: int = 4
) -> Any:
    """Text of 7 tokens, with an image of 16 tokens (4 slots) after the third if there is a reference."""
    randn, slots = draw(transformer, seed), [False] * 7
    if reference:
        slots[3:3] = [True] * 4
    given = {
        "hidden_states": randn(batch, side * side + 16 * reference, 16),
        "encoder_hidden_states": randn(batch, len(slots), 32),
        "timestep": torch.tensor([0.25, 0.5][:batch]),
        "img_shapes": [[(1, 4, 4)] * reference + [(1, side, side)]] * batch,
        "img_mask": torch.tensor([slots + [True] * (side * side // 4)] * batch),
        "return_dict": False,
    }
    if masked:
        given["encoder_hidden_states_mask"] = torch.arange(len(slots)) < torch.tensor([[len(slots)], [5]])[:batch]
    return given


def qwen_image_21_layer_norm(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[1].img_norm2 = torch.nn.LayerNorm(64)
    return {1: "img_norm2 has weights or normalises several dimensions"}


def qwen_image_21_eps(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[0].attn.norm_k.eps = 1e-3
    return {0: "attn.norm_k has eps 0.001; attn.norm_q has 1e-06"}


def qwen_image_21_processors(blocks: Sequence[Any]) -> Mapping[int, str]:
    another_processor(blocks[2].attn)
    return {2: "attn.processor is Theirs, not QwenImage21AttnProcessor"}


def qwen_image_21_hooks(blocks: Sequence[Any]) -> Mapping[int, str]:
    doubled(blocks[0].attn)
    doubled(blocks[1].img_norm1)
    doubled(blocks[2].img_mlp.activation_fn)
    return {0: "attn is hooked", 1: "img_norm1 is hooked", 2: "img_mlp.activation_fn is hooked"}


# HunyuanVideo


def hunyuan_video() -> Any:
    torch.manual_seed(0)
    return random_norms(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=16,
            rope_axes_dim=(8, 12, 12),
        )
    )


def hunyuan_video_arguments(
    transformer: Any, seed: int = 0, batch: int = 1, masked: bool = False, side: int = 4
) -> Any:
    """A video of two frames of side × side latents."""
    randn = draw(transformer, seed)
    there = torch.arange(7) < torch.tensor([[7 if not masked else 6], [4]])[:batch]
    return {
        "hidden_states": randn(batch, 4, 2, side, side),
        "timestep": torch.tensor([250, 500][:batch]),
        "encoder_hidden_states": randn(batch, 7, 32),
        "encoder_attention_mask": there.long(),
        "pooled_projections": randn(batch, 16),
        "guidance": torch.full((batch,), 4000.0),
        "return_dict": False,
    }


def hunyuan_video_layer_norm(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[0].norm2_context = torch.nn.LayerNorm(64)
    return {0: "norm2_context has weights or normalises several dimensions"}


def hunyuan_video_numbers(blocks: Sequence[Any]) -> Mapping[int, str]:
    blocks[2].attn.norm_k.eps = blocks[0].attn.norm_added_k.eps = 1e-3
    blocks[1].ff.net[0].approximate = blocks[3].act_mlp.approximate = "none"
    return {
        0: "attn.norm_added_k has eps 0.001; attn.norm_added_q has 1e-06",
        1: "ff.net.0 has approximate='none', not 'tanh'",
        2: "attn.norm_k has eps 0.001; attn.norm_q has 1e-06",
        3: "act_mlp has approximate='none', not 'tanh'",
    }


def hunyuan_video_processors(blocks: Sequence[Any]) -> Mapping[int, str]:
    another_processor(blocks[1].attn)
    another_processor(blocks[2].attn)
    return dict.fromkeys((1, 2), "attn.processor is Theirs, not HunyuanVideoAttnProcessor2_0")


def hunyuan_video_hooks(blocks: Sequence[Any]) -> Mapping[int, str]:
    doubled(blocks[0].norm1)
    doubled(blocks[1].attn.norm_added_q)
    doubled(blocks[2].norm.norm)
    doubled(blocks[3].act_mlp)
    return {0: "norm1 is hooked", 1: "attn.norm_added_q is hooked", 2: "norm.norm is hooked", 3: "act_mlp is hooked"}


ROWS = {
    "flux_2": Row(
        make=flux_2,
        arguments=flux_2_arguments,
        cases={"plain": {}, "batch": {"batch": 2}, "one text": {"batch": 2, "texts": 1}},
        classes=(Flux2TransformerBlock, Flux2SingleTransformerBlock),
        odd=(flux_2_layer_norm, flux_2_eps, flux_2_fused_projections, flux_2_processors, flux_2_hooks),
        later={flux_2_fused_projections: 0.0, flux_2_processors: 1e-3, flux_2_hooks: 1e-3},
        boxes={
            0: ("attn.to_q", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "ff.linear_in"),
            1: ("attn.to_v", "ff_context.linear_out"),
            3: ("attn.to_qkv_mlp_proj", "attn.to_out"),
        },
    ),
    "ltx": Row(
        make=ltx,
        arguments=ltx_arguments,
        cases={
            "plain": {},
            "batch": {"batch": 2},
            "mask": {"batch": 2, "masked": True},
            "by token": {"batch": 2, "masked": True, "by_token": True},
            "placed": {"batch": 2, "placed": True},
        },
        classes=(LTXVideoTransformerBlock,),
        odd=(ltx_bias, ltx_eps, ltx_gelu, ltx_fused_projections, ltx_processors, ltx_hooks),
        later={ltx_fused_projections: 0.0, ltx_processors: 1e-3, ltx_hooks: 1e-3},
        boxes={
            0: ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj"),
            1: ("attn1.to_v", "attn2.to_q", "attn2.to_out.0", "ff.net.2"),
        },
    ),
    "qwen_image_21": Row(
        make=qwen_image_21,
        arguments=qwen_image_21_arguments,
        cases={
            "plain": {},
            "batch": {"batch": 2},
            "reference": {"batch": 2, "reference": True},
            "mask": {"batch": 2, "reference": True, "masked": True},
        },
        classes=(QwenImage21TransformerBlock,),
        odd=(qwen_image_21_layer_norm, qwen_image_21_eps, qwen_image_21_processors, qwen_image_21_hooks),
        later={qwen_image_21_processors: 1e-3, qwen_image_21_hooks: 1e-3},
        boxes={
            0: ("attn.to_q", "attn.to_out.0", "img_mlp.proj"),
            1: ("attn.to_v", "img_mlp.gate_layer", "img_mlp.out"),
        },
    ),
    "hunyuan_video": Row(
        make=hunyuan_video,
        arguments=hunyuan_video_arguments,
        cases={"plain": {}, "batch": {"batch": 2}, "mask": {"masked": True}},
        classes=(HunyuanVideoTransformerBlock, HunyuanVideoSingleTransformerBlock),
        odd=(hunyuan_video_layer_norm, hunyuan_video_numbers, hunyuan_video_processors, hunyuan_video_hooks),
        later={hunyuan_video_processors: 1e-3, hunyuan_video_hooks: 1e-3},
        boxes={
            0: ("norm1.linear", "attn.to_q", "attn.add_v_proj", "attn.to_out.0", "ff.net.0.proj"),
            1: ("norm1_context.silu", "attn.to_v", "attn.to_add_out", "ff_context.net.2"),
            2: ("norm.linear", "attn.to_k", "proj_mlp", "proj_out"),
        },
    ),
}
