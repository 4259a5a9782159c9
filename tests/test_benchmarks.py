"""The benchmarks themselves: their byte counts, the overhead benchmark's operators, the GPU run up to its first launch.

No time is asserted here. Operator counts are the same on every machine, and are.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_overhead, goals, instructions, measure
from benchmarks.providers import PROVIDERS
from omni_kernels import patched
from omni_kernels.registration import DIRECT
from omni_kernels.validation import measurement, record, roof
from omni_kernels.validation.cases import CASES, wrong
from omni_kernels.validation.shapes import FULL, ON_CPU, TINY

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def case_inputs(case, shape=TINY):
    torch.manual_seed(0)
    return case.inputs(shape, CPU)


def bytes_of(values):
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("shape", FULL, ids=lambda s: s.name)
def test_a_shapes_bytes_are_its_tensors(shape):
    h = torch.empty(shape.size, dtype=shape.dtype, device="meta")
    assert shape.nbytes == h.numel() * h.element_size()


def test_the_large_shape_moves_enough_for_the_target_in_every_case():
    large = next(s for s in FULL if s.name == "large")
    assert 2 * large.nbytes >= measurement.TARGET_BYTES  # every op reads two at least
    assert "large" not in {s.name for s in ON_CPU}


@pytest.mark.parametrize("name", measure.TIMED)
def test_a_case_moves_what_it_reads_and_returns(name):
    case = measure.TIMED[name]
    inputs = case_inputs(case)
    args, kwargs = case.ours(inputs)
    flat = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else [a])]
    out = PROVIDERS["ours"](case)(inputs)
    out = () if case.written else out if isinstance(out, tuple) else (out,)
    weights = 4 * len(args[2]) if case.op == "linear_forecast" else 0
    assert case.bytes_moved(inputs) == bytes_of([*flat, *out]) + weights


@pytest.mark.parametrize("provider", ["ours", "eager"])
@pytest.mark.parametrize("name", measure.TIMED)
def test_providers_agree_in_fp64_terms_and_a_wrong_result_is_noticed(name, provider):
    case = measure.TIMED[name]
    inputs = case_inputs(case)
    output = PROVIDERS[provider](case)(inputs)
    assert wrong(case, provider, output, inputs, TINY.dtype) is None
    tensors = output if isinstance(output, tuple) else (output,)
    place = tensors[0].element_size() == 1  # of 8-bit values, the scale
    spoilt = tensors[place].view(-1)
    spoilt[0] += 1.0 + spoilt.abs().max()
    assert "off by" in wrong(case, provider, output, inputs, TINY.dtype)


def test_nothing_is_timed_on_a_wrong_result(monkeypatch):
    monkeypatch.setattr(measurement, "median_seconds", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=r"relative_l1 at tiny.* ours is off by"):
        measurement.measure(CASES["relative_l1"], TINY, "ours", lambda inputs: torch.zeros(1, 2), CPU)


def measured(case, shape, provider, us, nbytes, share=0.5):
    return measurement.Row(case, shape, provider, nbytes, us, 1.0, share)


LARGE, QWEN = "large 4×8192×3072 bfloat16", "qwen-image-1024 …"


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"compiled": 9.9}, ["against compiled"]),
        ({"copy": 8.4}, ["share of a copy of as many bytes"]),
        ({"share": 0.84}, ["share of copy bandwidth"]),
        ({"copy": 8.4, "compiled": 9.0}, ["share of a copy of as many bytes", "against compiled"]),
    ],
)
def test_goals_of_the_gpu_run(changes, missed):
    one = {"compiled": 10.0, "copy": 8.5, "share": 0.85} | changes
    rows = [
        measured("gelu", QWEN, "ours", 10.0, 25_000_000, 0.6),
        measured("gelu", QWEN, "eager", 5.0, 25_000_000),  # is not what ours is held against
        measured("gelu", QWEN, "torch.compile", one["compiled"], 25_000_000),
        measured("gelu", LARGE, "ours", 100.0, 200_000_000, one["share"]),
        measured("gelu", LARGE, "torch.compile", 100.0, 200_000_000),
        measured("swiglu", QWEN, "torch.compile", 1.0, 25_000_000),  # of another case
        measurement.Row("rms_norm", QWEN, "ours", 0, None, None, None, "not here"),
    ]
    found = goals.goals(rows, {25_000_000: one["copy"]})
    assert len(found) == 4
    assert [goal.what for goal in found if not goal.met] == missed
    assert goals.met(found) == (not missed)
    lines = goals.summary(found)
    assert sum(line.startswith("MISSED") for line in lines) == len(missed)
    assert sum(line.startswith("  gelu at") for line in lines) == len(missed)


def test_the_gpu_run_misses_where_a_kind_of_goal_was_not_measured():
    found = goals.goals([measured("gelu", QWEN, "ours", 10.0, 25_000_000)], {25_000_000: 9.0})
    assert all(goal.met for goal in found)
    assert not goals.met(found)


def test_qwen_images_ops_are_timed_at_the_shapes_that_they_have_there():
    timed = {
        (case.name, shape.size)
        for case in measure.TIMED.values()
        for shape in measure.shapes_of(case, torch.device("cuda"))
    }
    assert {
        ("gelu", (1, 4096, 12288)),
        ("gate_residual_norm layer", (1, 128, 3072)),
        ("gate_residual_norm h alone", (1, 4096, 3072)),
        ("gate_residual_norm index", (1, 8192, 3072)),
        ("ada_layer_norm index", (1, 8192, 3072)),
        ("qk_norm_rope", (1, 128, 3072)),
        ("qk_norm_rope without v", (1, 4096, 3072)),
    } <= timed
    assert ("gelu", (1, 4096, 3072)) not in timed


def test_rows_say_speed_share_and_target(monkeypatch):
    monkeypatch.setattr(measurement, "copy_bandwidth", lambda device: 4e12)
    case = CASES["relative_l1"]
    fast = measurement.row(case, TINY, "ours", CPU, 200_000_000, 200e6 / 3.6e12)
    slow = measurement.row(case, TINY, "ours", CPU, 200_000_000, 200e6 / 3.2e12)
    small = measurement.row(case, TINY, "ours", CPU, 1_000, 1e-6)
    peer = measurement.row(case, TINY, "eager", CPU, 200_000_000, 1e-3)
    assert (fast.share, slow.share) == (0.9, 0.8)
    assert [r.misses for r in (fast, slow, small, peer)] == [False, True, False, False]
    assert fast.gb_per_s == 3600
    assert len(measurement.table([fast, peer]).splitlines()) == 3


def test_copy_bandwidth_counts_reading_and_writing(monkeypatch):
    monkeypatch.setitem(roof.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(roof, "median_seconds", lambda calls, device: 1.0)
    assert roof.copy_bandwidth.__wrapped__(CPU) == 2 << 20


@pytest.fixture(scope="module")
def skipped():
    """What each contender adds to a skipped forward of 6 blocks: operators alone, no round is timed."""
    logging.disable(logging.WARNING)  # the library logs its configuration
    yield bench_overhead.costs(bench_overhead.Weights(6, CPU), "skipped", rounds=0)
    logging.disable(logging.NOTSET)


def test_operator_targets_are_met(skipped):
    missed = [t for t in bench_overhead.operator_targets(skipped) if not t.met]
    assert not missed


def test_operators_are_counted_as_they_are_known_to_be(skipped):
    """cache-dit's skip: two differences, two absolute values, two means, their quotient, its transfer, two sums."""
    by_name = {c.contender: c for c in skipped}
    library, ours = by_name["cache-dit library"], by_name["cache_dit"]
    assert (library.added_operators, library.added_expanded, library.added_h_sized) == (10, 10, 7)
    assert ours.added_operators < ours.added_expanded  # ours are made of several
    assert ours.added_h_sized == 2


def test_a_contender_that_does_not_skip_is_noticed(monkeypatch):
    monkeypatch.setitem(bench_overhead.KINDS, "skipped", (bench_overhead.ALWAYS_SMALL, False))
    monkeypatch.setattr(bench_overhead, "FIRST", 0)  # where nothing can be skipped yet
    first = bench_overhead.CONTENDERS[:1]
    with pytest.raises(AssertionError, match=r"cache_dit ran \[3, .*it should run 1"), torch.no_grad():
        bench_overhead.costs(bench_overhead.Weights(3, CPU), "skipped", 0, first)


def test_with_nothing_computed_a_fused_forward_has_the_shapes_that_it_has(monkeypatch):
    computed = []

    def counted(name, op):
        return lambda *args, **kwargs: computed.append(name) or op(*args, **kwargs)

    for name, op in list(vars(DIRECT["cpu"]).items()):
        monkeypatch.setattr(DIRECT["cpu"], name, counted(name, op))
    with torch.no_grad():
        run = bench_overhead.Run(bench_overhead.Weights(2, CPU), 2)
        with patched(run.pipe):
            (right,) = run.request(1, lambda step: contextlib.nullcontext())
            assert set(computed) == {"ada_layer_norm", "gelu", "gate_residual_norm", "qk_norm_rope"}
            computed.clear()
            with bench_overhead.nothing_computed():
                (left,) = run.request(1, lambda step: contextlib.nullcontext())
            assert not computed
            (again,) = run.request(1, lambda step: contextlib.nullcontext())
    assert left.shape == right.shape
    assert torch.equal(again, right)


def test_instructions_are_shares_of_what_the_peer_adds(tmp_path):
    dump = tmp_path / "out.1"
    dump.write_text("desc: Trigger: dump cache_dit,_TaylorSeer_1\nsummary: 0\ntotals: 1234\n")
    assert instructions._read(dump) == ("cache_dit,_TaylorSeer_1", 1234)
    counts = dict.fromkeys((c.name for c in instructions.COUNTED), 1400)
    counts |= {"cache_dit": 1100, "unpatched": 1000, "plain forward": 200, "fused forward": 210}
    targets = {one.what: one for one in instructions.shares(counts)}
    assert targets["cache_dit, skipped: added instructions, of cache-dit library's"].figure == 0.25
    assert targets["cache_dit, skipped: added instructions, of cache-dit library's"].met
    assert not targets["first_block_cache, skipped: added instructions, of diffusers first-block cache's"].met
    assert not targets["fused forward: instructions, of the plain one's"].met


def test_a_fused_forward_is_compared_with_the_plain_one():
    with torch.no_grad():
        found = bench_overhead.fused(bench_overhead.Weights(2, CPU), "nothing computed", rounds=1)
    assert found.us > 0
    assert found.plain_us > 0
    assert found.share > 0
    (target,) = bench_overhead.time_targets(
        [
            bench_overhead.Cost(
                name, "skipped", None if "library" in name else "cache-dit library", *[1.0] * 4, 1, 1, 1
            )
            for name in ("cache_dit", "cache_dit, TaylorSeer 1", "cache-dit library")
        ],
        [found],
    )[2:]
    assert target.figure == found.share


def test_time_added_is_what_is_left_where_nothing_else_happened():
    patched, plain = bench_overhead.Run.__new__(bench_overhead.Run), bench_overhead.Run.__new__(bench_overhead.Run)
    plain.seconds = [1e-3] * 5 + [2e-3, 9e-3, 3e-3]
    patched.seconds = [1.1e-3] * 4 + [7e-3, 2e-3, 1.1e-3, 5e-3]
    us, plain_us, added_us, spread_us = bench_overhead._times(patched, plain)
    assert (us, plain_us, added_us) == (1100.0, 1000.0, 100.0)
    assert spread_us > 100.0


def test_of_several_processes_each_figure_is_the_median():
    def cost(us):
        return bench_overhead.Cost("ours", "skipped", "theirs", us + 900, 900.0, us, 10.0, 2, 7, 2)

    costs = [cost(90.0), cost(70.0), cost(81.0)]
    assert bench_overhead._median(costs) == cost(81.0)


def test_results_are_readable_by_the_line(tmp_path):
    content = {"machine": {"name": "x", "versions": {"a": "1"}}, "rows": [{"op": "µ", "us": 1.5}, {"op": "b", "us": 2}]}
    record.write(tmp_path / "deep" / "x.json", content)
    text = (tmp_path / "deep" / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert '{ "op": "µ", "us": 1.5 }' in text


def test_device_slugs():
    assert record.slug("NVIDIA H200") == "nvidia-h200"
    assert record.slug("Intel(R) Xeon(R) Platinum 8480+") == "intel-xeon-platinum-8480"


def test_the_gpu_run_goes_up_to_the_first_launch_without_a_gpu():
    """In a process of its own: kernels are compiled there, where here they are interpreted."""
    both = "from benchmarks import gpu; print([gpu.main([]), gpu.main(['--dry-run'])])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", both], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for_want, as_told, codes = done.stdout.splitlines()
    assert for_want.endswith(
        "kernels compiled for sm_90; none launched and nothing measured, because there is no NVIDIA GPU"
    )
    assert as_told.endswith("because of --dry-run")
    assert codes == "[3, 0]"
