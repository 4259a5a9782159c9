"""Helpers for the tests of fused blocks of all models."""

import contextlib
import functools
import types
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def unfused_fails(*classes: type[torch.nn.Module]) -> Iterator[None]:
    """While open, the unfused forward of these block classes raises an error, but still looks like the library's."""

    def forward(self, *args, **kwargs):
        raise AssertionError("ran unfused")

    with contextlib.ExitStack() as stack:
        for cls in classes:
            librarys = types.FunctionType(forward.__code__, cls.forward.__globals__)
            stack.enter_context(mock.patch.object(cls, "forward", functools.update_wrapper(librarys, cls.forward)))
        yield


def off(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    result, expected = result.double(), expected.double()
    return ((result - expected).norm() / expected.norm()).item()


def wide(value):
    """`value` with its floating-point tensors in fp64."""
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [wide(t) for t in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class BlackBox(torch.nn.Module):
    """A layer of an unknown class without visible weights; counts its calls."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = [layer], 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner[0](x)


def boxed(block: torch.nn.Module, *paths: str) -> list[BlackBox]:
    """Replace a block's layers by black boxes."""
    boxes = []
    for path in paths:
        boxes.append(BlackBox(block.get_submodule(path)))
        block.set_submodule(path, boxes[-1])
    return boxes
