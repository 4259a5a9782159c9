"""What the launchers do otherwise on Ascend: tiles that fit the unified buffer, grids that can be launched.

A vector core of an Atlas A2 (910B) computes in a unified buffer of 192 KB. How much of it a kernel takes is decided by
the vendor's compiler, which keeps several tiles of every tensor there and two of those that it loads, so that the next
one is under way; a tile that does not fit is refused. `TILES` is what fits, found with that compiler, and
`python -m omni_kernels.validation.ascend` holds it against it.

Other than on a GPU, rows that lie at no distance, as a modulation that all tokens share, are loaded once and not with
every row of a tile, and a row is found by a number: what the compiler cannot see to be regular it reads one row after
another, and past its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from omni_kernels.device import describe

P = ParamSpec("P")
R = TypeVar("R")

# What a launch may have; more are refused.
MAX_PROGRAMS = 65535

#: Op → elements of its tile, which fit in any dtypes and with all that the op may be given. Longer rows, where an op
#: needs them whole, are left to plain torch.
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
}


def here(t: torch.Tensor) -> bool:
    """Whether `t` is on an Ascend NPU, or on a CPU that stands in for one (`omni_kernels.device.pretend`)."""
    kind = t.device.type
    return kind == "npu" or (kind == "cpu" and describe(kind).vendor == "ascend")


def tile(op: str, t: torch.Tensor, elsewhere: int) -> int:
    """Elements of an op's tile, or of the longest row that it takes, where `t` is; `elsewhere` on other devices."""
    return TILES[op] if here(t) else elsewhere


class NotLaunchableError(Exception):
    """What no kernel can be launched for; `falls_back` knows what to do."""


def whole_row(op: str, t: torch.Tensor, length: int, elsewhere: int) -> None:
    """Asks whether a program can hold a row of so many elements where `t` is, `elsewhere` being the most on a GPU.

    Raises:
        NotLaunchableError: it cannot.
    """
    if length > (longest := tile(op, t, elsewhere)):
        raise NotLaunchableError(f"{op}: a row of {length} elements; a program holds {longest}")


def grid(t: torch.Tensor, programs: int) -> tuple[int]:
    """The grid of so many programs, to be launched where `t` is.

    Raises:
        NotLaunchableError: it has more programs than Ascend launches.
    """
    if programs > MAX_PROGRAMS and here(t):
        raise NotLaunchableError(f"{programs} programs; a launch may have {MAX_PROGRAMS}")
    return (programs,)


def falls_back(reference: Callable[P, R], launch: Callable[P, R]) -> Callable[P, R]:
    """A launcher whose work is done in plain torch where it cannot be launched; nothing was launched by then."""

    @functools.wraps(launch)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return launch(*args, **kwargs)
        except NotLaunchableError:
            return reference(*args, **kwargs)

    return run
