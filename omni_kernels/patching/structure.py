"""Checks whether a fused forward may replace modules of its block: the expected classes, without hooks.

A fused forward computes the work of some modules of its block itself (mainly norms and activations), and calls the
others. If one of the former is hooked or replaced, or its class is changed, the block's own forward must run. So every
fused forward checks this on every call. `Seen` finds that nothing has changed since the last check at a third of the
cost.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _has_any_global_hook as any_hook

from omni_kernels.ops._checks import DTYPES
from omni_kernels.ops.qk_norm_rope import MAX_HEAD_SIZE
from omni_kernels.patching.changes import Forward, Patch, describe

#: Packages whose classes a fused forward may replace.
LIBRARIES = ("diffusers", "torch", "vllm_omni")
_own: set[Any] = set()


def components(pipe: Any) -> Mapping[str, Any]:
    """The parts of a pipeline by name: diffusers' `components`, or else its attributes and child modules.

    Raises:
        ValueError: no part of it is a module, so it is no pipeline.
    """
    own = getattr(pipe, "__dict__", {})
    found: Mapping[str, Any] = getattr(pipe, "components", None) or {**own, **own.get("_modules", {})}
    if not any(isinstance(part, torch.nn.Module) for part in found.values()):
        raise ValueError(f"{type(pipe).__name__} is no pipeline: none of its parts is a torch.nn.Module")
    return found


def home(method: Any) -> str:
    """The module in which a method was defined. Read from its globals, because `__module__` can be changed."""
    return str(getattr(method, "__globals__", {}).get("__name__", "somewhere else"))


def is_librarys(method: Any) -> bool:
    """Whether a class's method was defined in one of `LIBRARIES`, not put in its place by other code.

    Always True while compiling: a compiled graph keeps the behaviour that its classes had then.
    """
    # Compiling first, or a graph would be compiled anew for each further method that is known.
    if torch.compiler.is_compiling() or method in _own:
        return True
    if home(method).partition(".")[0] not in LIBRARIES:
        return False
    _own.add(method)
    return True


def part(block: torch.nn.Module, path: str) -> Any:
    """The module at a dotted path; None if there is none."""
    found: Any = block
    for name in path.split("."):
        # Attribute access of modules is slow Python code in torch, and this runs for each part on every block forward.
        found = None if found is None else found._modules.get(name)
    return found


def hooked(module: torch.nn.Module) -> bool:
    """Whether calling `module` runs more than its class's forward or our replacement of it."""
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or module._compiled_call_impl is not None:
        return True
    forward = own.get("forward")
    return forward is not None and not isinstance(forward, Forward)


_SEEN = "_omni_kernels_seen"
_CHILDREN, _FORWARD = operator.attrgetter("_modules"), operator.attrgetter("forward")
_get: Any = dict.get
_CALL = operator.attrgetter("_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl")


class Seen:
    """What `_stands` last read from a block when the check passed. Each forward tests whether it is unchanged.

    Everything that `_stands` reads is compared by identity, with `map` and `all` instead of Python loops: 5 µs for 13
    modules, where `_stands` takes 15 µs. If anything differs, `_stands` checks again. A copied block has no `Seen`.
    """

    __slots__ = ("_call", "_children", "_classes", "_forwards", "_holders", "_hooks", "_modules", "_names", "_own",
                 "_parts", "_types", "_within")  # fmt: skip

    def __init__(self) -> None:
        self._parts: Mapping[str, str] | None = None

    def __reduce__(self) -> Any:
        return type(None), ()

    def note(self, block: torch.nn.Module, parts: Mapping[str, str]) -> None:
        """Record the current state."""
        self._modules = [part(block, path) for path in parts]
        self._call = [*map(_CALL, self._modules)]
        self._hooks = [hooks for *both, _ in self._call for hooks in both]
        self._own = [vars(module).get("forward") for module in self._modules]
        # Module lists on the path to a module are not called, but could be replaced too.
        steps = dict.fromkeys(path[:end] for path in parts for end in _ends(path))
        above = [part(block, step.rpartition(".")[0]) if "." in step else block for step in steps]
        self._within = [part(block, step) for step in steps]
        self._names = [step.rpartition(".")[2] for step in steps]
        self._holders = above
        self._children = [*map(_CHILDREN, above)]
        self._types = [*map(type, (block, *self._modules))]
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = [*map(_FORWARD, self._classes)]
        self._parts = parts

    def still(self, block: torch.nn.Module, parts: Mapping[str, str]) -> bool:
        """Whether everything is as it was recorded; False if nothing was recorded."""
        return (
            self._parts is parts
            and all(map(is_, map(_CHILDREN, self._holders), self._children))
            and all(map(is_, map(_get, self._children, self._names), self._within))
            and all(map(is_, map(type, (block, *self._modules)), self._types))
            and all(map(is_, map(_FORWARD, self._classes), self._forwards))
            and all(map(is_, map(_get, map(vars, self._modules), repeat("forward")), self._own))
            and [*map(_CALL, self._modules)] == self._call
            and not any(self._hooks)
        )


def _ends(path: str) -> list[int]:
    """Where each step of a dotted path ends."""
    return [at for at, character in enumerate(path) if character == "."] + [len(path)]


def remember(block: torch.nn.Module, patch: Patch) -> None:
    """Add a `Seen` to a block, in which `stands` records what it has checked. Undone with `patch`."""
    patch.set_attribute(block, _SEEN, Seen())


def stands(block: torch.nn.Module, parts: Mapping[str, str]) -> bool:
    """Whether the modules that a fused forward replaces are unchanged and not hooked.

    Args:
        parts: class names by the modules' paths.
    """
    if is_dynamo_compiling():
        return _stands(block, parts)
    seen: Seen | None = vars(block).get(_SEEN)
    if seen is not None and seen.still(block, parts):
        return True
    if not _stands(block, parts):
        return False
    if seen is not None:
        seen.note(block, parts)
    return True


def _stands(block: torch.nn.Module, parts: Mapping[str, str]) -> bool:
    if not is_librarys(type(block).forward):
        return False
    for path, name in parts.items():
        module = part(block, path)
        if type(module).__name__ != name or hooked(module) or not is_librarys(type(module).forward):
            return False
    return True


def attends(attn: Any, processor: str) -> bool:
    """Whether an attention's processor is of the class with this name, and its `__call__` is the original one."""
    given = type(attn.processor)
    return given.__name__ == processor and is_librarys(given.__call__)


def computes(*states: torch.Tensor, beside: Iterable[torch.Tensor] = ()) -> bool:
    """Whether the ops support these states, all of one dtype, and no gradient is needed. The ops have no gradients.

    Args:
        beside: further tensors, which may have other dtypes (for example rotary tables).
    """
    first = states[0].dtype
    # Forward-mode derivatives can be active even when gradients are disabled.
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    for t in (*states, *beside):
        if t.dtype not in DTYPES:
            return False
    return [t.dtype for t in states] == [first] * len(states)


def multiplies(x: Any, *modules: torch.nn.Module) -> bool:
    """Whether calling each module with a tensor like x computes just x·weightᵀ + bias, on plain tensors.

    Always False while compiling, where writing a result to a given place is a copy.
    """
    if is_dynamo_compiling() or any_hook() or type(x) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    device, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    for module in modules:
        if type(module) is not torch.nn.Linear or hooked(module):
            return False
        for p in module._parameters.values():
            if p is not None and (type(p) is not torch.nn.Parameter or p.dtype != dtype):
                return False
    return True


def idles(module: torch.nn.Module) -> bool:
    """Whether calling `module` would return its input: a dropout in evaluation mode."""
    return (
        type(module) is torch.nn.Dropout
        and not module.training
        and not hooked(module)
        and not any_hook()
        and is_librarys(torch.nn.Dropout.forward)
    )


def dispatcher(processor: Any) -> Any:
    """The `dispatch_attention_fn` that an attention processor calls; None if its module has none."""
    return type(processor).__call__.__globals__.get("dispatch_attention_fn")


def unlike(block: torch.nn.Module, parts: Mapping[str, str]) -> str | None:
    """How a block differs from what a fused forward expects; None if it does not.

    Args:
        parts: class names by the modules' paths.
    """
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
    """Which of the LayerNorms has weights or normalises more than the last dimension; None if none does."""
    for path in paths:
        norm = part(block, path)
        if norm.weight is not None or norm.bias is not None or len(norm.normalized_shape) != 1:
            return f"{path} has weights or normalises several dimensions"
    return None


def not_plain_rms_norm(block: torch.nn.Module, size: int, *paths: str) -> str | None:
    """Which of the RMSNorms is not over `size` channels, or does not share one eps with the others; None if none."""
    eps = part(block, paths[0]).eps
    for path in paths:
        norm = part(block, path)
        weight = norm.weight
        if weight is None or weight.shape != (size,) or getattr(norm, "bias", None) is not None:
            return f"{path} needs a weight for {size} channels and no bias"
        if norm.eps != eps or eps is None:
            return f"{path} has eps {norm.eps}; {paths[0]} has {eps}"
    return None


def not_plain_attention(block: torch.nn.Module, path: str, processor: str) -> str | None:
    """Why the op cannot replace an attention module with a processor of the class with this name; None if it can."""
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
    """Which of the activations is not GELU's tanh approximation; None if all are."""
    for path in paths:
        if part(block, path).approximate != "tanh":
            return f"{path} has approximate={part(block, path).approximate!r}, not 'tanh'"
    return None
