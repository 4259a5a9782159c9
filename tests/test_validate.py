"""`python -m omni_kernels.validate`: what is wrong is noticed and named, and what was not run is not reported."""

import dataclasses
import errno
import json
import os
import re
import shlex
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from omni_kernels import validate
from omni_kernels.ops import OPS
from omni_kernels.validation import aot, checks, measurement, memory, oracle, record, roof
from omni_kernels.validation.cases import CASES
from omni_kernels.validation.layouts import offset
from omni_kernels.validation.tolerances import mismatch
from omni_kernels.validation.uses import USES

CPU = torch.device("cpu")
CHECK = "gelu/3x37x200/float32/contiguous"


@pytest.fixture(autouse=True)
def small_and_plain(monkeypatch):
    """A small copy as the roof; plain torch in place of interpreted kernels, unless a test says otherwise."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(roof.COPY_BYTES, "cpu", 1 << 20)
    roof.copy_bandwidth.cache_clear()
    yield
    roof.copy_bandwidth.cache_clear()


@pytest.fixture
def replace(monkeypatch):
    """Puts something else in an op's place, but where more is asked of it than its one result."""

    def put(op, function):
        right = OPS[op].function

        def either(x, **options):
            return right(x, **options) if options else function(x)

        monkeypatch.setitem(OPS, op, dataclasses.replace(OPS[op], function=either, launcher=either))

    return put


def run(*arguments, out=None):
    return validate.main(["--device", "cpu", *arguments, *(["--out", str(out)] if out else [])])


def document(out):
    return json.loads((out / "validation.json").read_text(encoding="utf-8"))


# What is right


def test_all_right_is_code_0_with_both_files(tmp_path, capsys):
    assert run("--quick", "--ops", "gelu,relative_l1", out=tmp_path) == 0
    found = document(tmp_path)
    assert found["verdict"] == "passed"
    assert {c["op"] for c in found["checks"]} == {"gelu", "relative_l1"}
    assert {c["status"] for c in found["checks"]} == {"passed"}
    assert {c["dtype"] for c in found["checks"]} == {"float32", "float16", "bfloat16"}
    assert {(m["case"], m["provider"]) for m in found["measurements"]} == {
        (case, provider) for case in ("gelu", "gelu int8", "relative_l1") for provider in ("ours", "eager")
    }
    assert all(m["us"] > 0 and m["gb_per_s"] > 0 for m in found["measurements"])
    assert found["machine"]["versions"]["torch"]
    assert found["implementation"] == "plain torch"
    told = capsys.readouterr().out
    assert told.startswith("cpu: ")
    assert "PASSED: 48 passed; copy bandwidth" in told


def test_the_kernels_run_in_the_interpreter_and_have_no_speed(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels were not made for the interpreter in this process")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run("--quick", "--ops", "swiglu", out=tmp_path) == 0
    found = document(tmp_path)
    assert "interpreted" in found["implementation"]
    assert found["copy_gb_per_s"] is None
    assert found["measurements"] == []
    assert "not measured: interpreted kernels are not timed" in (tmp_path / "validation.html").read_text("utf-8")


# What is wrong


def wrong_number(x):
    out = F.gelu(x, approximate="tanh")
    out[1, 2, 3] += 1
    return out


def unwritten(x):
    out = x.new_empty(x.shape)
    out[:-1] = F.gelu(x, approximate="tanh")[:-1]
    return out


def outside(x):
    out = x.new_empty(x.shape).copy_(F.gelu(x, approximate="tanh"))
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
    return out


def into_its_input(x):
    return F.gelu(x, approximate="tanh") + x.zero_()


def of_its_surroundings(x):
    out = F.gelu(x, approximate="tanh")
    out[-1, -1, -1] += 0 * x.as_strided((1,), (1,), x.storage_offset() + x.numel())[0]
    return out


def unsteady(x):
    out = F.gelu(x, approximate="tanh")
    out.view(-1)[0] *= 1 + 2**-23 * unsteady.calls
    unsteady.calls ^= 1
    return out


unsteady.calls = 0


def broken(x):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (wrong_number, "worst at [1, 2, 3]: got "),
        (unwritten, "out: NaN in other places than expected; worst at [2, 0, 0]: got nan, expected "),
        (outside, "wrote outside of its outputs"),
        (into_its_input, "wrote outside of its outputs"),
        (of_its_surroundings, "worst at [2, 36, 199]: got nan"),
        (unsteady, "two runs on the same inputs differ in their bits"),
        (broken, "RuntimeError: no such instruction"),
    ],
)
def test_what_an_op_does_wrong_is_named(replace, capsys, function, told):
    replace("gelu", function)
    assert run("--case", CHECK, "--seed", "3") == 1
    output = capsys.readouterr().out
    assert f"FAILED {CHECK} (seed 3)" in output
    assert told in output
    assert f"python -m omni_kernels.validate --device cpu --case {CHECK} --seed 3" in output


def test_the_command_of_a_failure_repeats_it(replace, tmp_path, monkeypatch):
    def wrong_unless_aligned(x):
        out = F.gelu(x, approximate="tanh")
        if x.storage_offset() % 2:
            out[..., 5] *= 1 + x[..., 5]
        return out

    replace("gelu", wrong_unless_aligned)
    assert run("--quick", "--ops", "gelu", "--seed", "5", out=tmp_path / "first") == 1
    (failed,) = (c for c in document(tmp_path / "first")["checks"] if c["status"] == "failed")
    assert failed["id"] == "gelu/3x37x200/bfloat16/offset"
    assert failed["worst"]["index"][2] == 5
    command = shlex.split(failed["repeat"])
    assert command[:3] == ["python", "-m", "omni_kernels.validate"]
    assert validate.main([*command[3:], "--out", str(tmp_path / "second")]) == 1
    (again,) = document(tmp_path / "second")["checks"]
    assert again["worst"] == failed["worst"]


def test_a_command_says_that_kernels_were_interpreted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert validate.repeat(checks.parse(CHECK), CPU, 0).startswith("TRITON_INTERPRET=1 python -m")


@pytest.mark.parametrize("name", USES)
def test_one_wrong_element_of_any_result_is_noticed(name):
    check = checks.Check(USES[name], checks.ODD, "contiguous")
    right = OPS[check.use.op].function
    with torch.no_grad():
        assert checks.run(check, lambda op: right, CPU, 0) == []

        def wrong(*args, **kwargs):
            result = right(*args, **kwargs)
            places = [kwargs[j] if isinstance(j, str) else args[j] for j in check.use.places]
            results = places or (result if isinstance(result, tuple) else [result])
            last = [t for t in results if t is not None][-1]
            if last.dtype == torch.float8_e8m0fnu:  # the last places of its tiles are not used
                last.view(torch.uint8)[0] += 1
            else:
                last.select(-1, -1).select(-1, -1).add_(1)
            return result

        (problem,) = checks.run(check, lambda op: wrong, CPU, 0)
        assert "off by up to" in problem.reason


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_tables_rotate_as_the_angles_that_they_are_of(layout):
    q, k, v = torch.randn(3, 2, 5, 3, 8).unbind()
    freqs = torch.randn(5, 4, 2)
    cos, sin = (t.repeat_interleave(2, -1) if layout == "interleaved" else t.repeat(1, 2) for t in freqs.unbind(-1))
    by_tables = oracle.expected("qk_norm_rope", [], q, k, v, layout=layout, cos=cos, sin=sin)
    by_angles = oracle.expected("qk_norm_rope", [], q, k, v, layout=layout, freqs=freqs)
    for one, other in zip(by_tables, by_angles, strict=True):
        assert torch.equal(one[1], other[1])


def test_nothing_is_timed_where_results_are_wrong(replace, tmp_path, monkeypatch):
    replace("gelu", wrong_number)
    monkeypatch.setattr(measurement, "median_seconds", lambda *_: pytest.fail("timed"))
    assert run("--quick", "--ops", "gelu", out=tmp_path) == 1
    found = document(tmp_path)
    assert found["measurements"] == []
    assert found["not_measured"] == "gelu, whose results are wrong"


def test_after_a_lost_device_nothing_is_run(replace, tmp_path, monkeypatch):
    replace("gelu", broken)
    monkeypatch.setattr(validate, "_lost", lambda device: "the device was lost: gone")
    assert run("--quick", "--ops", "gelu", out=tmp_path) == 1
    found = document(tmp_path)
    assert [c["status"] for c in found["checks"]] == ["failed"] + ["not run"] * 39
    assert found["copy_gb_per_s"] is None


def test_what_there_was_no_time_for_is_not_reported(tmp_path, capsys):
    assert run("--ops", "gelu", "--minutes", "0", out=tmp_path) == 1
    found = document(tmp_path)
    assert {c["status"] for c in found["checks"]} == {"not run"}
    assert found["measurements"] == []
    told = capsys.readouterr().out
    assert "never checked: gelu" in told
    assert "not measured" in told


def test_what_first_calls_wait_for_is_told(replace, tmp_path, capsys):
    triton = pytest.importorskip("triton")

    def compiled_first(x):
        if told:
            times = SimpleNamespace(total=told.pop() * 1e6)
            triton.knobs.compilation.listener(src=SimpleNamespace(name="gelu_kernel"), times=times, cache_hit=False)
        return F.gelu(x, approximate="tanh")

    told = [1.5, 0.25, 0.75]
    replace("gelu", compiled_first)
    assert run("--quick", "--ops", "gelu", out=tmp_path) == 0
    assert document(tmp_path)["first_calls"] == {"gelu_kernel": [0.75, 0.25, 1.5]}
    assert re.search(r"gelu_kernel +3 +0\.75 +2\.5", capsys.readouterr().out)
    assert "<td>gelu_kernel</td>" in (tmp_path / "validation.html").read_text()


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ops", "gleu"], "did you mean gelu?"),
        (["--ops", ","], "no names are given"),
        (["--case", "gelu"], "the form is use/BxSxD/dtype/layout"),
        (["--case", "gelu/2x3x4/int8/offset"], "'int8' is not one of"),
        (["--case", "qk_norm_rope/2x3x5/float32/offset"], "has no inputs of 5 channels"),
        (["--targets", "sm_90"], "--targets goes with --compile-only"),
        (["--compile-only", "--targets", "sm_1"], "--targets: 'sm_1' is unknown"),
        (["--device", "tpu"], "'tpu' is not one of cuda, npu, cpu"),
    ],
)
def test_wrong_usage_is_code_2(capsys, arguments, told):
    with pytest.raises(SystemExit) as ended:
        validate.main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "validation.json"
    record.write(path, {"a": 1})
    before = path.read_text()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            record.write(path, {"a": 2})
    assert path.read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    record.write(path, {"a": 2})
    assert path.read_text() != before


def test_no_such_device_is_code_3(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert validate.main(["--device", "cuda"]) == 3
    assert "there is no device 'cuda' here" in capsys.readouterr().err


def test_a_gpu_is_found_before_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert validate.find_device(None) == torch.device("cuda")
    assert validate.find_device("cuda:1") == torch.device("cuda:1")
    assert validate.find_device("cuda:2") is None
    assert validate.find_device("cpu") == CPU


def test_every_check_has_an_id_that_makes_it_again():
    wanted = checks.plan(OPS, divisor=16, quick=False)
    assert {c.use.op for c in wanted} == set(OPS) == set(oracle.ORACLES)
    assert len({c.id for c in wanted}) == len(wanted)
    for check in wanted:
        again = checks.parse(check.id)
        assert (again.use, again.shape.size, again.shape.dtype, again.layout) == (
            check.use,
            check.shape.size,
            check.shape.dtype,
            check.layout,
        )


def test_every_op_is_checked_in_every_dtype_first_and_at_every_model():
    quick = checks.plan(OPS, divisor=1, quick=True)
    first = quick[: 3 * len(USES)]
    assert {(c.use.name, c.dtype) for c in first} == {(use, dtype) for use in USES for dtype in checks.DTYPES}
    whole = checks.plan(OPS, divisor=1, quick=False)
    assert set(quick) <= set(whole)
    for model in checks.MODELS:
        at = {(c.use.name, c.dtype) for c in whole if c.shape.size == model.size}
        assert at == {(use, dtype) for use in USES for dtype in checks.DTYPES}


# How it is seen


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("size", [(2, 5, 24), (2, 5, 3, 8)])
def test_layouts_hold_the_same_numbers(layout, size):
    t = torch.randn(size)
    assert torch.equal(checks.LAYOUTS[layout](t), t)
    assert torch.equal(memory.Placed(checks.LAYOUTS[layout](t)).view, t)


def test_a_placed_tensor_keeps_strides_and_alignment():
    t = offset(torch.randn(2, 5, 24, dtype=torch.float16))
    placed = memory.Placed(t).view
    assert placed.stride() == t.stride()
    assert placed.data_ptr() % 16 == 2


@pytest.mark.parametrize("written", [False, True])
def test_a_change_in_a_gap_is_seen(written):
    placed = memory.Placed(torch.randn(2, 8, 24)[:, :5], written=written)
    assert placed.untouched()
    if written:
        placed.view.fill_(1.0)
        assert placed.untouched()
    placed.view.as_strided((1,), (1,), placed.view.storage_offset() + 5 * 24).fill_(7.0)
    assert not placed.untouched()


def test_a_mismatch_names_the_worst_element():
    expected = torch.ones(2, 3, dtype=torch.float64)
    got = expected.float()
    assert mismatch(got, expected) is None
    got[0, 1], got[1, 2] = 1.01, 1.5
    found = mismatch(got, expected)
    assert (found.index, found.got, found.expected) == ((1, 2), 1.5, 1.0)
    assert found.times > 1
    got[0, 0] = float("nan")
    assert mismatch(got, expected).index == (0, 0)
    assert "shape [3], expected [2, 3]" in str(mismatch(torch.ones(3), expected))


class Page(HTMLParser):
    """Checks that elements end in the order in which they began, and keeps what they refer to."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_fetches_nothing_and_shows_the_failure(replace, tmp_path):
    def raises(x):
        raise RuntimeError("<script>alert(1)</script>")

    replace("gelu", raises)
    assert run("--quick", "--ops", "gelu,swiglu", out=tmp_path) == 1
    text = (tmp_path / "validation.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert "--case gelu/3x37x200/float32/contiguous" in text
    assert "gelu, whose results are wrong" in text
    assert document(tmp_path)["machine"]["name"] in text


# Without a device


def test_kernels_are_compiled_without_a_device(tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert validate.main(["--compile-only", "--ops", "swiglu", "--targets", "sm_90", "--out", str(tmp_path)]) == 0
    found = document(tmp_path)
    assert "swiglu packed" in [row["launch"] for row in found["compiled"]]
    for row in found["compiled"]:
        assert (row["launch"].split()[0], row["target"]) == ("swiglu", "sm_90")
        assert row["registers"] > 0
        assert (row["spills"], row["error"]) == (0, None)
    assert found["copy_gb_per_s"] is None
    assert found["checks"] == found["measurements"] == []
    assert {*found["first_calls"]} == {"swiglu_kernel", "quantize_kernel"}
    assert all(0.01 < each < 60 for seconds in found["first_calls"].values() for each in seconds)
    assert "not measured: the kernels were compiled, not run" in capsys.readouterr().out


def test_a_kernel_that_spills_or_cannot_be_compiled_fails(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    costs = [aot.Cost("a_kernel", 255, spills, 0, {}, {}, [], []) for spills in (0, 64)]
    results = [
        aot.Result("gelu odd", "sm_90", costs[:1]),
        aot.Result("gelu batch", "sm_90", costs[1:]),
        aot.Result("gelu batch", "gfx942", [], "CompilationError: no"),
    ]
    monkeypatch.setattr(aot, "compiled", lambda targets, names: iter(results))
    assert validate.main(["--compile-only", "--ops", "gelu", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "FAILED gelu batch for sm_90\n  spills registers to memory" in told
    assert "FAILED gelu batch for gfx942\n  CompilationError: no" in told


def test_without_triton_there_is_nothing_to_compile(monkeypatch, capsys):
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    assert validate.main(["--compile-only"]) == 3
    assert "Triton is not installed" in capsys.readouterr().err


def test_cases_that_are_timed_are_checked():
    assert set(CASES) <= set(USES)
