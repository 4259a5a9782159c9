"""Batches on one worker: the pictures, what is made again after an interruption, and rows that fail."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from omni_runtime import Omni, files
from omni_runtime.generation.result import read_settings
from omni_runtime.serving.batch import Summary, read, run
from omni_runtime.serving.engine import Engine
from omni_runtime.serving.jobs import CancelledError, DeviceFailedError
from omni_runtime.serving.results import FILE, BusyError, Results
from omni_runtime.serving.worker import Worker, _Room

SMALL = {"height": 32, "width": 32, "num_inference_steps": 3}
ROWS = [
    {"id": "cat", "prompt": "a cat", "negative_prompt": " "},
    {"id": "dog", "prompt": "a dog in the grass", "num_inference_steps": 4},
    {"id": "bird", "prompt": "a bird", "cache_backend": "velocity_cache", "cache_config": {"speedup": 2}},
    {"id": "fish", "prompt": "a fish", "num_images_per_prompt": 2},
    {"id": "fox", "prompt": "a fox", "width": 48},
]


@pytest.fixture
def omni() -> Iterator[Omni]:
    with Omni(tiny.qwen_image(layers=2), cache_backend=None) as made:
        yield made


def make(folder: Path, omni: Omni, rows: Any = ROWS, **more: Any) -> Summary:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return run(read(path, omni, SMALL), folder / "out", omni, **more)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "out" / FILE).read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def made_again(folder: Path, omni: Omni, rows: Any = ROWS, **more: Any) -> list[str]:
    """The ids of the rows that another run makes."""
    made: list[str] = []
    make(folder, omni, rows, listener=lambda row, record: made.append(row.id), **more)
    return sorted(made)


def test_pictures_are_those_of_generate(tmp_path: Path, omni: Omni) -> None:
    assert make(tmp_path, omni, in_flight=3)[:4] == (5, 0, 5, 0)
    for row in ROWS:
        record = records(tmp_path)[row["id"]]
        arguments = SMALL | {
            key: value for key, value in row.items() if key not in ("id", "cache_backend", "cache_config")
        }
        with Omni(
            tiny.qwen_image(layers=2), cache_backend=row.get("cache_backend"), cache_config=row.get("cache_config")
        ) as one:
            (result,) = one.generate(seed=record["seed"], **arguments)
        assert len(record["files"]) == len(result.images)
        for name, image in zip(record["files"], result.images, strict=True):
            assert abs(pixels(tmp_path / "out" / name) - np.asarray(image)).max() <= 1
            assert read_settings(tmp_path / "out" / name)["seed"] == record["seed"]


def test_one_in_flight_gives_the_bits_of_generate(tmp_path: Path, omni: Omni) -> None:
    make(tmp_path, omni, ROWS[:2], in_flight=1)
    for row in ROWS[:2]:
        record = records(tmp_path)[row["id"]]
        (result,) = omni.generate(seed=record["seed"], **SMALL | {key: row[key] for key in row if key != "id"})
        assert (pixels(tmp_path / "out" / record["files"][0]) == np.asarray(result.images[0])).all()


def test_a_line_tells_what_was_made(tmp_path: Path, omni: Omni) -> None:
    make(tmp_path, omni)
    lines = records(tmp_path)
    assert list(lines) == [row["id"] for row in ROWS], "in the order of the rows"
    bird = lines["bird"]
    assert (bird["line"], bird["prompt"], bird["files"]) == (3, "a bird", ["bird.png"])
    assert (bird["steps"], bird["computed"] + bird["skipped"], bird["cache_backend"]) == (3, 3, "velocity_cache")
    assert bird["skipped"] > 0
    assert (lines["cat"]["computed"], lines["cat"]["skipped"]) == (3, 0)
    assert lines["cat"]["seconds"] > 0
    assert lines["fish"]["files"] == ["fish.png", "fish.2.png"]


# Going on


def test_what_is_made_is_not_made_again(tmp_path: Path, omni: Omni) -> None:
    make(tmp_path, omni)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make(tmp_path, omni) == Summary(5, 5, 0, 0, 0.0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert made_again(tmp_path, omni, ROWS[:2], fresh=True) == ["cat", "dog"]


def test_a_damaged_or_missing_file_and_a_missing_line_are_made_again(tmp_path: Path, omni: Omni) -> None:
    make(tmp_path, omni)
    out = tmp_path / "out"
    whole = (out / "dog.png").read_bytes()
    (out / "dog.png").write_bytes(whole[:-9])
    (out / "fish.2.png").unlink()
    kept = [line for line in (out / FILE).read_text().splitlines() if '"fox"' not in line]
    (out / FILE).write_text("\n".join(kept) + "\n")
    assert made_again(tmp_path, omni, in_flight=1) == ["dog", "fish", "fox"]
    assert (pixels(out / "dog.png") >= 0).all()
    assert list(records(tmp_path)) == [row["id"] for row in ROWS]


def test_a_changed_row_is_made_again_and_leaves_nothing_of_the_former_one(tmp_path: Path, omni: Omni) -> None:
    make(tmp_path, omni, ROWS[2:4])
    changed = [ROWS[2], ROWS[3] | {"num_images_per_prompt": 1}]
    assert made_again(tmp_path, omni, changed) == ["fish"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bird.png", "fish.png", FILE]


def test_lines_of_rows_that_are_gone_stay_at_the_end(tmp_path: Path, omni: Omni) -> None:
    make(tmp_path, omni, ROWS[:2])
    make(tmp_path, omni, [ROWS[4], ROWS[1]])
    assert list(records(tmp_path)) == ["fox", "dog", "cat"]
    assert records(tmp_path)["dog"]["line"] == 2


def test_an_interruption_keeps_what_was_made(tmp_path: Path, omni: Omni) -> None:
    def stop(row: Any, record: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, omni, listener=stop, in_flight=2)
    first = records(tmp_path)
    assert len(first) == 1
    assert omni.generate("a cat", **SMALL), "the engine was closed"
    (again,) = {"cat", "dog", "bird", "fish", "fox"} & first.keys()
    assert again not in made_again(tmp_path, omni)
    assert records(tmp_path)[again] == first[again]


def test_a_full_disk_stops_with_what_was_kept(tmp_path: Path, omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = files.write, []

    def full(path: Any, content: Any) -> None:
        if str(path).endswith(".png"):
            if len(written) == 2:
                raise files.WriteError(28, "No space left on device", path)
            written.append(path)
        write(path, content)

    rows = [*(row for row in ROWS if row["id"] != "fish"), {"id": "owl", "prompt": "an owl"}]
    monkeypatch.setattr(files, "write", full)
    with pytest.raises(files.WriteError, match="No space left on device; 2 of 5 rows are done and kept"):
        make(tmp_path, omni, rows)
    assert len(records(tmp_path)) == 2
    monkeypatch.setattr(files, "write", write)
    assert len(made_again(tmp_path, omni, rows)) == 3


def test_a_line_that_was_cut_off_is_dropped_and_damaged_lines_are_set_aside(tmp_path: Path, omni: Omni) -> None:
    make(tmp_path, omni, ROWS[:3])
    path = tmp_path / "out" / FILE
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert made_again(tmp_path, omni, ROWS[:3]) == ["bird"]
    path.write_text("nonsense\n" + whole)
    with pytest.warns(files.DamagedFileWarning, match="1 of its lines cannot be read"):
        assert made_again(tmp_path, omni, ROWS[:3]) == []
    assert path.with_name(f"{FILE}.damaged").read_text().startswith("nonsense")
    assert list(records(tmp_path)) == ["cat", "dog", "bird"]


def test_half_a_file_of_a_killed_batch_is_removed(tmp_path: Path, omni: Omni) -> None:
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / ".omni-999999999-0a1b2c3d.tmp"
    left.write_bytes(b"half")
    make(tmp_path, omni, ROWS[:1])
    assert not left.exists()


def test_two_batches_do_not_write_to_one_directory(tmp_path: Path, omni: Omni) -> None:
    pytest.importorskip("fcntl")
    first = Results(tmp_path / "out", [])
    with pytest.raises(BusyError, match="another batch is writing"):
        make(tmp_path, omni, ROWS[:1])
    first.close()
    make(tmp_path, omni, ROWS[:1])


# Rows that fail


def test_a_row_that_fails_is_recorded_and_stops_no_other(
    tmp_path: Path, omni: Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = omni.pipe.vae.decode

    def failing(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() in broken:
            raise RuntimeError("the decoder is broken")
        return decode(*args, **kwargs)

    broken: set[int] = set()
    encode = omni.pipe.encode_prompt

    def noticed(*args: Any, **kwargs: Any) -> Any:
        (broken.add if "a dog" in str(kwargs.get("prompt")) else broken.discard)(threading.get_ident())
        return encode(*args, **kwargs)

    monkeypatch.setattr(omni.pipe.vae, "decode", failing)
    monkeypatch.setattr(omni.pipe, "encode_prompt", noticed)
    assert make(tmp_path, omni)[:4] == (5, 0, 5, 1)
    dog = records(tmp_path)["dog"]
    assert (dog["error"], dog["message"], "files" in dog) == ("RuntimeError", "the decoder is broken", False)
    assert not (tmp_path / "out" / "dog.png").exists()
    assert make(tmp_path, omni)[:4] == (5, 5, 0, 1), "it is not tried again"
    monkeypatch.setattr(omni.pipe.vae, "decode", decode)
    assert make(tmp_path, omni, retry_failed=True)[:4] == (5, 4, 1, 0)
    assert records(tmp_path)["dog"]["files"] == ["dog.png"]


def submitted_by(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    """`wrong(engine, prompt)` is called before each row is submitted, and may raise."""
    submit = Engine.submit

    def checked(self: Engine, prompt: str, **arguments: Any) -> Any:
        wrong(self, prompt)
        return submit(self, prompt, **arguments)

    monkeypatch.setattr(Engine, "submit", checked)


def test_a_row_without_memory_beside_others_is_made_alone(
    tmp_path: Path, omni: Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def wrong(engine: Engine, prompt: str) -> None:
        if prompt == "a fox":
            begun.append(engine.running + engine.queued)
            if len(begun) == 1:
                raise torch.OutOfMemoryError("no memory")

    submitted_by(monkeypatch, wrong)
    assert make(tmp_path, omni)[:4] == (5, 0, 5, 0)
    assert len(begun) == 2
    assert begun[1] == 0


def test_a_row_that_fits_nowhere_fails(tmp_path: Path, omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(engine: Engine, prompt: str) -> None:
        if prompt == "a fox":
            raise torch.OutOfMemoryError("no memory")

    submitted_by(monkeypatch, wrong)
    assert make(tmp_path, omni)[:4] == (5, 0, 5, 1)
    assert records(tmp_path)["fox"]["error"] == "OutOfMemoryError"


def test_a_device_that_failed_stops_the_batch_and_no_row_is_to_blame(
    tmp_path: Path, omni: Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(engine: Engine, prompt: str) -> None:
        if prompt == "a fox":
            raise RuntimeError("CUDA error: device-side assert triggered")

    submitted_by(monkeypatch, wrong)
    with pytest.raises(DeviceFailedError, match="device-side assert"):
        make(tmp_path, omni, in_flight=1)
    assert not any("error" in record for record in records(tmp_path).values())


def test_one_that_is_to_be_alone_waits_for_others_and_keeps_them_out() -> None:
    room, inside, seen = _Room(), [], []

    def enter(alone: bool) -> None:
        for _ in range(20):
            with room.entered(alone):
                inside.append(alone)
                seen.append((alone, len(inside)))
                inside.remove(alone)

    threads = [threading.Thread(target=enter, args=[number % 3 == 0]) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {count for alone, count in seen if alone} == {1}
    assert len(seen) == 180


def test_a_closed_worker_makes_no_errors(omni: Omni, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    (row,) = read(tmp_path / "rows.jsonl", omni, SMALL)
    worker = Worker(omni, 1)
    worker.close()
    with pytest.raises(CancelledError):
        worker.make(row)


# Edits and videos


@pytest.mark.usefixtures("small_references")
def test_rows_have_pictures_to_start_from(tmp_path: Path) -> None:
    tiny.reference_image().save(tmp_path / "a.png")
    rows = [{"id": "one", "prompt": "more", "image": "a.png"}, {"id": "two", "prompt": "less", "image": ["a.png"]}]
    with Omni(tiny.qwen_image_edit(layers=2), cache_backend=None) as omni:
        assert make(tmp_path, omni, rows)[:4] == (2, 0, 2, 0)


def test_videos_are_written_with_their_rate(tmp_path: Path) -> None:
    rows = [{"id": "one", "prompt": "a cat", "num_frames": 5, "fps": 8}]
    with Omni(tiny.wan(), cache_backend=None) as omni:
        make(tmp_path, omni, rows)
    (name,) = records(tmp_path)["one"]["files"]
    assert name in ("one.mp4", "one.webp")
    assert read_settings(tmp_path / "out" / name)["fps"] == 8
