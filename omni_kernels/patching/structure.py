"""What a fused forward may take for granted: which modules it stands in for, and that nobody else wants them called.

A fused forward computes what some modules of its block would, norms and activations above all, and calls the others.
Whoever hooks or replaces one of the former, or what its class does, has to be heard, so that each forward asks again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook as _any_hook

from omni_kernels.ops._checks import DTYPES
from omni_kernels.ops.qk_norm_rope import MAX_HEAD_SIZE
from omni_kernels.patching.changes import Forward, describe

#: Whose classes the rows tell of.
LIBRARIES = ("diffusers", "torch")
_own: set[Any] = set()


def home(method: Any) -> str:
    """The module that a class's method was written in, whatever it was made to look like."""
    return str(getattr(method, "__globals__", {}).get("__name__", "somewhere else"))


def is_librarys(method: Any) -> bool:
    """Whether a class's method is of diffusers or torch, and nothing that somebody has put in its place.

    A graph that is being compiled holds what its classes did before.
    """
    if torch.compiler.is_compiling() or method in _own:
        return True
    if home(method).partition(".")[0] not in LIBRARIES:
        return False
    _own.add(method)
    return True


def part(block: torch.nn.Module, path: str) -> Any:
    """The module at a dotted path, None where there is none."""
    found: Any = block
    for name in path.split("."):
        # Not as attributes, which torch looks up in Python: every forward of a block comes here for each of its parts.
        found = None if found is None else found._modules.get(name)
    return found


def hooked(module: torch.nn.Module) -> bool:
    """Whether calling `module` comes to more than the forward of its class, or ours for it."""
    own = module.__dict__.get("forward")
    return (
        (own is not None and not isinstance(own, Forward))
        or len(module._forward_hooks) > 0
        or len(module._forward_pre_hooks) > 0
        or module._compiled_call_impl is not None
    )


def stands(block: torch.nn.Module, parts: Mapping[str, str]) -> bool:
    """Whether the modules that a fused forward stands in for, class names by path, are still there and not hooked."""
    if not is_librarys(type(block).forward):
        return False
    for path, name in parts.items():
        module = part(block, path)
        if type(module).__name__ != name or hooked(module) or not is_librarys(type(module).forward):
            return False
    return True


def attends(attn: Any, processor: str) -> bool:
    """Whether an attention's processor is of the class named, and does what that does."""
    given = type(attn.processor)
    return given.__name__ == processor and is_librarys(given.__call__)


def computes(*states: torch.Tensor, beside: Iterable[torch.Tensor] = ()) -> bool:
    """Whether the ops take these states, all of one dtype, and no gradient is asked for, which they have none of.

    Args:
        beside: what may have another dtype, rotary tables for one.
    """
    first = states[0].dtype
    return (
        not torch.is_grad_enabled()
        and first in DTYPES
        and all(t.dtype == first for t in states)
        and all(t.dtype in DTYPES for t in beside)
    )


def multiplies(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether calling `module` with x comes to x·weightᵀ + bias of plain tensors and no more.

    What is compiled is not asked: there a result in a given place is a copy.
    """
    if type(module) is not torch.nn.Linear or hooked(module) or _any_hook() or torch.compiler.is_compiling():
        return False
    device = x.device.type
    if type(x) is not torch.Tensor or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return False
    parameters = module._parameters.values()
    return all(p is None or (type(p) is torch.nn.Parameter and p.dtype == x.dtype) for p in parameters)


def dispatcher(processor: Any) -> Any:
    """The `dispatch_attention_fn` that an attention processor calls; None where it knows none."""
    return type(processor).__call__.__globals__.get("dispatch_attention_fn")


def unlike(block: torch.nn.Module, parts: Mapping[str, str]) -> str | None:
    """How a block differs from the modules, class names by path, that a fused forward stands in for."""
    for path, name in parts.items():
        module = part(block, path)
        if type(module).__name__ != name:
            return f"{path} is {describe(module) if module is not None else None}, not {name}"
        if hooked(module):
            holder = vars(module).get("forward")
            return f"{path} is hooked" + (f" by {describe(holder)}" if holder is not None else "")
        if not is_librarys(type(module).forward):
            return f"the forward of {path}'s class {name} is from {home(type(module).forward)}"
    return None


def not_plain_layer_norm(block: torch.nn.Module, *paths: str) -> str | None:
    """Which of the LayerNorms has weights, or norms more than the last dimension."""
    for path in paths:
        norm = part(block, path)
        if norm.weight is not None or norm.bias is not None or len(norm.normalized_shape) != 1:
            return f"{path} has weights or norms several dimensions"
    return None


def not_plain_rms_norm(block: torch.nn.Module, size: int, *paths: str) -> str | None:
    """Which of the RMSNorms, all over `size` channels with one eps, is not like that."""
    eps = part(block, paths[0]).eps
    for path in paths:
        norm = part(block, path)
        weight = norm.weight
        if weight is None or weight.shape != (size,) or getattr(norm, "bias", None) is not None:
            return f"{path} does not weight {size} channels and nothing else"
        if norm.eps != eps or eps is None:
            return f"{path} has eps {norm.eps}; {paths[0]} has {eps}"
    return None


def not_plain_attention(block: torch.nn.Module, path: str, processor: str) -> str | None:
    """What of an attention module is not as the op needs it, or not done by a processor of the class named."""
    attn = part(block, path)
    if type(attn.processor).__name__ != processor:
        return f"{path}.processor is {type(attn.processor).__name__}, not {processor}"
    if not attends(attn, processor):
        return f"the __call__ of {processor} is from {home(type(attn.processor).__call__)}"
    if dispatcher(attn.processor) is None:
        return f"{processor} does not call dispatch_attention_fn"
    size = attn.inner_dim // attn.heads
    if size % 2 or size > MAX_HEAD_SIZE:
        return f"heads have {size} channels; an even number up to {MAX_HEAD_SIZE} is needed"
    return None


def not_tanh_gelu(block: torch.nn.Module, *paths: str) -> str | None:
    """Which of the activations is not GELU's tanh approximation."""
    for path in paths:
        if part(block, path).approximate != "tanh":
            return f"{path} has approximate={part(block, path).approximate!r}, not 'tanh'"
    return None
