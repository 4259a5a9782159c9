"""Limits of the launchers on Ascend: tiles that fit in the unified buffer, grids that can be launched.

A vector core of an Atlas A2 (910B) computes in a unified buffer of 192 KB. The vendor's compiler decides how much of it
a kernel uses. It keeps several tiles of every tensor there, and two of every loaded one so that the next load can
overlap. It rejects a tile that does not fit. `TILES` lists sizes that fit, found with that compiler;
`python -m omni_kernels.validation.ascend` checks them with it.

There are two more differences from a GPU. Rows with stride 0, such as a modulation shared by all tokens, are loaded
once, not with every row of a tile. And a row is addressed by a single number: if the compiler cannot see that an access
is regular, it reads one row after another, and past the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from omni_kernels.device import describe

P = ParamSpec("P")
R = TypeVar("R")

# The most programs of a launch. Larger launches are rejected.
MAX_PROGRAMS = 65535

#: Op → elements of its tile. They fit for all dtypes and with all optional inputs. If an op needs whole rows and these
#: are longer, plain torch computes it.
TILES = {
    "relative_l1": 4096,
    "residual_relative_l1": 2048,
    "modulated_relative_l1": 8192,
    "linear_forecast": 2048,
    "ada_layer_norm": 4096,
    "gate_residual_norm": 4096,
    "rms_norm": 8192,
    "qk_norm_rope": 4096,
    "gelu": 8192,
    "swiglu": 4096,
    "quantize": 256,  # the compiler holds over 100 numbers for each column of int8: longer rows are for plain torch
}


def here(t: torch.Tensor) -> bool:
    """Whether `t` is on an Ascend NPU, or on a CPU that simulates one (`omni_kernels.device.pretend`)."""
    kind = t.device.type
    return kind == "npu" or (kind == "cpu" and describe(kind).vendor == "ascend")


def tile(op: str, t: torch.Tensor, elsewhere: int) -> int:
    """Elements of an op's tile, or of its longest row, on `t`'s device. Returns `elsewhere` if that is not Ascend."""
    return TILES[op] if here(t) else elsewhere


class NotLaunchableError(Exception):
    """No kernel can be launched for these arguments. `falls_back` then uses plain torch."""


def whole_row(op: str, t: torch.Tensor, length: int, elsewhere: int) -> None:
    """Check that a program can hold a row of `length` elements on `t`'s device. `elsewhere` is the limit on a GPU.

    Raises:
        NotLaunchableError: the row is too long.
    """
    if length > (longest := tile(op, t, elsewhere)):
        raise NotLaunchableError(f"{op}: a row of {length} elements; a program holds {longest}")


def grid(t: torch.Tensor, programs: int) -> tuple[int]:
    """The grid of so many programs, for a launch on `t`'s device.

    Raises:
        NotLaunchableError: on Ascend, there are more programs than a launch can have.
    """
    if programs > MAX_PROGRAMS and here(t):
        raise NotLaunchableError(f"{programs} programs; a launch may have {MAX_PROGRAMS}")
    return (programs,)


def falls_back(reference: Callable[P, R], launch: Callable[P, R]) -> Callable[P, R]:
    """A launcher that uses plain torch if the kernel cannot be launched. That is known before anything is launched."""

    @functools.wraps(launch)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return launch(*args, **kwargs)
        except NotLaunchableError:
            return reference(*args, **kwargs)

    return run
