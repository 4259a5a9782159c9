"""Which blocks have a fused forward: one row per class, found by its name, and what became of each block of a pipeline.

No model's library is imported. A block that is not built as its row expects is left alone, and the report says why.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.patching import ahead, flux, qwen_image, wan, z_image
from omni_kernels.patching.changes import Patch, PatchConflictError
from omni_kernels.patching.structure import home, is_librarys, remember


@dataclass(frozen=True)
class BlockRule:
    """One class of blocks.

    Attributes:
        forward: the fused forward, called with the block first and then as the block's own; NotImplemented where it
            leaves a call to that.
        unfit: why it cannot stand in for a block's own; None where it can.
        ahead: whether it begins the next block (`omni_kernels.patching.ahead`).
    """

    forward: Callable[..., Any]
    unfit: Callable[[torch.nn.Module], str | None]
    ahead: bool = False


RULES = {
    "FluxSingleTransformerBlock": BlockRule(flux.single_forward, flux.single_unfit),
    "FluxTransformerBlock": BlockRule(flux.double_forward, flux.double_unfit),
    "QwenImageTransformerBlock": BlockRule(qwen_image.forward, qwen_image.unfit, ahead=True),
    "WanTransformerBlock": BlockRule(wan.forward, wan.unfit),
    "ZImageTransformerBlock": BlockRule(z_image.forward, z_image.unfit),
}


@dataclass(frozen=True)
class BlockFusion:
    """What became of one block.

    Attributes:
        name: where it is, "transformer.transformer_blocks.0".
        block: its class's name.
        reason: why it was left alone; None where it was replaced.
    """

    name: str
    block: str
    reason: str | None = None


class Fusion(tuple[BlockFusion, ...]):
    """What a patch replaced where, and what it left alone and why; printed, a line for each kind."""

    __slots__ = ()

    @property
    def replaced(self) -> list[str]:
        """Names of the blocks that run fused."""
        return [entry.name for entry in self if entry.reason is None]

    @property
    def left_alone(self) -> dict[str, str]:
        """Reasons by the names of the blocks that run as ever."""
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
    """Give every block of the pipeline that fits its fused forward, through `patch`."""
    blocks = list(_blocks(pipe))
    made = Fusion(BlockFusion(name, type(block).__name__, _fuse(block, patch)) for name, block in blocks)

    def stretch(one: tuple[BlockFusion, torch.nn.Module]) -> tuple[str, str] | None:
        """Blocks that are alike here run one after the other, if they are neighbours."""
        entry = one[0]
        follows = entry.reason is None and RULES[entry.block].ahead
        return (entry.name.rpartition(".")[0], entry.block) if follows else None

    for alike, neighbours in itertools.groupby(zip(made, (block for _, block in blocks), strict=True), stretch):
        if alike is not None:
            ahead.link([block for _, block in neighbours], patch)
    return made


def _fuse(block: torch.nn.Module, patch: Patch) -> str | None:
    rule = RULES.get(type(block).__name__)
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
    """The blocks of all components that have a row, and those in the lists of a transformer that have none."""
    components = getattr(pipe, "components", None) or vars(pipe)
    seen = set()
    for component, model in components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        for name, module in model.named_modules():
            listed = component.startswith("transformer") and isinstance(module, torch.nn.ModuleList)
            top = listed and name.removeprefix("_orig_mod.").count(".") == 0
            for key, child in module.named_children():
                if id(child) not in seen and (top or type(child).__name__ in RULES):
                    seen.add(id(child))
                    yield ".".join(part for part in (component, name, key) if part), child
