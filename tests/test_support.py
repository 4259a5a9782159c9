"""The table of docs/results.md of what is known of each op: from files alone, and as they are."""

import json
from pathlib import Path

import pytest

from benchmarks import support
from omni_kernels.ops import OPS


def rows(directory: Path) -> dict[str, list[str]]:
    """The cells of each op's line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in support.table(directory).splitlines()]
    assert lines[0] == ["op", "NVIDIA", "AMD", "Ascend"]
    assert {len(line) for line in lines} == {4}
    return {line[0].strip("`"): line[1:] for line in lines[2:]}


def test_without_files_nothing_is_claimed(tmp_path: Path) -> None:
    assert rows(tmp_path) == {op: ["not covered"] * 3 for op in OPS}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    measured = {"provider": "ours", "case": "gelu", "us": 1.0}
    document = {
        "date": "2026-03-01T10:00:00+00:00",
        "machine": {"name": "NVIDIA H200", "vendor": "nvidia"},
        "copy_gb_per_s": 4000.0,
        "rows": [
            measured | {"bytes": 1000, "gb_per_s": 50.0, "share": 0.01},
            measured | {"bytes": 9000, "gb_per_s": 3600.4, "share": 0.9},
            measured | {"bytes": 9999, "gb_per_s": 4444.0, "share": 1.1, "provider": "eager"},
            {"provider": "ours", "case": "swiglu", "bytes": 9, "us": None, "gb_per_s": None, "share": None},
        ],
    }
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(document))
    # A processor's own file says nothing of a vendor's devices.
    (tmp_path / "cpu.json").write_text(json.dumps(document | {"machine": {"name": "CPU", "vendor": "cpu"}}))
    ascend = {
        "targets": ["Ascend910B1"],
        "support": [{"op": "gelu", "support": "computed on a CPU from the vendor's IR"}],
    }
    (tmp_path / "ascend-lowering.json").write_text(json.dumps(ascend))
    lines = ["# triton 3", "launch,target,kernel", "gelu odd,sm_90,k", "gelu batch,sm_90,k", "swiglu odd,sm_80,k"]
    lines += ["swiglu odd,sm_90,k", "swiglu packed,sm_80,k"]
    (tmp_path / "kernels.csv").write_text("\n".join([*lines, "swiglu odd,gfx942,k\n"]))
    return tmp_path


def test_a_cell_says_the_most_that_a_file_shows(results: Path) -> None:
    found = rows(results)
    assert found["gelu"] == [
        "NVIDIA H200, 2026-03-01: 3600 GB/s, 90%",
        "not covered",
        "computed on a CPU from the vendor's IR (910B1)",
    ]
    assert found["swiglu"] == ["compiled: sm_80", "compiled: gfx942", "not covered"]
    assert found["rms_norm"] == ["not covered"] * 3


def test_each_device_is_told(results: Path) -> None:
    document = json.loads((results / "nvidia-h200.json").read_text())
    document["machine"]["name"] = "NVIDIA L40S"
    (results / "validation-nvidia-l40s.json").write_text(
        json.dumps(document | {"measurements": document["rows"], "rows": []})
    )
    told = rows(results)["gelu"][0]
    assert told == "NVIDIA H200, 2026-03-01: 3600 GB/s, 90%; NVIDIA L40S, 2026-03-01: 3600 GB/s, 90%"


def test_the_page_of_results_has_the_table_of_the_files() -> None:
    text = support.PAGE.read_text(encoding="utf-8")
    assert text == support.written(text, support.table()), f"made again by `{support.COMMAND}`"


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no"):
        support.written("# Title\n", "table")
