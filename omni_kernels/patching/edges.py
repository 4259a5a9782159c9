"""The first and last steps of a request with the layers' own weights, and those between in 8 bits.

The step is read from the pipeline's scheduler when a transformer is called: no object that pipelines share is changed.
During a forward at one of these steps, the blocks have their own linear layers; after it, the quantised ones again. So
fused and compiled blocks see plain linear layers there, and a compiled block has two graphs, each compiled once.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from omni_kernels.patching.changes import InstanceMethod, Patch, PatchConflictError, describe

#: After this many transformer calls without a step of the scheduler, the pipeline must be using another scheduler.
MOST_CALLS = 16
#: A replaced layer: the path of its transformer in the pipeline, its parent, its name there, and both layers.
Replaced = tuple[str, torch.nn.Module, str, torch.nn.Linear, torch.nn.Module]


def install(pipe: Any, steps: tuple[int, int], layers: Iterable[Replaced], patch: Patch) -> None:
    """Run the first and last steps of the pipeline's requests with the layers' own weights, until `patch` is undone.

    Args:
        steps: how many of the first steps, and how many of the last.
        layers: the layers that are quantised in the other steps.

    Raises:
        ValueError: the pipeline's scheduler has no step index.
        PatchConflictError: a transformer is compiled as a whole, or other code has replaced its forward.
    """
    check(getattr(pipe, "scheduler", None), type(pipe).__name__)
    by_model: dict[str, list[Replaced]] = {}
    for one in layers:
        by_model.setdefault(one[0], []).append(one)
    known = _Step(pipe, steps)
    for name, replaced in by_model.items():
        model = getattr(pipe, name)
        whole = getattr(model, "_orig_mod", None) or model._compiled_call_impl
        if whole is not None and not isinstance(whole, InstanceMethod):
            raise PatchConflictError(
                f"quantize: edge_steps changes layers between the steps, and {name} is compiled as a whole "
                f"({describe(whole)}). compile='regional' works with it"
            )
        try:
            patch.set_forward(model, _Model(known, replaced).forward)
        except PatchConflictError as error:
            raise PatchConflictError(f"quantize: edge_steps needs the forward of {name}: {error}") from None


def check(scheduler: Any, pipeline: str) -> None:
    """Raise ValueError if a pipeline's scheduler does not show which step a call of the transformer belongs to."""
    kind = type(scheduler).__name__
    if scheduler is None:
        why = "it has no scheduler"
    elif not hasattr(scheduler, "step_index"):
        why = f"its {kind} has no step_index"
    elif getattr(scheduler, "order", 1) != 1:
        why = f"its {kind} calls the model {scheduler.order} times a step"
    else:
        return
    raise ValueError(
        f"quantize: the edge_steps of this {pipeline} cannot be known, because {why}: leave out edge_steps"
    )


class _Step:
    """Tells whether a transformer call is at one of the first or last steps of a request."""

    def __init__(self, pipe: Any, steps: tuple[int, int]) -> None:
        self._pipe = pipe
        self._first, self._last = steps
        self._checked: Any = pipe.scheduler
        self._at: tuple[Any, Any] = (None, None)
        self._calls = 0

    def at_an_edge(self) -> bool:
        """Whether the step of this call is one of the first or the last. Before the first request, calls are.

        Raises:
            ValueError: the pipeline was given a scheduler without a step index.
        """
        scheduler = self._pipe.scheduler
        if scheduler is not self._checked:
            check(scheduler, type(self._pipe).__name__)
            self._checked = scheduler
        index = scheduler.step_index
        if self._is_lost(scheduler.timesteps, index):
            return False
        begin, count = self._begin_and_count(scheduler)
        step = 0 if index is None else max(0, index - begin)
        return step < count and (step < self._first or step >= count - self._last)

    def _begin_and_count(self, scheduler: Any) -> tuple[int, int]:
        """The scheduler step at which the request begins, and its number of steps.

        A pipeline that leaves out the first steps sets the scheduler's begin index, or announces fewer steps than are
        scheduled.
        """
        scheduled, announced = len(scheduler.timesteps), getattr(self._pipe, "_num_timesteps", None)
        if not (isinstance(announced, int) and 0 < announced <= scheduled):
            announced = scheduled
        begin = getattr(scheduler, "begin_index", None)
        begin = scheduled - announced if begin is None else begin
        return begin, min(scheduled - begin, announced)

    def _is_lost(self, timesteps: Any, index: int | None) -> bool:
        """Whether the scheduler does not follow the calls. Warns when that shows."""
        if self._at[0] is not timesteps or self._at[1] != index:
            self._at, self._calls = (timesteps, index), 0
        self._calls += 1
        if self._calls == MOST_CALLS + 1:
            warnings.warn(
                f"{type(self._pipe).__name__} has called its transformer {MOST_CALLS} times without a step of its "
                "scheduler, so it steps another one, perhaps a copy: quantize's edge_steps are in 8 bits from here on",
                stacklevel=2,
            )
        return self._calls > MOST_CALLS


class _Model:
    """One transformer: its layers, and its forward. Another thread's forward waits, because the layers are shared."""

    def __init__(self, step: _Step, layers: list[Replaced]) -> None:
        self._step, self._turn = step, threading.RLock()
        self._layers = [(parent._modules, key, own, replacement) for _, parent, key, own, replacement in layers]

    def forward(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replaces the transformer's forward (`Patch.set_forward`)."""
        with self._turn, self._own_layers() if self._step.at_an_edge() else contextlib.nullcontext():
            return type(model).forward(model, *args, **kwargs)

    @contextlib.contextmanager
    def _own_layers(self) -> Iterator[None]:
        """Context manager: the blocks have their own layers."""
        for _, _, own, replacement in self._layers:
            if own.weight.device != replacement.weight.device:
                raise RuntimeError(
                    f"quantize: edge_steps does not work with offloading of single layers: a layer's own weights are "
                    f"on {own.weight.device}, and those in 8 bits on {replacement.weight.device}"
                )
        for modules, key, own, _ in self._layers:
            modules[key] = own
        try:
            yield
        finally:
            for modules, key, _, replacement in self._layers:
                modules[key] = replacement
