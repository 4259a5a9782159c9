"""Table of fused forwards, one row per block class, and the report of which blocks of a pipeline were fused.

Classes are found by name; diffusers is not imported. A block that differs from what its row expects is not fused, and
the report says why.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.patching import (
    ahead,
    flux,
    flux2,
    hunyuan_video,
    ltx,
    qwen_image,
    qwen_image_21,
    vllm_omni,
    wan,
    z_image,
)
from omni_kernels.patching.changes import Patch, PatchConflictError
from omni_kernels.patching.structure import components, home, is_librarys, remember


@dataclass(frozen=True)
class BlockRule:
    """One class of blocks.

    Attributes:
        forward: the fused forward. Takes the block, then the arguments of the block's own forward. Returns
            NotImplemented if the block's own forward must run.
        unfit: returns why the fused forward cannot replace a block's own; None if it can.
        ahead: whether it computes the next block's first norm ahead (`omni_kernels.patching.ahead`).
    """

    forward: Callable[..., Any]
    unfit: Callable[[torch.nn.Module], str | None]
    ahead: bool = False


RULES = {
    "Flux2SingleTransformerBlock": BlockRule(flux2.single_forward, flux2.single_unfit, ahead=True),
    "Flux2TransformerBlock": BlockRule(flux2.double_forward, flux2.double_unfit, ahead=True),
    "FluxSingleTransformerBlock": BlockRule(flux.single_forward, flux.single_unfit),
    "FluxTransformerBlock": BlockRule(flux.double_forward, flux.double_unfit),
    "HunyuanImageSingleTransformerBlock": BlockRule(hunyuan_video.single_forward, hunyuan_video.single_unfit),
    "HunyuanImageTransformerBlock": BlockRule(hunyuan_video.double_forward, hunyuan_video.double_unfit),
    "HunyuanVideo15TransformerBlock": BlockRule(hunyuan_video.double_forward, hunyuan_video.double_unfit),
    "HunyuanVideoSingleTransformerBlock": BlockRule(hunyuan_video.single_forward, hunyuan_video.single_unfit),
    "HunyuanVideoTransformerBlock": BlockRule(hunyuan_video.double_forward, hunyuan_video.double_unfit),
    "LTXVideoTransformerBlock": BlockRule(ltx.forward, ltx.unfit),
    "QwenImage21TransformerBlock": BlockRule(qwen_image_21.forward, qwen_image_21.unfit, ahead=True),
    "QwenImageTransformerBlock": BlockRule(qwen_image.forward, qwen_image.unfit, ahead=True),
    "WanTransformerBlock": BlockRule(wan.forward, wan.unfit),
    "ZImageTransformerBlock": BlockRule(z_image.forward, z_image.unfit),
}
#: The same for block classes of vLLM-Omni, which have the names of diffusers'.
VLLM_OMNI_RULES = {
    "QwenImageTransformerBlock": BlockRule(vllm_omni.qwen_image_forward, vllm_omni.qwen_image_unfit, ahead=True),
    "ZImageTransformerBlock": BlockRule(vllm_omni.z_image_forward, vllm_omni.z_image_unfit),
}


def rule_of(block: torch.nn.Module) -> BlockRule | None:
    """The row of a block's class; None if it has none."""
    theirs = home(type(block).forward).partition(".")[0] == "vllm_omni"
    return (VLLM_OMNI_RULES if theirs else RULES).get(type(block).__name__)


@dataclass(frozen=True)
class BlockFusion:
    """Whether one block was fused.

    Attributes:
        name: its path, such as "transformer.transformer_blocks.0".
        block: the name of its class.
        reason: why it was not fused; None if it was.
    """

    name: str
    block: str
    reason: str | None = None


class Fusion(tuple[BlockFusion, ...]):
    """Which blocks a patch fused, and which it did not and why. Prints one line for each kind."""

    __slots__ = ()

    @property
    def replaced(self) -> list[str]:
        """Names of the blocks that run fused."""
        return [entry.name for entry in self if entry.reason is None]

    @property
    def left_alone(self) -> dict[str, str]:
        """The names of the blocks that were not fused, with the reasons."""
        return {entry.name: entry.reason for entry in self if entry.reason is not None}

    def __str__(self) -> str:
        kinds: dict[tuple[str, str, str | None], list[str]] = {}
        for entry in self:
            kinds.setdefault((entry.name.partition(".")[0], entry.block, entry.reason), []).append(entry.name)
        lines = []
        for (component, block, reason), names in kinds.items():
            where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" if reason else component
            lines.append(f"{where}: {len(names)} {block} " + ("fused" if reason is None else f"left alone: {reason}"))
        return "\n".join(lines) or "no transformer blocks"


def fuse(pipe: Any, patch: Patch) -> Fusion:
    """Install the fused forward on every matching block of the pipeline, through `patch`."""
    blocks = list(_blocks(pipe))
    made = Fusion(BlockFusion(name, type(block).__name__, _fuse(block, patch)) for name, block in blocks)

    def stretch(one: tuple[BlockFusion, torch.nn.Module]) -> tuple[str, str] | None:
        """Grouping key: neighbours with the same key run one after the other. None if nothing is computed ahead."""
        entry = one[0]
        rule = rule_of(one[1])
        follows = entry.reason is None and rule is not None and rule.ahead
        return (entry.name.rpartition(".")[0], entry.block) if follows else None

    for alike, neighbours in itertools.groupby(zip(made, (block for _, block in blocks), strict=True), stretch):
        if alike is not None:
            ahead.link([block for _, block in neighbours], patch)
    return made


def _fuse(block: torch.nn.Module, patch: Patch) -> str | None:
    rule = rule_of(block)
    if rule is None:
        return "there is no fused forward for its class"
    if not is_librarys(type(block).forward):
        return f"the forward of its class is from {home(type(block).forward)}"
    reason = rule.unfit(block)
    if reason is None:
        try:
            patch.set_forward(block, rule.forward)
            remember(block, patch)
        except PatchConflictError as error:
            return str(error)
    return reason


def _blocks(pipe: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """All blocks that have a row, in any component, and the other modules in a transformer's top-level block lists."""
    seen = set()
    for component, model in components(pipe).items():
        if not isinstance(model, torch.nn.Module):
            continue
        for name, module in model.named_modules():
            listed = component.startswith("transformer") and isinstance(module, torch.nn.ModuleList)
            top = listed and name.removeprefix("_orig_mod.").count(".") == 0
            for key, child in module.named_children():
                if id(child) not in seen and (top or type(child).__name__ in RULES):
                    seen.add(id(child))
                    yield ".".join(part for part in (component, name, key) if part), child
