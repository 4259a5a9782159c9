"""Weights of a block that diffusers' group offloading keeps elsewhere until the block is called.

A signal that reads block 0's modulation runs its submodules before the block itself is called, or instead. So the
block's group is fetched first, and sent back where the block is then skipped.
"""

from __future__ import annotations

from typing import Any

import torch

#: The name under which diffusers registers its hook (`diffusers.hooks.group_offloading`, 0.36 to 0.42).
_HOOK = "group_offloading"


def fetched(block: torch.nn.Module) -> bool:
    """Have the block's weights where it computes; returns whether they are kept elsewhere between calls."""
    group = _group_of(block)
    if group is None:
        return False
    group.onload_()
    if group.stream is not None:
        group.stream.synchronize()
    return True


def released(block: torch.nn.Module) -> None:
    """Send the weights of a block that is not called back to where they are kept."""
    group = _group_of(block)
    if group is not None:
        group.offload_()


def _group_of(block: torch.nn.Module) -> Any:
    registry = getattr(block, "_diffusers_hook", None)
    hook = None if registry is None else registry.hooks.get(_HOOK)
    return None if hook is None else hook.group
