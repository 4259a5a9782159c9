"""Tiles by device: what is tried, what is kept of it, and what a launcher then takes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_kernels import tune
from omni_kernels.device import Device, pretend
from omni_kernels.ops import OPS, _tiles
from omni_kernels.validation.cases import CASES
from omni_kernels.validation.interpreter import correct
from omni_kernels.validation.shapes import Shape
from omni_kernels.validation.tolerances import mismatch

CPU = torch.device("cpu")
SMALL = Shape("small", 2, 5, 192, torch.float32)


@pytest.mark.parametrize("op", tune.TUNABLE)
def test_each_tile_computes_the_same(op: str) -> None:
    """Interpreted where Triton's interpreter is on; a launcher that asked nobody for its tile would see none."""
    pytest.importorskip("triton")
    case = next(case for case in CASES.values() if case.op == op)
    inputs = case.inputs(SMALL, CPU)
    args, kwargs = case.ours(inputs)

    def launched() -> list[torch.Tensor]:
        made = OPS[op].launcher(*args, **kwargs)
        written = [args[place] for place in case.places] or (made if isinstance(made, tuple) else [made])
        return [t.clone() for t in written if t is not None]

    expected = launched()
    for tile in (512, *tune.CANDIDATES):
        with _tiles.trying(op, tile):
            for one, other in zip(launched(), expected, strict=True):
                assert mismatch(one, other.double()) is None


def test_ops_that_sum_over_a_sample_are_left_alone() -> None:
    assert set(OPS) - set(tune.TUNABLE) == {
        "relative_l1",
        "residual_relative_l1",
        "modulated_relative_l1",
        "scaled_mm",  # a product: its tile decides what is in shared memory
    }
    assert {case.op for case, _, _ in tune.trials(tune.TUNABLE)} == set(tune.TUNABLE)


def timing(saved: dict[int, float], op: str) -> Any:
    """A clock by which tiles save so much of a second; it sees which tile is being tried."""
    return lambda calls, device, rounds: 1.0 - saved.get(_tiles._tried[op][0], 0.0)


def test_only_what_saves_enough_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    launched("gelu", monkeypatch)
    case = CASES["gelu"]
    found = tune.faster(case, SMALL, [1024, 2048], CPU, timing({1024: 0.04, 2048: 0.06}, "gelu"))
    assert found is not None
    assert (found["tile"], found["own_tile"], found["us"], found["own_us"]) == (2048, 4096, 0.94e6, 1e6)
    assert tune.saves(found)
    found = tune.faster(case, SMALL, [1024, 2048], CPU, timing({1024: 0.04, 2048: 0.049}, "gelu"))
    assert found is not None
    assert not tune.saves(found)
    assert not _tiles._tried


@pytest.mark.parametrize("op", tune.TUNABLE)
def test_what_is_written_is_what_a_launcher_asks_by(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The channels of the very tensor, be it of heads; and nothing of a use that asks for no tile."""
    launched(op, monkeypatch)
    asked = []
    original = _tiles.tile
    monkeypatch.setattr(
        _tiles, "tile", lambda name, t, own: asked.append((name, t.shape[-1])) or original(name, t, own)
    )
    for case in (case for case in CASES.values() if case.op == op and case.fits(SMALL)):
        asked.clear()
        found = tune.faster(case, SMALL, [1024], CPU, lambda calls, device, rounds: 1.0)
        own = [channels for name, channels in asked if name == op]
        assert (found is None) == (not own)
        assert found is None or found["channels"] == own[0]


def launched(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the op's launcher run on the CPU, too, by Triton's interpreter."""
    pytest.importorskip("triton")
    correct()
    monkeypatch.setitem(OPS, op, dataclasses.replace(OPS[op], function=OPS[op].launcher))


def test_uses_of_one_op_must_agree() -> None:
    def row(op: str, tile: int, us: float, channels: int = 3072) -> dict[str, Any]:
        return {"op": op, "channels": channels, "dtype": "bfloat16", "tile": tile, "us": us, "own_us": 10.0}

    rows = [row("a", 1024, 9.0), row("a", 1024, 8.0), row("b", 1024, 8.0), row("b", 2048, 8.0), row("a", 8192, 7.0, 64)]
    assert tune.agreed(rows) == [rows[0], rows[4]]
    assert tune.agreed([*rows, row("a", 1024, 9.9)]) == [rows[4]], "one of three uses is no faster"


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_tiles, "TUNED", tmp_path)
    rows = [
        {"op": "gelu", "dtype": "bfloat16", "channels": 3072, "tile": 8192},
        {"op": "gelu", "dtype": "bfloat16", "channels": 64, "tile": 1024},
    ]
    for name in ("A GPU", "Another GPU"):
        document = {"machine": {"name": name}, "rows": rows if name == "A GPU" else []}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    _tiles._tuned.cache_clear()
    yield tmp_path
    _tiles._tuned.cache_clear()


class OnGpu:
    """As much of a GPU's tensor as is asked for its tile."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, channels: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (1, 5, channels), dtype


@pytest.mark.usefixtures("tuned")
def test_a_device_takes_what_was_measured_on_its_like() -> None:
    with pretend("cuda", Device("nvidia", "sm_90", "A GPU")):
        assert _tiles.tile("gelu", OnGpu(3072), 4096) == 8192
        assert _tiles.tile("gelu", OnGpu(2000), 4096) == 8192
        assert _tiles.tile("gelu", OnGpu(100), 4096) == 1024
        assert _tiles.tile("gelu", OnGpu(3072, torch.float32), 4096) == 4096, "another dtype"
        assert _tiles.tile("swiglu", OnGpu(3072), 2048) == 2048, "another op"
    _tiles._tuned.cache_clear()
    with pretend("cuda", Device("nvidia", "sm_90", "Another GPU")):
        assert _tiles.tile("gelu", OnGpu(3072), 4096) == 4096
    assert _tiles.tile("gelu", torch.empty(1, 5, 3072), 4096) == 4096


def test_shipped_files_are_of_launches_that_are_compiled() -> None:
    """None yet: what is tuned is to be among `omni_kernels.validation.launches`."""
    assert [path.name for path in _tiles.TUNED.glob("*.json")] == []


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "device_count", lambda kind: 0)
    assert tune.main([]) == tune.NO_DEVICE
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("ops", ["relative_l1", "no_such_op"])
def test_an_op_without_a_tile_to_choose_is_refused(ops: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--ops", ops])
    assert f"{ops!r} has no tunable tile" in capsys.readouterr().err
