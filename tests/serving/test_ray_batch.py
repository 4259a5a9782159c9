"""Batches on several workers, with a real Ray: the same pictures, and no row is lost when a worker is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loopback
import numpy as np
import pytest
from PIL import Image

from omni_runtime import Omni
from omni_runtime.serving.batch import read, run
from omni_runtime.serving.ray_batch import ATTEMPTS
from omni_runtime.serving.results import FILE

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces"),
    pytest.mark.skipif(bool(loopback.missing()), reason=loopback.missing() or "-"),
]
pytest.importorskip("ray")

SMALL = {"height": 32, "width": 32, "num_inference_steps": 20}
WORKER = "ray::MapWorker"
SECONDS = 300


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    prompts = [{"id": f"r{number}", "prompt": f"a cat and {number} dogs"} for number in range(16)]
    prompts[3] |= {"cache_backend": "velocity_cache", "cache_config": {"speedup": 2}}
    prompts[4] |= {"sigmas": ["none"]}  # it fails
    path.write_text("\n".join(map(json.dumps, prompts)))
    return path


def command(rows: Path, model: Path, out: Path, *more: str) -> list[str]:
    words = ["-m", "omni_runtime.cli", "batch", str(rows), "--model", str(model), "--out", str(out), "--workers", "2"]
    return [*words, "--size", "32", "--steps", "20", *more]


def lines(out: Path) -> list[dict[str, Any]]:
    path = out / FILE
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("\n")]


def wait_for(there: Callable[[], Any], process: "subprocess.Popen[str]", folder: Path) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := there()):
        assert process.poll() is None, (folder / "err.txt").read_text()
        assert time.monotonic() < end, (folder / "err.txt").read_text()
        time.sleep(0.1)
    return found


def assert_complete(out: Path, rows: Path, model: Path, tmp_path: Path) -> None:
    """All rows are there, once each, in order, with the pictures that one worker makes."""
    records = lines(out)
    assert [record["id"] for record in records] == [f"r{number}" for number in range(16)]
    assert [record["id"] for record in records if "error" in record] == ["r4"]
    with Omni(model, cache_backend=None) as omni:
        run(read(rows, omni, SMALL), tmp_path / "alone", omni)
    for record, alone in zip(records, lines(tmp_path / "alone"), strict=True):
        assert record["seed"] == alone["seed"]
        for name in record.get("files", ()):
            made, expected = (np.asarray(Image.open(folder / name)).astype(int) for folder in (out, tmp_path / "alone"))
            assert abs(made - expected).max() <= 1, name
        assert {key: record.get(key) for key in ("computed", "skipped")} == {
            key: alone.get(key) for key in ("computed", "skipped")
        }


def test_a_worker_that_is_killed_loses_no_row_and_changes_no_picture(
    rows: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    out, model = tmp_path / "out", saved["qwen_image"]
    process = loopback.start(command(rows, model, out), tmp_path)
    try:
        wait_for(lambda: len(lines(out)) >= 3, process, tmp_path)
        workers = loopback.processes_of(process.pid, WORKER)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        assert process.wait(SECONDS) == 3, "one row has an error"
    finally:
        loopback.end(process)
    assert "16 rows are done, 1 of them with an error" in (tmp_path / "out.txt").read_text()
    assert_complete(out, rows, model, tmp_path)


@pytest.mark.long
def test_a_batch_that_is_interrupted_or_killed_goes_on_where_it_was(
    rows: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    out, model = tmp_path / "out", saved["qwen_image"]
    done: list[dict[str, Any]] = []
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = loopback.start(command(rows, model, out), tmp_path)
        before = len(done)
        try:
            wait_for(lambda before=before: len(lines(out)) >= before + 3, process, tmp_path)
            process.send_signal(number)
            assert process.wait(SECONDS) == code, (tmp_path / "err.txt").read_text()
        finally:
            loopback.end(process)
        now = lines(out)
        assert [record for record in done if record not in now] == [], "nothing was made twice"
        done = now
        if number == signal.SIGINT:
            words = f"interrupted; {len(done)} of 16 rows are done, and kept in {out}; run the same command to continue"
            assert words in (tmp_path / "err.txt").read_text()
    process = loopback.start(command(rows, model, out), tmp_path)
    assert process.wait(SECONDS) == 3
    assert [record for record in done if record not in lines(out)] == []
    assert_complete(out, rows, model, tmp_path)


@pytest.mark.long
def test_all_workers_may_be_killed_one_after_the_other(rows: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    out, model = tmp_path / "out", saved["qwen_image"]
    process = loopback.start(command(rows, model, out, "--in-flight", "3"), tmp_path)
    try:
        for least in (2, 7):
            wait_for(lambda least=least: len(lines(out)) >= least, process, tmp_path)
            for worker in loopback.processes_of(process.pid, WORKER):
                os.kill(worker, signal.SIGKILL)
        assert process.wait(SECONDS) == 3
    finally:
        loopback.end(process)
    assert_complete(out, rows, model, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("deadly", "why"), [("deadly", ""), ("device", ": the device failed: CUDA error")])
def test_a_row_that_ends_its_worker_each_time_fails_and_takes_no_other_along(
    saved: dict[str, Path], tmp_path: Path, deadly: str, why: str
) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    ids = [*(f"r{number}" for number in range(6)), deadly, *(f"r{number}" for number in range(6, 12))]
    path.write_text("\n".join(json.dumps({"id": id, "prompt": id}) for id in ids))
    process = loopback.start(["-m", "deadly", str(path), str(saved["qwen_image"]), str(out)], tmp_path)
    try:
        assert process.wait(SECONDS) == 0, (tmp_path / "err.txt").read_text()
    finally:
        loopback.end(process)
    records = {record["id"]: record for record in lines(out)}
    assert list(records) == ids
    failed = records.pop(deadly)
    assert failed["error"] == "WorkerDiedError"
    assert failed["message"].startswith(f"its worker ended {ATTEMPTS} times while it made this row{why}")
    assert not any("error" in record for record in records.values())
