"""Torch's global random numbers, for one request.

Pipelines pass a request's generator to most of what they draw. Some draw from the global generator, too: a scheduler
that adds noise at each step, and is given no generator. So that a seed gives the same picture every time, the global
generators of the CPU and of the request's device follow from the seed, too, and are put back afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class RandomState:
    """The states of the global generators that a request uses.

    Args:
        cpu: of the CPU.
        device: of the accelerator, if there is one.
        where: the accelerator.
    """

    def __init__(self, cpu: torch.Tensor, device: torch.Tensor | None, where: torch.device) -> None:
        self._cpu = cpu
        self._device = device
        self._where = where

    @classmethod
    def of_seed(cls, seed: int | None, device: torch.device) -> RandomState:
        """The states that follow from a seed; with None, the present ones."""
        if seed is None:
            return cls(torch.get_rng_state(), _state(device), device)
        before, made = _state(device), None
        if before is not None:
            getattr(torch, device.type).manual_seed(seed)
            made = _state(device)
            _set_state(device, before)
        return cls(torch.Generator().manual_seed(seed).get_state(), made, device)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Context manager: the global generators have these states. They go on from there the next time."""
        cpu, device = torch.get_rng_state(), _state(self._where)
        torch.set_rng_state(self._cpu)
        _set_state(self._where, self._device)
        try:
            yield
        finally:
            self._cpu, self._device = torch.get_rng_state(), _state(self._where)
            torch.set_rng_state(cpu)
            _set_state(self._where, device)


def _state(device: torch.device) -> torch.Tensor | None:
    """The state of the device's generator; None for the CPU, and for a device without one."""
    get = getattr(getattr(torch, device.type, None), "get_rng_state", None)
    return None if device.type == "cpu" or get is None else get(device)


def _set_state(device: torch.device, state: torch.Tensor | None) -> None:
    if state is not None:
        getattr(torch, device.type).set_rng_state(state, device)
