"""What of a block a recording takes in, and why a recording of a block would not do what the block does."""

from __future__ import annotations

import operator
from typing import Any

import torch

from omni_kernels.patching.engine import Forward, describe
from omni_kernels.patching.structure import dispatcher, hooked

_TRAINING = operator.attrgetter("training")


class Parts:
    """All of a block that a recording has taken in: its modules, weights, hooks, and how it attends."""

    def __init__(self, block: torch.nn.Module) -> None:
        self._modules = list(block.modules())
        self._held = [held for m in self._modules for held in (m._parameters, m._buffers, m._modules)]
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = vars(block)
        self._attentions = [m for m in self._modules if getattr(m, "processor", None) is not None]
        self._then = self._now()
        self._tensors = [one for one in self._then if isinstance(one, torch.Tensor)]
        self._places = self._addresses()

    def unchanged(self) -> bool:
        """Whether each of them is still the very same, where it was."""
        now = self._now()
        # Before each forward every block is asked; identity, as tensors compare by value.
        same = len(now) == len(self._then) and all(map(operator.is_, now, self._then))
        return same and self._addresses() == self._places and not any(self._hooks)

    def _now(self) -> list[Any]:
        found: list[Any] = []
        for held in self._held:
            found.extend(held.values())
        found.append(self._own.get("forward"))
        found.extend(map(_TRAINING, self._modules))
        for attention in self._attentions:
            processor: Any = attention.processor
            backend, parallel = (getattr(processor, name, None) for name in ("_attention_backend", "_parallel_config"))
            # Where the processor has no backend of its own, diffusers' default counts.
            registry = getattr(dispatcher(processor), "__globals__", {}).get("_AttentionBackendRegistry")
            found += [processor, backend, parallel, getattr(registry, "_active_backend", None)]
        return found

    def _addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))


def unfit(block: torch.nn.Module) -> str | None:
    """Why a recording of the block would not do what the block does."""
    own = vars(block).get("forward")
    if own is not None and not isinstance(own, Forward):
        return f"its forward is {describe(own)}"
    if block._forward_hooks or block._forward_pre_hooks:
        return "it is hooked"
    for name, module in block.named_modules():
        if type(module).__module__.startswith("peft."):
            return f"{name} is an adapter, whose scale is a number in Python: fuse it into the weights"
        processor = getattr(module, "processor", None)
        if isinstance(processor, torch.nn.Module) or hasattr(processor, "scale"):
            return f"{name}.processor is {type(processor).__name__}, whose scale is a number in Python"
        for key, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is not None and type(weight) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                return f"{name}.{key} is {type(weight).__name__}, whose memory cannot be watched"
        if name and hooked(module):
            return f"{name} is hooked"
        if name and "forward" in vars(module):  # which may keep what it returns: the graph would lack the work
            return f"{name}'s forward is patched"
    return None
