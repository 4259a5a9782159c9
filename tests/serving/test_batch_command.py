"""`omni batch`: its exit codes, what it prints, and how options and rows go together."""

import json
from pathlib import Path
from typing import Any

import pytest

from omni_runtime import cli, files
from omni_runtime.generation.result import read_settings
from omni_runtime.serving import local_ray
from omni_runtime.serving.results import FILE, Made, Results
from omni_runtime.serving.worker import Worker

CAT, DOG = {"id": "cat", "prompt": "a cat"}, {"id": "dog", "prompt": "a dog"}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSION_CACHE_BACKEND", raising=False)


@pytest.fixture
def batch(saved: dict[str, Path], tmp_path: Path) -> Any:
    """Runs the command on rows, and returns its exit code."""

    def run(*rows: Any, options: tuple[Any, ...] = ()) -> int:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        words = ["batch", path, "--model", saved["qwen_image"], "--size", 32, "--steps", 3, "--out", tmp_path / "out"]
        return cli.main([str(word) for word in (*words, *options)])

    return run


def test_it_writes_pictures_and_says_how_many(batch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(CAT, DOG | {"width": 48}) == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 rows are done; 2 in ")
    assert out.endswith(f"{tmp_path / 'out' / FILE}\n")
    assert "2 of 2: " in err
    assert read_settings(tmp_path / "out" / "dog.png")["width"] == 48, "a row comes before the options"
    assert read_settings(tmp_path / "out" / "cat.png")["num_inference_steps"] == 3
    assert batch(CAT, DOG | {"width": 48}, options=("--json", "--quiet")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    told = json.loads(out)
    assert (told["rows"], told["found"], told["made"], told["failed"]) == (2, 2, 0, 0)


def test_other_options_make_other_pictures(batch: Any, tmp_path: Path) -> None:
    assert batch(CAT) == 0
    assert batch(CAT, options=("--cache-backend", "velocity_cache", "--seed", 5)) == 0
    settings = read_settings(tmp_path / "out" / "cat.png")
    assert (settings["cache_backend"], settings["seed"]) == ("velocity_cache", 5)


def test_a_row_that_fails_gives_another_exit_code(
    batch: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Worker._made

    def failing(self: Any, row: Any, alone: bool) -> Any:
        if row.id == "dog":
            return Made(row.id, 0.1, {"error": "ValueError", "message": "no\ndogs"})
        return make(self, row, alone)

    monkeypatch.setattr(Worker, "_made", failing)
    assert batch(CAT, DOG) == 3
    out, err = capsys.readouterr()
    assert "line 2 (dog): ValueError: no dogs\n" in err
    assert "2 rows are done, 1 of them with an error (--retry-failed makes them again)" in out
    assert batch(CAT, DOG) == 3
    monkeypatch.setattr(Worker, "_made", make)
    assert batch(CAT, DOG, options=("--retry-failed",)) == 0


def test_wrong_rows_are_told_before_anything_is_loaded_or_written(
    batch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(CAT, {"prompt": "a dog", "steps": 4}) == 2
    assert "line 2: QwenImagePipeline takes no 'steps'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert batch(CAT, options=("--cache-backend", "unknown")) == 2
    assert batch(CAT, options=("--out", tmp_path / "rows.jsonl")) == 2
    assert "is a file: give a directory" in capsys.readouterr().err


def test_a_directory_in_use_is_refused(batch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl")
    results = Results(tmp_path / "out", [])
    assert batch(CAT) == 2
    assert "another batch is writing" in capsys.readouterr().err
    results.close()


def test_ctrl_c_says_what_is_kept(
    batch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Results.keep

    def interrupted(self: Any, row: Any, made: Any) -> Any:
        if self.records:
            raise KeyboardInterrupt
        return keep(self, row, made)

    monkeypatch.setattr(Results, "keep", interrupted)
    assert batch(CAT, DOG) == 130
    err = capsys.readouterr().err
    assert f"interrupted; 1 of 2 rows are done, and kept in {tmp_path / 'out'}; run the same command to continue" in err


def test_a_full_disk_is_told_in_a_line(
    batch: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Any, text: str) -> None:
        raise files.WriteError(28, "No space left on device", path)

    monkeypatch.setattr(files, "append", full)
    assert batch(CAT, DOG) == 1
    assert "No space left on device; 0 of 2 rows are done and kept" in capsys.readouterr().err.splitlines()[-1]


def test_several_workers_need_ray_and_a_device_each(
    batch: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ray, "installed", lambda: True)
    assert batch(CAT, options=("--workers", 2, "--device", "cuda:1")) == 2
    assert "each process has a device of its own: give --device cuda" in capsys.readouterr().err
    monkeypatch.setattr(local_ray, "installed", lambda: False)
    assert batch(CAT, options=("--workers", 2)) == 2
    assert "--workers 2: Ray is not installed: pip install 'omni-kernels[ray]'" in capsys.readouterr().err
