"""Runs the same tests on both implementations of an op, with guarded and poisoned buffers."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from implementations import INTERPRETED, Implementation

from omni_kernels.validation.interpreter import correct
from omni_kernels.validation.memory import poisoned_outputs

ON_GPU = () if INTERPRETED else pytest.mark.gpu

if INTERPRETED:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    # Before 3.7, Triton's interpreter uses loop counters that numpy 2.4 no longer accepts.
    interpreter._patch_lang_tensor = patch_index
    correct()


@pytest.fixture
def guarded() -> Iterator[None]:
    """Outputs are filled with NaN and lie between guards, which are checked afterwards."""
    with poisoned_outputs() as intact:
        yield
        assert intact(), "a kernel wrote outside its buffers"


@pytest.fixture
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to make a tensor contiguous fails the test."""
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: t if t.is_contiguous() else pytest.fail("copied"))


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger blocks, so fewer programs: the interpreter's time depends on their number."""
    if INTERPRETED:
        for op in ("relative_l1", "residual_relative_l1", "linear_forecast", "gelu", "swiglu"):
            monkeypatch.setattr(importlib.import_module(f"omni_kernels.ops.{op}"), "BLOCK", 2**16)
        for op in ("modulated_relative_l1", "ada_layer_norm", "gate_residual_norm", "rms_norm", "quantize"):
            monkeypatch.setattr(importlib.import_module(f"omni_kernels.ops.{op}"), "TILE", 2**17)
        monkeypatch.setattr(importlib.import_module("omni_kernels.ops.qk_norm_rope"), "TILE", 2**16)


def _ready(name: str) -> Implementation:
    chosen = Implementation(name)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    torch.manual_seed(0)
    return chosen


@pytest.fixture(params=["cpu", pytest.param("triton", marks=ON_GPU)])
def implementation(request: pytest.FixtureRequest, guarded: None) -> Implementation:
    """Plain torch, and Triton in the interpreter or on the GPU."""
    return _ready(request.param)


@pytest.fixture(params=[pytest.param("triton", marks=ON_GPU)])
def triton_launch(request: pytest.FixtureRequest, guarded: None) -> Implementation:
    """Triton only, for tests of its launches."""
    return _ready(request.param)
