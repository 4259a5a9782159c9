"""The first norm of the next block, in the pass that ends a block: one reading of the hidden states less.

A block that ends with gate, residual and no norm, and a next one that begins with a norm of the same states, are two
passes that could be one. What is made ahead hangs on the very tensor that the block returns, and is taken by the next
block only where it is called with that tensor, unchanged, and with the same modulation: whoever works between the
blocks, or passes the next one over, gets what he would have had, and nothing is kept beyond the tensor.

It is left to the blocks themselves where their calls are compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from omni_kernels.patching.changes import Forward, Patch
from omni_kernels.patching.structure import hooked

_NEXT, _MADE, _APART = "_omni_kernels_next", "_omni_kernels_ahead", "_omni_kernels_apart"


class _Next(tuple[torch.nn.Module, ...]):
    """The next block, in a tuple, for a module would become a child; a copied block, which is plain, has none."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return tuple, ()


class _Made(NamedTuple):
    block: torch.nn.Module
    given: tuple[Any, ...]
    version: int
    result: Any


def link(blocks: Sequence[torch.nn.Module], patch: Patch) -> None:
    """Tell each of these blocks, which run one after the other, of the next; undone with `patch`."""
    for block, following in itertools.pairwise(blocks):
        patch.set_attribute(block, _NEXT, _Next((following,)))


class Apart:
    """While open, this block begins no other: whether the next one runs is decided once its states are there.

    For whoever may pass the next block over, a cache of blocks above all, around the call of the last block before.
    It is a mark on the block itself, so that no other block, of this model or another, hears of it.
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
    """The block that is likely to be called next, fused; None where nothing can be made ahead for it.

    Args:
        states: such as the block will return.
        called: the names of its modules that would be called ahead; they must not be hooked.
    """
    if torch.compiler.is_compiling() or states.is_inference():  # whose changes in place nobody counts
        return None
    own = vars(block)
    (following,) = own.get(_NEXT) or (None,)
    if following is None or _APART in own or following._forward_hooks or following._forward_pre_hooks:
        return None
    if following._compiled_call_impl is not None or not isinstance(vars(following).get("forward"), Forward):
        return None
    return following if all(_quiet(following._modules[name]) for name in called) else None


def _quiet(module: Any) -> bool:
    """Whether neither the module nor one within it is hooked."""
    return not hooked(module) and all(map(_quiet, module._modules.values()))


def leave(states: torch.Tensor, block: torch.nn.Module, given: tuple[Any, ...], result: Any) -> None:
    """Keep with `states` what `block` would make of them and of `given`."""
    setattr(states, _MADE, _Made(block, given, states._version, result))


def take(states: torch.Tensor, block: torch.nn.Module, given: tuple[Any, ...]) -> Any:
    """What was made ahead for `block` of these very states and `given`; None if nothing was."""
    made: _Made | None = None if torch.compiler.is_compiling() else vars(states).pop(_MADE, None)
    if made is None or made.block is not block or made.version != states._version:
        return None
    same = len(made.given) == len(given) and all(a is b for a, b in zip(made.given, given, strict=True))
    return made.result if same else None
