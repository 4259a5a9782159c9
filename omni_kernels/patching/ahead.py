"""Computes the next block's first norm in the kernel that ends a block. This saves one read of the hidden states.

A block ends with gate and residual; the next one begins with a norm of the same states. One kernel does both. The norm
computed ahead is stored as an attribute of the tensor that the block returns. The next block uses it only if it is
called with that same tensor, unmodified, and with the same modulation inputs. Code that changes the states between the
blocks, or skips the next block, therefore gets the usual result, and nothing outlives the tensor.

When the blocks are compiled, nothing is computed ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from omni_kernels.patching.changes import Forward, Patch
from omni_kernels.patching.structure import hooked

#: In a block's `__dict__`, `NEXT` marks one that may compute ahead for the next block.
NEXT, _MADE, _APART = "_omni_kernels_next", "_omni_kernels_ahead", "_omni_kernels_apart"


class _Next(tuple[torch.nn.Module, ...]):
    """The next block, in a tuple because a bare module would be registered as a child.

    It is copied as an empty tuple: a copied block is not patched, so it has no next block.
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        return tuple, ()


class _Made(NamedTuple):
    block: torch.nn.Module
    given: tuple[Any, ...]
    version: int
    result: Any


def link(blocks: Sequence[torch.nn.Module], patch: Patch) -> None:
    """Store in each of these blocks, which run one after the other, a reference to the next. Undone with `patch`."""
    for block, following in itertools.pairwise(blocks):
        patch.set_attribute(block, NEXT, _Next((following,)))


class Apart:
    """Context manager in which this block computes nothing ahead for the next one.

    A cache that may skip the next block uses it around the call of the block before, because it decides only once it
    has that block's output. The mark is set on the block itself, so no other block is affected.
    """

    def __init__(self, block: torch.nn.Module) -> None:
        self._own, self._former = vars(block), False

    def __enter__(self) -> None:
        self._former = _APART in self._own
        self._own[_APART] = True

    def __exit__(self, *of_an_error: object) -> None:
        if not self._former:
            del self._own[_APART]


def next_of(block: torch.nn.Module, states: torch.Tensor, *called: str) -> Any:
    """The fused block that is expected to run next; None if nothing can be computed ahead for it.

    Args:
        states: hidden states like those that the block will return.
        called: names of the next block's modules that would be called ahead. They must not be hooked.
    """
    if torch.compiler.is_compiling() or states.is_inference():  # inference tensors have no version counter
        return None
    own = vars(block)
    (following,) = own.get(NEXT) or (None,)
    if following is None or _APART in own or following._forward_hooks or following._forward_pre_hooks:
        return None
    if following._compiled_call_impl is not None or not isinstance(vars(following).get("forward"), Forward):
        return None
    return following if all(_quiet(following._modules[name]) for name in called) else None


def _quiet(module: Any) -> bool:
    """Whether neither the module nor any of its submodules is hooked."""
    return not hooked(module) and all(map(_quiet, module._modules.values()))


def leave(states: torch.Tensor, block: torch.nn.Module, given: tuple[Any, ...], result: Any) -> None:
    """Store on `states` the result that `block` would compute from them and from `given`."""
    setattr(states, _MADE, _Made(block, given, states._version, result))


def take(states: torch.Tensor, block: torch.nn.Module, given: tuple[Any, ...]) -> Any:
    """What was computed ahead for `block` from exactly these tensors; None if nothing was."""
    made: _Made | None = None if torch.compiler.is_compiling() else vars(states).pop(_MADE, None)
    if made is None or made.block is not block or made.version != states._version:
        return None
    same = len(made.given) == len(given) and all(a is b for a, b in zip(made.given, given, strict=True))
    return made.result if same else None
