"""Loads the weights of a block that diffusers' group offloading has moved off the device.

Group offloading loads a block's weights when the block is called. A signal that reads block 0's modulation runs some
submodules of the block before the block is called, or although it is skipped. So the weights are loaded first, and
offloaded again if the block is then skipped.
"""

from __future__ import annotations

from typing import Any

import torch

#: The name under which diffusers registers its hook (`diffusers.hooks.group_offloading`, 0.36 to 0.42).
_HOOK = "group_offloading"


def fetched(block: torch.nn.Module) -> bool:
    """Load the block's weights onto the device if they are offloaded. Returns whether the block is offloaded."""
    group = _group_of(block)
    if group is None:
        return False
    group.onload_()
    if group.stream is not None:
        group.stream.synchronize()
    return True


def released(block: torch.nn.Module) -> None:
    """Offload the weights of a block again. Used where the block is not called."""
    group = _group_of(block)
    if group is not None:
        group.offload_()


def _group_of(block: torch.nn.Module) -> Any:
    registry = getattr(block, "_diffusers_hook", None)
    hook = None if registry is None else registry.hooks.get(_HOOK)
    return None if hook is None else hook.group
