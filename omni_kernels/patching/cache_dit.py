"""Runs the hot path of the cache-dit library through our kernels: what `patch(cache_dit)` replaces and restores.

Three functions of the library are replaced, for all pipelines that it caches:

    CachedContextManager.similarity    mean|R_prev − R| / mean|R_prev|, in one pass            relative_l1
    CachedContextManager.apply_cache   h + Σ (k^i / i!)·d_i, TaylorSeer and residual at once   linear_forecast
    TaylorSeerState.approximate            Σ (k^i / i!)·d_i, when called directly              linear_forecast

Each replacement decides and computes as the library does, up to the rounding of half-precision sums. It works on the
library's own state, so it can be installed and removed between any two steps. Cases that the kernels do not cover are
passed to the library's own function: a distance over selected tokens or several ranks, calibrators other than
TaylorSeer, hidden states that are cached whole, and the plain reuse of a residual, which is a single addition anyway.

The seams are found by name and signature in the given library module. This file does not import the library.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from omni_kernels.ops import trusted
from omni_kernels.ops._checks import alike
from omni_kernels.patching.changes import HANDLE, Patch, PatchConflictError, describe

#: The name of the library's module.
NAME = "cache_dit"
_RECORD = "_omni_kernels_functions"

_MANAGER = "caching.cache_contexts.cache_manager.CachedContextManager"
_CALIBRATOR = "caching.cache_contexts.calibrators.taylorseer.TaylorSeerCalibrator"
_STATE = "caching.cache_contexts.calibrators.taylorseer.TaylorSeerState"

#: TaylorSeer's stored derivatives and the weight of each.
Expansion = tuple[Sequence[torch.Tensor], Sequence[float]]


def _covered(*tensors: torch.Tensor) -> bool:
    """Whether the kernels support these tensors, and would return the same dtype as the library's arithmetic."""
    first = tensors[0]
    return alike(*tensors) and all(t.dtype is first.dtype and not t.requires_grad for t in tensors)


def _rounded(number: float, dtype: torch.dtype) -> float:
    """A number, rounded to this dtype. The library's means and quotients are tensors of that dtype."""
    if dtype is torch.float32 or not math.isfinite(number):
        return number
    if dtype is torch.float16:
        try:
            return float(struct.unpack("<e", struct.pack("<e", number))[0])
        except OverflowError:
            return math.copysign(math.inf, number)
    (bits,) = struct.unpack("<I", struct.pack("<f", number))
    bits += 0x7FFF + (bits >> 16 & 1)  # to the nearest, ties to even
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


def _distance(previous: torch.Tensor, current: torch.Tensor) -> float:
    """mean|previous − current| / mean|previous| over all samples, rounded in the same places as in the library."""
    sums = trusted(previous).relative_l1(current, previous).tolist()
    count, dtype = previous.numel(), previous.dtype
    if not count:
        return math.nan
    difference = _rounded(math.fsum(pair[0] for pair in sums) / count, dtype)
    magnitude = _rounded(math.fsum(pair[1] for pair in sums) / count, dtype)
    if not magnitude:
        return math.inf if difference > 0 else math.nan
    return _rounded(difference / magnitude, dtype)


def _similarity(own: Callable[..., Any], library: Library) -> Callable[..., Any]:
    @functools.wraps(own)
    def similarity(
        self: Any, t1: torch.Tensor, t2: torch.Tensor, *, threshold: float, parallelized: bool = False,
        prefix: str = "Fn",
    ) -> bool:  # fmt: skip
        if (
            not 0.0 < threshold < 1.0
            or parallelized
            or not _covered(t1, t2)
            or self.get_important_condition_threshold() > 0.0
            or not self.cfg_diff_compute_separate()
        ):
            answer: bool = own(self, t1, t2, threshold=threshold, parallelized=parallelized, prefix=prefix)
            return answer
        distance = _distance(t1, t2)
        self.add_residual_diff(distance)
        return distance < threshold

    return similarity


def _expansion(state: Any) -> Expansion:
    """TaylorSeer's forecast as a weighted sum: the stored derivatives, and a weight k^i / i! for each."""
    ladder = list(itertools.takewhile(lambda rung: rung is not None, state.state["dY_current"]))
    elapsed = state.current_step - state.last_non_approximated_step
    return ladder, [elapsed**i / math.factorial(i) for i in range(len(ladder))]


def _sum(base: torch.Tensor | None, ladder: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total: torch.Tensor = trusted(ladder[0]).linear_forecast(base, ladder, weights)
    return total


def _approximate(own: Callable[..., Any], library: Library) -> Callable[..., Any]:
    @functools.wraps(own)
    def approximate(self: Any) -> torch.Tensor:
        ladder, weights = _expansion(self)
        if not ladder or not _covered(*ladder):
            forecast: torch.Tensor = own(self)
            return forecast
        return _sum(None, ladder, weights)

    return approximate


def _apply_cache(own: Callable[..., Any], library: Library) -> Callable[..., Any]:
    calibrator_type, state_type = library.find(_CALIBRATOR), library.find(_STATE)

    def expansion(manager: Any, base: torch.Tensor, prefix: str, stream: int) -> Expansion | None:
        """What TaylorSeer adds to a stream (0 hidden, 1 encoder); None if the library must compute it itself."""
        if "Bn" not in prefix:
            return None
        if stream == 0:
            forecast = manager.is_calibrator_enabled() and manager.is_cache_residual()
        else:
            forecast = manager.is_encoder_calibrator_enabled() and manager.is_encoder_cache_residual()
        if not forecast:
            return None
        calibrators = manager.get_cfg_calibrator() if manager.is_separate_cfg_step() else manager.get_calibrator()
        calibrator = calibrators[stream]
        state = calibrator.states.get(prefix) if type(calibrator) is calibrator_type else None
        if type(state) is not state_type:
            return None
        ladder, weights = _expansion(state)
        return (ladder, weights) if ladder and _covered(base, *ladder) else None

    @functools.wraps(own)
    def apply_cache(
        self: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        prefix: str = "Bn", encoder_prefix: str = "Bn_encoder",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        hidden = expansion(self, hidden_states, prefix, 0)
        encoder = None
        if hidden is not None and encoder_hidden_states is not None:
            encoder = expansion(self, encoder_hidden_states, encoder_prefix, 1)
        if hidden is None or (encoder is None and encoder_hidden_states is not None):
            streams: tuple[torch.Tensor, torch.Tensor | None] = own(
                self, hidden_states, encoder_hidden_states, prefix=prefix, encoder_prefix=encoder_prefix
            )
            return streams
        forecast = _sum(hidden_states, *hidden)
        if encoder_hidden_states is None or encoder is None:
            return forecast, None
        return forecast, _sum(encoder_hidden_states, *encoder)

    return apply_cache


@dataclass(frozen=True)
class Seam:
    """A function of the library that is replaced.

    Attributes:
        owner: dotted path of its class, within the library's module.
        parameters: the parameters that it must have, in this order.
        make: (the library's own function, the library) → our replacement.
        uses: further methods of the class that our replacement calls.
    """

    owner: str
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Callable[..., Any], Library], Callable[..., Any]]
    uses: tuple[str, ...] = ()


SEAMS = (
    Seam(
        _MANAGER,
        "similarity",
        ("self", "t1", "t2", "threshold", "parallelized", "prefix"),
        _similarity,
        ("add_residual_diff", "get_important_condition_threshold", "cfg_diff_compute_separate"),
    ),
    Seam(
        _MANAGER,
        "apply_cache",
        ("self", "hidden_states", "encoder_hidden_states", "prefix", "encoder_prefix"),
        _apply_cache,
        (
            "is_calibrator_enabled",
            "is_encoder_calibrator_enabled",
            "is_cache_residual",
            "is_encoder_cache_residual",
            "is_separate_cfg_step",
            "get_calibrator",
            "get_cfg_calibrator",
        ),
    ),
    Seam(_STATE, "approximate", ("self",), _approximate),
)


class Library:
    """An installed version of the library. Looks up its parts by name.

    Raises:
        TypeError: the module is not cache-dit.
    """

    def __init__(self, module: ModuleType) -> None:
        if module.__name__ != NAME:
            raise TypeError(f"patch takes a diffusers pipeline or the module {NAME}, not the module {module.__name__}")
        self.module = module

    @property
    def version(self) -> str:
        """The library's `__version__`."""
        return str(getattr(self.module, "__version__", "of an unknown version"))

    def find(self, path: str) -> Any:
        """The object at a dotted path. Raises a ValueError with the library's version if there is none."""
        found: Any = self.module
        for name in path.split("."):
            found = getattr(found, name, None)
            if found is None:
                raise self.lacking(f"no {path}")
        return found

    def lacking(self, what: str) -> ValueError:
        """The error for a version of the library whose seams differ from the known ones."""
        return ValueError(f"{NAME} {self.version} has {what}: our kernels replace functions of version 1.5")

    def check(self, seam: Seam) -> Callable[..., Any]:
        """The library's own function at a seam.

        Raises:
            ValueError: it is missing or has another signature, or a method that our replacement calls is missing.
            PatchConflictError: other code has already replaced it.
        """
        owner = self.find(seam.owner)
        where = f"{owner.__name__}.{seam.name}"
        own: Callable[..., Any] | None = vars(owner).get(seam.name)
        if not callable(own):
            raise self.lacking(f"no {where}")
        if not own.__module__.startswith(NAME):
            raise PatchConflictError(f"{where} was replaced by {describe(own)}: undo that first")
        parameters = tuple(inspect.signature(own).parameters)
        if parameters != seam.parameters:
            raise self.lacking(f"{where}({', '.join(parameters)}) instead of ({', '.join(seam.parameters)})")
        for name in seam.uses:
            if not hasattr(owner, name):
                raise self.lacking(f"no {owner.__name__}.{name}")
        return own

    def check_state(self) -> None:
        """Raise ValueError if the library stores TaylorSeer's state differently."""
        state = self.find(_STATE)(n_derivatives=1)
        for name in ("state", "current_step", "last_non_approximated_step"):
            if not hasattr(state, name):
                raise self.lacking(f"no TaylorSeerState.{name}")
        if "dY_current" not in state.state:
            raise self.lacking("no TaylorSeerState.state['dY_current']")
        if not hasattr(self.find(_CALIBRATOR)(), "states"):
            raise self.lacking("no TaylorSeerCalibrator.states")


@dataclass(eq=False)
class _Functions:
    """The replaced functions of one library, and weak references to their uses by patches."""

    patch: Patch
    names: tuple[str, ...]
    users: weakref.WeakSet[_Use] = field(default_factory=weakref.WeakSet)

    def put_back(self, module: ModuleType) -> None:
        self.patch.undo()
        del vars(module)[_RECORD]

    def abandoned(self, module: ModuleType) -> None:
        """Called when a user was garbage-collected without being undone."""
        if vars(module).get(_RECORD) is self and not list(self.users) and not self.patch.conflicts():
            self.put_back(module)


@dataclass(eq=False)
class _Use:
    """One patch's use of the replaced functions. When the last use is undone, the functions are restored."""

    owner: ModuleType
    functions: _Functions

    @property
    def held(self) -> bool:
        return list(self.functions.users) != [self] or not self.functions.patch.conflicts()

    def conflict(self) -> str:
        return "; ".join(self.functions.patch.conflicts())

    def restore(self) -> None:
        if list(self.functions.users) == [self]:
            self.functions.put_back(self.owner)
        self.functions.users.discard(self)


def use_kernels(module: ModuleType, patch: Patch) -> tuple[str, ...]:
    """Run the library through our kernels until `patch`, and every other patch that uses them, is undone.

    Returns:
        The names of the replaced functions.

    Raises:
        TypeError: the module is not cache-dit.
        ValueError: the library's seams differ from the known ones.
        PatchConflictError: other code has already replaced one of the functions.
    """
    functions: _Functions | None = vars(module).get(_RECORD)
    if functions is None:
        functions = vars(module)[_RECORD] = _replace(Library(module))
    use = _Use(module, functions)
    functions.users.add(use)
    weakref.finalize(use, functions.abandoned, module).atexit = False
    patch.add(use)
    return functions.names


def _replace(library: Library) -> _Functions:
    own = [library.check(seam) for seam in SEAMS]
    library.check_state()
    patch = Patch()
    for seam, function in zip(SEAMS, own, strict=True):
        # As in the library, whose bookkeeping is not part of a compiled graph.
        ours = torch.compiler.disable(seam.make(function, library))
        patch.set_function(library.find(seam.owner), seam.name, ours)
    return _Functions(patch, tuple(f"{seam.owner.rpartition('.')[2]}.{seam.name}" for seam in SEAMS))


class LibraryHandle:
    """The patch of the library itself. It is stored on the library's module.

    Attributes:
        replaced: the names of the functions that run through our kernels.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._patch = Patch()
        self.replaced = use_kernels(module, self._patch)
        vars(module)[HANDLE] = self

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        name = f"{self._module.__name__} {Library(self._module).version}"
        return f"LibraryHandle({name}: {', '.join(self.replaced)}, {state})"

    @property
    def active(self) -> bool:
        """Whether this patch is still installed on the library."""
        return vars(self._module).get(HANDLE) is self

    def patches(self, module: Any) -> bool:
        """Whether this patch was made on exactly this module object."""
        return self._module is module

    def undo(self) -> None:
        """Restore the library's functions. If patched pipelines use them too, the last of these to be undone does it.

        A second call does nothing.

        Raises:
            PatchConflictError: other code has replaced one of the functions since. Nothing is changed then.
        """
        if self.active:
            self._patch.undo()
            del vars(self._module)[HANDLE]
