"""What a search for schedules keeps on disk: it goes on from there, whatever has happened to the files."""

from __future__ import annotations

import errno
import json
import os

import pytest

from omni_runtime.calibrate.journal import Journal
from omni_runtime.calibrate.search import Forecast, Tried
from omni_runtime.files import DamagedFileWarning, WriteError

ABOUT = {"model": "a", "requests": [["a cat", 0, {}], ["a cat\u2028or\rtwo", 1, {}]]}
HEADER = json.dumps(ABOUT, sort_keys=True, ensure_ascii=False)
FORECAST = Forecast(1.0, 2)
LINES = [
    '{"computed": [0, 3], "forecast": [1.0, 2], "psnr": [30.0], "seconds": 1.5}',
    '{"computed": [0, 2], "forecast": [1.0, 2], "psnr": [20.0, 21]}',
]


def test_a_journal_that_was_cut_off_is_read_and_another_searchs_is_refused(tmp_path):
    path = tmp_path / "search.jsonl"
    Journal(path, {"model": "a"}).keep(Tried((0, 3), (30.0,), FORECAST))
    with path.open("a") as file:
        file.write('{"computed": [0, 2')
    kept = Journal(path, {"model": "a"})
    assert kept.get((0, 3), FORECAST) == Tried((0, 3), (30.0,), FORECAST)
    assert kept.get((0, 2), FORECAST) is None
    kept.keep(Tried((0, 1), (20.0,), FORECAST))
    assert Journal(path, {"model": "a"}).get((0, 1), FORECAST) == Tried((0, 1), (20.0,), FORECAST)
    with pytest.raises(ValueError, match=r"holds another search.*--fresh"):
        Journal(path, {"model": "b"})


def test_a_schedule_that_was_given_up_is_sampled_on_all_images_when_it_is_measured(tmp_path):
    class Sampled:
        requests = (1, 2, 3)
        calls = 0

        def sample(self, computed, forecast, best=None):
            self.calls += 1
            return Tried(computed, (30.0, 31.0, 32.0)[: 1 if best else 3], forecast)

    path, images = tmp_path / "search.jsonl", Sampled()
    kept, best = Journal(path, {}), Tried((0, 2), (40.0, 40.0, 40.0), FORECAST)
    assert [len(kept.sample(images, (0, 3), FORECAST, one).psnr) for one in (best, best, None, best)] == [1, 1, 3, 3]
    assert images.calls == 2
    assert Journal(path, {}).get((0, 3), FORECAST).psnr == (30.0, 31.0, 32.0)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", HEADER[:9].encode(), b"\x00\xff\xfe", b"null\n", b"[1]\n", b"[" * 10**5, b"GIF89a\n{}\n"],
    ids=["empty", "a line end", "truncated", "binary", "null", "list", "deep", "other"],
)
def test_a_damaged_journal_is_set_aside_and_begun_anew(tmp_path, content):
    path = tmp_path / "search.jsonl"
    path.write_bytes(content)
    with pytest.warns(DamagedFileWarning, match=rf"^{path} is damaged .* it is now search.jsonl.damaged, and the"):
        Journal(path, ABOUT).keep(Tried((0, 3), (30.0,), FORECAST))
    assert (tmp_path / "search.jsonl.damaged").read_bytes() == content
    assert Journal(path, ABOUT).get((0, 3), FORECAST) == Tried((0, 3), (30.0,), FORECAST)


def test_a_directory_in_its_place_is_set_aside(tmp_path):
    path = tmp_path / "search.jsonl"
    (path / "within").mkdir(parents=True)
    with pytest.warns(DamagedFileWarning, match="is a directory"):
        Journal(path, ABOUT)
    assert (tmp_path / "search.jsonl.damaged" / "within").is_dir()
    assert path.read_text().removesuffix("\n") == HEADER


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "5",
        "{}",
        "[" * 10**5,
        '{"computed": 3, "psnr": [1.0]}',
        '{"computed": [], "psnr": [1.0]}',
        '{"computed": [0, "3"], "psnr": [1.0]}',
        '{"computed": [3, 0], "psnr": [1.0]}',
        '{"computed": [0, 4], "psnr": []}',
        '{"computed": [0, 4], "psnr": [NaN]}',
        '{"computed": [0, 4], "psnr": [1.0, 2.0, 3.0]}',
        '{"computed": [0, 4], "psnr": [1.0], "seconds": "long"}',
        '{"computed": [0, 4], "psnr": [1.0], "seconds": -1}',
        '{"computed": [0, 4], "psnr": [1' + "0" * 400 + "]}",
    ],
)
def test_of_damaged_lines_the_others_are_kept(tmp_path, line):
    path = tmp_path / "search.jsonl"
    damaged = "\n".join([HEADER, line, *LINES]) + "\n"
    path.write_text(damaged)
    with pytest.warns(DamagedFileWarning, match=r"1 of its lines cannot be read\); .*, and the others are kept"):
        kept = Journal(path, ABOUT)
    assert kept.get((0, 3), FORECAST) == Tried((0, 3), (30.0,), FORECAST)
    assert kept.get((0, 2), FORECAST) == Tried((0, 2), (20.0, 21), FORECAST)
    assert kept.get((0, 4), FORECAST) is None
    assert kept.seconds(2) == 1.5
    assert path.read_text() == "\n".join([HEADER, *LINES]) + "\n"
    assert (tmp_path / "search.jsonl.damaged").read_text() == damaged


def test_a_full_disk_leaves_no_empty_journal(tmp_path, monkeypatch):
    def fsync(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "search.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(WriteError, match=f"cannot write {path}: No space left"):
            Journal(path, ABOUT)
        assert list(tmp_path.iterdir()) == []
    journal = Journal(path, ABOUT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(WriteError, match=f"cannot write {path}: No space left"):
            journal.keep(Tried((0, 3), (30.0,), FORECAST))
    assert Journal(path, ABOUT).get((0, 1), FORECAST) is None, "and it can be read again"
