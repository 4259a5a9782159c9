"""How the ops that sum cut a sample into programs and add the pieces."""

import importlib

import pytest
import torch
from op_inputs import far_apart

from omni_kernels.ops import _samples
from omni_kernels.validation import oracle
from omni_kernels.validation.tolerances import assert_near

SUMMING = ["relative_l1", "residual_relative_l1", "modulated_relative_l1"]


def arguments(implementation, op, B, S=33, D=48):
    tensors = [implementation.randn(B, S, D, dtype=torch.bfloat16) for _ in range(4)]
    return tensors[:2] if op == "relative_l1" else tensors[:3] if op == "residual_relative_l1" else tensors


def sums(implementation, op, arguments):
    result = implementation[op](*arguments)
    return result if op == "relative_l1" else result[1]


@pytest.fixture
def small_blocks(monkeypatch):
    """Every sample takes several programs, and every program several blocks."""
    for op, name, size in zip(SUMMING, ("BLOCK", "BLOCK", "TILE"), (64, 64, 128), strict=True):
        monkeypatch.setattr(importlib.import_module(f"omni_kernels.ops.{op}"), name, size)
    monkeypatch.setattr(_samples, "MAX_PARTIALS", 5)


@pytest.mark.parametrize(
    ("n", "blocks", "programs"), [(1, 1, 1), (64, 1, 1), (65, 1, 2), (320, 1, 5), (321, 2, 3), (1_000_000, 3125, 5)]
)
def test_a_sample_is_covered_by_a_bounded_number_of_programs(small_blocks, n, blocks, programs):
    assert _samples.cut(n, 64) == (blocks, programs)
    assert (programs - 1) * blocks * 64 < n <= programs * blocks * 64


@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 31, 33])
@pytest.mark.parametrize("op", SUMMING)
def test_programs_of_several_blocks(triton_launch, small_blocks, op, tokens):
    inputs = arguments(triton_launch, op, 3, tokens)
    got = sums(triton_launch, op, inputs)
    if op == "relative_l1":
        expected = oracle.relative_l1(*inputs)
    else:
        new = triton_launch[op](*inputs)[0]
        expected = oracle.sums(new.double() - inputs[-1].double(), inputs[-1])
    assert_near(got, expected)


@pytest.mark.parametrize("programs", [2, 1024, 1025, 8192])
def test_any_number_of_partial_sums_is_added(triton_launch, programs):
    partials = triton_launch.randn(3, 2, programs)
    sums = partials.new_empty((3, 2))
    _samples.add_partials(partials, sums)
    assert_near(sums, partials.double().sum(2), partials.abs().sum(2))


@pytest.mark.parametrize("op", SUMMING)
def test_the_same_inputs_give_the_same_bits(implementation, op):
    inputs = arguments(implementation, op, 2)
    assert torch.equal(sums(implementation, op, inputs), sums(implementation, op, inputs))


@pytest.mark.parametrize("op", SUMMING)
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(triton_launch, small_blocks, op):
    inputs = arguments(triton_launch, op, 4)
    together = sums(triton_launch, op, inputs)
    for b in range(4):
        assert torch.equal(sums(triton_launch, op, [t[b : b + 1] for t in inputs]), together[b : b + 1])


@pytest.mark.parametrize("op", [*SUMMING, "linear_forecast", "ada_layer_norm", "gate_residual_norm", "rms_norm"])
def test_samples_that_lie_more_than_2_to_the_31_elements_apart(triton_launch, op):
    near, other, third = (triton_launch.randn(3, 5, 48, dtype=torch.bfloat16) for _ in range(3))
    far = far_apart(near)
    run = triton_launch[op]
    if op == "linear_forecast":
        assert torch.equal(run(far, [other], [0.5]), run(near, [other], [0.5]))
        run(near, [other], [0.5], out=far)
        assert torch.equal(far, run(near, [other], [0.5]))
    elif op == "relative_l1":
        assert torch.equal(run(far, other), run(near, other))
    elif op == "rms_norm":
        assert torch.equal(run(far), run(near))
    elif op == "ada_layer_norm":
        assert torch.equal(run(far, far, other), run(near, near, other))
    elif op == "gate_residual_norm":
        for a, b in zip(run(far, far, far, other, far), run(near, near, near, other, near), strict=True):
            assert torch.equal(a, b)
    else:
        more = [other] if op == "residual_relative_l1" else [other, third]
        for a, b in zip(run(far, *more, far), run(near, *more, near), strict=True):
            assert torch.equal(a, b)
