"""Ascend: what launchers choose there, what is read of its compilers' output, and, where these are, one kernel."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from implementations import INTERPRETED

from omni_kernels.ascend import limits
from omni_kernels.device import Device, pretend
from omni_kernels.ops import OPS
from omni_kernels.validation import ascend, ascend_ir, checks
from omni_kernels.validation.ascend_ir import ToolError, Tools

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def npu():
    with pretend("cpu", Device("ascend", "Ascend910B1", "Ascend910B1")):
        yield


def test_tiles_are_ascends_on_ascend_alone(npu):
    x = torch.empty(1)
    assert limits.tile("gelu", x, 4096) == limits.TILES["gelu"]
    assert limits.tile("gelu", x.to("meta"), 4096) == 4096


def test_tiles_are_as_elsewhere_on_a_cpu():
    assert limits.tile("gelu", torch.empty(1), 123) == 123


def test_every_op_with_a_kernel_of_its_own_has_a_tile():
    assert set(limits.TILES) == set(OPS) - {"scaled_mm"}, "which has no kernel there"
    assert all(n & (n - 1) == 0 for n in limits.TILES.values())


def test_a_grid_is_refused_from_65536_programs_on(npu):
    assert limits.grid(torch.empty(1), 65535) == (65535,)
    with pytest.raises(limits.NotLaunchableError, match="65536"):
        limits.grid(torch.empty(1), 65536)
    assert limits.grid(torch.empty(1, device="meta"), 65536) == (65536,)


def test_the_kept_results_are_of_these_kernels_launches_and_checks(npu):
    kept = json.loads((Path(__file__).parents[2] / "benchmarks/results/ascend-lowering.json").read_text())
    again = f"made again by `make validate-ascend`, which is {ascend.COMMAND}"
    assert kept["kernels"] == ascend.kernels_digest(), again
    table, wanted = ascend._chosen([])
    assert {row["launch"] for row in kept["lowered"]} == set(table), again
    assert [row["check"] for row in kept["computed"]] == [check.id for check in wanted], again
    assert {row["status"] for row in kept["lowered"]} <= {"fits", "plain torch"}
    assert {row["status"] for row in kept["computed"]} <= {"passed", "plain torch"}


def test_another_kernel_is_another_digest(monkeypatch, tmp_path):
    source = Path(ascend.ops_package.__file__).parent
    for path in source.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(ascend.ops_package, "__file__", str(tmp_path / "__init__.py"))
    before, gelu = ascend.kernels_digest(), tmp_path / "gelu.py"
    text = gelu.read_text()
    gelu.write_text(text + "\n# words\n")
    assert ascend.kernels_digest() == before
    gelu.write_text(text.replace("tl.store(", "tl.load("))
    assert ascend.kernels_digest() != before


@interpreted
@pytest.mark.parametrize("op", ["gelu", "swiglu", "relative_l1"])
def test_what_cannot_be_launched_is_computed_in_plain_torch(npu, monkeypatch, op):
    monkeypatch.setattr(limits, "MAX_PROGRAMS", 0)
    kernel = f"{op}_kernel"
    monkeypatch.setattr(importlib.import_module(f"omni_kernels.ops.{op}"), kernel, _NotToBeLaunched())
    args = [torch.randn(2, 3, 8) for _ in range(1 if op == "gelu" else 2)]
    assert torch.equal(OPS[op].launcher(*args), OPS[op].reference(*args))


class _NotToBeLaunched:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: pytest.fail("launched")


@interpreted
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "use",
    [
        "ada_layer_norm-layer",
        "ada_layer_norm-index",
        "gate_residual_norm-index",
        "modulated_relative_l1-layer",
        "qk_norm_rope",
        "qk_norm_rope-half",
        "qk_norm_rope-across-heads",
        "qk_norm_rope-cos-and-sin",
        "rms_norm-heads",
    ],
)
def test_what_launchers_do_otherwise_on_ascend_is_right(npu, use, dtype):
    check = checks.parse(f"{use}/2x5x200/{dtype}/channels")
    assert not checks.run(check, lambda op: OPS[op].launcher, torch.device("cpu"), 0)


@interpreted
def test_heads_that_do_not_fill_a_tile_are_cut_by_token(npu, monkeypatch):
    monkeypatch.setitem(limits.TILES, "qk_norm_rope", 64)  # 3 programs for 3 heads of 50
    check = checks.parse("qk_norm_rope/2x5x200/float32/model")
    assert not checks.run(check, lambda op: OPS[op].launcher, torch.device("cpu"), 0)


def test_an_overflow_is_read_from_the_last_attempt():
    text = (
        "error: ub overflow, requires 2 bits while 1 bits available\nub overflow, requires 2621696 bits while 1572864"
    )
    assert ascend_ir.overflow(text) == 2621696
    assert ascend_ir.overflow("error: something else") is None


def test_the_planned_buffers_end_with_the_farthest():
    hivm = """
    %c0_i64 = arith.constant 0 : i64
    %c8192_i64 = arith.constant 8192 : i64
    %1 = hivm.hir.pointer_cast(%c0_i64, %c8192_i64) : memref<32x128xbf16, #hivm.address_space<ub>>
    %2 = hivm.hir.pointer_cast(%c8192_i64) : memref<16xf32, strided<[1]>, #hivm.address_space<ub>>
    %3 = hivm.hir.pointer_cast(%c8192_i64) : memref<4096xf32, #hivm.address_space<gm>>
"""
    assert ascend_ir.buffers_end(hivm) == 8 * 8192 + 32 * 128 * 16


def test_errors_are_told_without_paths():
    text = "note: one\n/home/somebody/build/kernel.mlir:3:1: error: strides must not be zero\nStack dump:"
    assert ascend_ir.first_error(text) == "kernel.mlir:3:1: error: strides must not be zero"


def test_accesses_without_a_regular_distance_are_counted():
    assert ascend_ir.discrete_accesses("%1 = arith.select %a {DiscreteMemAccess}\n%2 = arith.addf") == 1


def test_the_stand_in_for_the_last_stage_keeps_what_it_is_given(tmp_path):
    (tmp_path / "hivmc").write_text(ascend_ir.STUB)
    (tmp_path / "module").write_text("planned")
    run = ["sh", str(tmp_path / "hivmc")]
    assert subprocess.run([*run, "--version"]).returncode == 0
    out = tmp_path / "out"
    assert subprocess.run([*run, str(tmp_path / "module"), "--some=thing", "-o", str(out)]).returncode == 0
    assert out.read_text() == ""
    assert out.with_suffix(".o").read_text() == "planned"


@pytest.fixture
def linux(monkeypatch):
    """Of which the wheels are, wherever the test runs."""
    monkeypatch.setattr(ascend_ir.platform, "system", lambda: "Linux")
    monkeypatch.setattr(ascend_ir.platform, "machine", lambda: "x86_64")


def test_a_damaged_wheel_is_refused(tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("part", "what is in it" * 100)
    wheel.write_bytes(wheel.read_bytes().replace(b"what is in it", b"what was in it"[:13], 1))
    with pytest.raises(ToolError, match="damaged at part"):
        ascend_ir.unpack(wheel, tmp_path / "unpacked")


def test_another_file_of_the_wheels_name_is_refused(linux, tmp_path, monkeypatch):
    def pip(command, **environment):
        (Path(command[command.index("--dest") + 1]) / "triton_ascend-3.2.0-cp311.whl").write_text("no wheel")

    monkeypatch.setattr(ascend_ir, "_run", pip)
    with pytest.raises(ToolError, match="SHA-256"):
        Tools.fetched(tmp_path)
    assert Tools.found(tmp_path) is None


def test_without_the_compilers_the_command_says_so(linux, tmp_path, monkeypatch, capsys):
    def offline(*command, **environment):
        raise ToolError("pip ended with 1:\nno network")

    monkeypatch.setattr(ascend_ir, "_run", offline)
    assert ascend.main(["--tools", str(tmp_path), "gelu"]) == ascend.NO_TOOLS
    assert "are not available: pip ended with 1" in capsys.readouterr().err


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ascend_ir, "LLVM", tmp_path)
    assert {"llvm-19", "mlir-19-tools"} <= set(ascend_ir.missing_cpu_tools())


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        ascend.main(["gelo"])
    assert exit_.value.code == 2
    assert "'gelo' is neither an op" in capsys.readouterr().err


@interpreted
def test_interpreted_kernels_have_no_ir():
    with pytest.raises(ToolError, match="TRITON_INTERPRET"), ascend.standing_in(lambda launch: None):
        pass


FITS = {"launch": "gelu odd", "op": "gelu", "kernel": "gelu_kernel", "programs": 4, "status": "fits", "ub_bits": 786432}
RIGHT = {
    "check": "gelu/1",
    "op": "gelu",
    "dtype": "float32",
    "status": "passed",
    "kernels": "gelu_kernel",
    "worst": 0.5,
}


@pytest.mark.parametrize(
    ("lowered", "computed", "says"),
    [
        ([FITS], [RIGHT], ascend.COMPUTED),
        ([FITS], [], ascend.LOWERED),
        ([FITS], [RIGHT | {"status": "plain torch"}], ascend.LOWERED),  # no kernel was launched
        ([FITS | {"status": "overflow", "problem": "needs 2"}], [RIGHT], "no: gelu odd: needs 2"),
        ([FITS], [RIGHT | {"status": "failed", "problem": "off"}], "no: gelu/1: off"),
    ],
)
def test_no_more_is_said_of_an_op_than_was_done(lowered, computed, says):
    (row,) = ascend.support(lowered, computed)
    assert (row["op"], row["support"]) == ("gelu", says)


@pytest.mark.parametrize(("status", "code"), [("fits", 0), ("overflow", 1), ("error", 1)])
def test_the_file_says_what_it_is_of(tmp_path, monkeypatch, status, code):
    row = FITS | {"status": status} | ({} if status == "fits" else {"problem": "something"})
    monkeypatch.setattr(Tools, "fetched", lambda directory: None)
    monkeypatch.setattr(ascend, "lower_all", lambda tools, table: iter([row]))
    monkeypatch.setattr(ascend, "missing_cpu_tools", lambda: ["mlir-19-tools"])
    assert ascend.main(["--out", str(tmp_path / "out.json"), "gelu"]) == code
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["what"] == "lowered by the vendor's compilers; neither computed on a CPU nor run on an NPU"
    assert document["versions"]["triton-ascend"] == "3.2.0"
    assert document["not_computed"] == "apt packages are missing: mlir-19-tools"
    assert document["lowered"] == [row]


@pytest.fixture(scope="module")
def controls():
    if Tools.found(ascend_ir.cache_directory()) is None:
        pytest.skip("needs the compilers that `make validate-ascend` fetches")
    if ascend_ir.missing_cpu_tools():
        pytest.skip(f"needs {', '.join(ascend_ir.missing_cpu_tools())}")
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(Path(__file__).with_name("ascend_controls.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_a_kernel_is_lowered(controls):
    assert [row["kernel"] for row in controls["lowered"]] == ["relative_l1_kernel", "add_partials_kernel"]
    for row in controls["lowered"]:
        assert row["status"] == "fits"
        assert 0 < row["ub_bits"] <= ascend_ir.UNIFIED_BUFFER
        assert row["by_row"] == 0


def test_a_tile_that_does_not_fit_is_seen(controls):
    assert controls["overflow"][0]["status"] == "overflow"
    assert controls["overflow"][0]["ub_bits"] > ascend_ir.UNIFIED_BUFFER


def test_a_kernel_is_computed(controls):
    (row,) = controls["computed"]
    assert row["status"] == "passed"
    assert row["kernels"] == "add_partials_kernel relative_l1_kernel"
    assert 0 < row["worst"] <= 1


def test_a_wrong_kernel_is_seen(controls):
    (row,) = controls["wrong"]
    assert row["status"] == "failed"
    assert "off by" in row["problem"]
