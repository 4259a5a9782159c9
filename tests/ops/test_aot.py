"""The kernels, compiled for GPUs that are not there: what Triton makes of exactly what the launchers launch."""

import importlib

import launches
import pytest
import torch
from torch.utils._pytree import tree_leaves

from omni_kernels.ops import _samples
from omni_kernels.validation import aot

LAUNCHES = {name: launch for name, launch in launches.table().items() if name != "control"}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Tensors of the inputs' size that an op writes, or a launch; one where nothing else is said.
OUTPUTS = {"relative_l1": 0, "gate_residual_norm": 2, "gate_residual_norm h alone": 1, "qk_norm_rope": 3}
# 128 bits, in each vendor's instructions.
WIDE = {"sm": ".v4.b32", "gf": "_dwordx4"}


@pytest.fixture(scope="module")
def costs():
    """Of every launch on every target: its kernels' costs."""
    return aot.costs("launches:table", TARGETS)


def wide(accesses, target):
    return sum(n for name, n in accesses.items() if WIDE[target[:2]] in name)


def pieces(launch):
    """How often a thread takes 8 elements of every large tensor."""
    op = launch.split()[0]
    file = importlib.import_module(f"omni_kernels.ops.{op}")
    if op == "qk_norm_rope":
        return 2 if "half" in launch or "across" in launch else file.TILE // _samples.THREADS // 8
    elements = file.BLOCK if hasattr(file, "BLOCK") else file.TILE
    return elements // _samples.THREADS // 8


every_launch = pytest.mark.parametrize("launch", LAUNCHES)
every_target = pytest.mark.parametrize("target", TARGETS)


@every_launch
@every_target
def test_nothing_spills(costs, launch, target):
    for cost in costs[launch][target]:
        assert cost.spills == 0, cost


@every_launch
@every_target
def test_every_bf16_tensor_is_accessed_in_128_bits(costs, launch, target):
    first, op, run, times = costs[launch][target][0], launch.split()[0], LAUNCHES[launch], pieces(launch)
    given = [t for t in tree_leaves((run.args, run.keywords)) if isinstance(t, torch.Tensor)]
    if op == "qk_norm_rope":  # what it writes is given, too
        given = [*given[:3], *given[6:]]
    elif op == "gelu":  # perhaps
        given = given[:1]
    # Of a vector once is enough.
    inputs = sum((times if t.dim() > 1 or len(t) > 1024 else 1) for t in given if t.dtype == torch.bfloat16)
    assert wide(first.loads, target) >= inputs, first
    outputs = OUTPUTS.get(launch, OUTPUTS.get(op, 1)) if given[0].dtype == torch.bfloat16 else 0
    assert wide(first.stores, target) >= outputs * times, first


@every_launch
def test_sums_are_not_added_by_atomics(costs, launch):
    for cost in costs[launch]["sm_90"]:
        assert not cost.atomics


@every_launch
def test_offsets_of_programs_have_64_bits(costs, launch):
    for cost in costs[launch]["sm_90"]:
        assert not cost.narrow_offsets


@pytest.mark.parametrize("launch", ["relative_l1 odd", "residual_relative_l1 odd", "modulated_relative_l1 layer"])
def test_partial_sums_are_added_by_a_second_kernel(costs, launch):
    assert [cost.kernel for cost in costs[launch]["sm_90"]][1:] == ["add_partials_kernel"]


@every_target
def test_what_is_checked_would_be_seen(costs, target):
    (control,) = costs["control"][target]
    assert wide(control.loads, target) == 0
    assert control.atomics
    assert control.narrow_offsets
