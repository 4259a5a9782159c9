"""The kernels, compiled for GPUs that are not there: what Triton makes of exactly what the launchers launch.

Every kernel is compiled for every target, and every launch for one, the targets in turn. `make test-all` compiles every
launch for every target.
"""

import csv
import difflib
import os
import pickle
import re
from itertools import islice
from pathlib import Path

import launches
import pytest
import triton
from filelock import FileLock

from benchmarks import kernels
from omni_kernels.validation import aot

LAUNCHES = {name: launch for name, launch in launches.table().items() if name != "control"}
TARGETS = [*aot.TARGETS]
# What a kernel writes for every element that it reads; other kernels p_out.
OUTPUTS = {
    "relative_l1_kernel": (),
    "residual_relative_l1_kernel": ("p_residual",),
    "modulated_relative_l1_kernel": ("p_m",),
    "ada_layer_norm_kernel": ("p_y", "p_q"),
    "gate_residual_norm_kernel": ("p_h", "p_y", "p_q"),
    "rms_norm_kernel": ("p_y", "p_q"),
    "quantize_kernel": ("p_q", "p_y"),
    "qk_norm_rope_kernel": ("p_q_out", "p_k_out", "p_v_out"),
}
# The same for all rows: once is enough.
VECTORS = {"p_weight", "p_bias", "p_x_weight", "p_q_weight", "p_k_weight"}
# Not elements: sums, numbers, rows to take; and tables, of which half is not used and AMD's compiler does not load it.
OTHERS = {"p_partials", "p_q_scale", "p_weights", "p_index", "p_freqs", "p_sin"}
# 128 bits, in the instructions of NVIDIA, and of AMD before and from gfx11 on.
WIDE = {"sm": (".v4.b32",), "gf": ("_dwordx4", "_b128")}
PINNED = re.search(r"^triton==(\S+)", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE)[1]


def first_of_their_kernels():
    """The launches, one a kernel, that are compiled for all targets in any case."""
    found = {}
    for name, launch in LAUNCHES.items():
        found.setdefault(launches.configurations(launch)[0].kernel, name)
    return {*found.values(), "control"}


def in_turn():
    """Target → names of launches."""
    everywhere, found = first_of_their_kernels(), {target: [] for target in TARGETS}
    for i, name in enumerate(launches.table()):
        able = [target for target in TARGETS if aot.runs_on(name, target)]
        for target in able if name in everywhere else [able[i % len(able)]]:
            found[target].append(name)
    return found


@pytest.fixture(scope="module", params=["targets in turn", pytest.param("all targets", marks=pytest.mark.long)])
def costs(request, tmp_path_factory):
    """Of launches on targets: their kernels' costs, which one of the workers finds for all."""
    names = in_turn() if request.param == "targets in turn" else None
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return aot.costs("launches:table", TARGETS, names)
    kept = tmp_path_factory.getbasetemp().parent / f"costs, {request.param}"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(aot.costs("launches:table", TARGETS, names)))
    return pickle.loads(kept.read_bytes())


def wide(accesses, target):
    return sum(n for name, n in accesses.items() if any(one in name for one in WIDE[target[:2]]))


every_launch = pytest.mark.parametrize("launch", LAUNCHES)


@every_launch
def test_nothing_spills(costs, launch):
    for target, found in costs[launch].items():
        for cost in found:
            assert cost.spills == 0, (target, cost)


@every_launch
def test_registers_are_within_the_budget(costs, launch):
    for target, found in costs[launch].items():
        for cost in found:
            assert cost.registers <= aot.budget(cost.kernel, target), (target, cost)


def accesses(launch, warp_size):
    """How many loads and stores of 128 bits a thread needs for what it takes of all tensors."""
    first = launches.configurations(LAUNCHES[launch], warp_size)[0]
    if first.kernel == "scaled_mm_kernel":
        return 0, 0  # computes more than it moves; its results are stored as the tensor cores hold them
    outputs = OUTPUTS.get(first.kernel, ("p_out",))
    loads = stores = 0
    for name, dtype in first.tensors.items():
        # Of a tile that is cut short a thread may have less than 128 bits, and of each chunk of a row.
        chunks = first.constants.get("CHUNKS", 1)
        times = chunks * (first.elements // chunks // warp_size * dtype.itemsize // 16)
        if name in outputs:
            stores += times
        elif name not in OTHERS:
            # One for all rows is shared out: a thread of many has less than 128 bits of a short one.
            if name in VECTORS and not first.constants.get("ACROSS"):
                times = chunks * (first.constants["BLOCK"] * dtype.itemsize // (16 * warp_size * first.num_warps))
            loads += min(times, 1) if name in VECTORS else times
    return loads, stores


@every_launch
def test_every_tensor_is_accessed_in_128_bits(costs, launch):
    for target, (cost, *_) in costs[launch].items():
        loads, stores = accesses(launch, aot.TARGETS[target][2])
        assert wide(cost.loads, target) >= loads, (target, cost)
        assert wide(cost.stores, target) >= stores, (target, cost)


def test_what_a_model_launches_needs_accesses_of_128_bits():
    """The check above would pass for nothing where none were needed."""
    assert accesses("gelu odd", 32) == (2, 2)
    assert accesses("qk_norm_rope joint", 64)[0] >= 3


@every_launch
def test_sums_are_not_added_by_atomics(costs, launch):
    for found in costs[launch].values():
        for cost in found:
            assert not cost.atomics


@every_launch
def test_offsets_of_programs_have_64_bits(costs, launch):
    for found in costs[launch].values():
        for cost in found:
            assert not cost.narrow_offsets


@pytest.mark.parametrize("launch", ["relative_l1 odd", "residual_relative_l1 odd", "modulated_relative_l1 layer"])
def test_partial_sums_are_added_by_a_second_kernel(costs, launch):
    assert [cost.kernel for cost in costs[launch]["sm_90"]][1:] == ["add_partials_kernel"]


def test_every_kernel_has_a_budget():
    assert set(aot.BUDGETS) == launches.kernels()


def test_every_launch_is_compiled_and_every_kernel_for_every_target(costs):
    assert {*costs} == {*launches.table()}
    compiled = {(cost.kernel, target) for c in costs.values() for target, found in c.items() for cost in found}
    assert compiled == {(kernel, target) for kernel in launches.kernels() | {"control_kernel"} for target in TARGETS}


@pytest.mark.skipif(triton.__version__ != PINNED, reason=f"another Triton than {PINNED} compiles otherwise")
def test_costs_are_as_written(costs):
    found = kernels.text({name: costs[name] for name in LAUNCHES}).splitlines()
    head, columns, *written = kernels.PATH.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(row[:2]) for row in csv.reader(written)]
    both = [(name, target) for name in LAUNCHES for target in TARGETS]
    assert [*dict.fromkeys(pairs)] == [one for one in both if aot.runs_on(*one)]
    written = [line for line, (name, target) in zip(written, pairs, strict=True) if target in costs[name]]
    written = [head, columns, *written]
    lines = difflib.unified_diff(written, found, "written", "compiled", lineterm="", n=0)
    changed = [*islice((line for line in lines if not line.startswith("@@")), 22)]
    if changed:
        pytest.fail("\n".join([f"kernels cost other than written; `{kernels.COMMAND}` writes them:", *changed]))


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_checked_would_be_seen(costs, target):
    (control,) = costs["control"][target]
    assert wide(control.loads, target) == 0
    assert control.atomics
    assert control.narrow_offsets
