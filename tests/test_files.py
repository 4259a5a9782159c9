"""Files are written whole or not at all, read with bounds, and set aside where they are damaged."""

import errno
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from omni_runtime import files


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing gets onto the disk any more, though files can be opened."""

    def fsync(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Writing


def test_a_file_is_written_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "ñ")
    assert path.read_bytes() == "ñ".encode()
    files.write(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_what_was_there_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(files.WriteError, match=rf"^cannot write {path}: No space left on device$") as raised:
        files.write(path, "after")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.txt"]
    with pytest.raises(files.WriteError):
        files.write(tmp_path / "b.txt", "new")
    assert names(tmp_path) == ["a.txt"]


def test_a_limit_on_file_sizes_leaves_no_half_picture(tmp_path: Path) -> None:
    """The kernel itself ends the write after 1000 bytes."""
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from omni_runtime import files
files.write({str(tmp_path / "small")!r}, bytes(1000))
try:
    files.write({str(tmp_path / "large")!r}, bytes(5000))
except files.WriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {tmp_path / 'large'}: File too large\n"
    assert names(tmp_path) == ["small"]


def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "a.txt", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write(link, "after")
    assert link.is_symlink()
    assert path.read_text() == "after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    mask = os.umask(0o027)
    try:
        files.write(tmp_path / "new", "")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(files.WriteError, match="it is a directory"):
        files.write(tmp_path, "")
    reading, writing = os.pipe()
    files.write(f"/dev/fd/{writing}", "through a pipe")
    assert os.read(reading, 99) == b"through a pipe"
    os.close(reading)
    os.close(writing)
    files.write("/dev/null", "gone")
    assert not stat.S_ISREG(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("write", [files.write, files.append])
def test_a_directory_that_is_not_there_is_named(tmp_path: Path, write) -> None:
    with pytest.raises(files.WriteError, match=f"cannot write {tmp_path}/no/a: No such file or directory"):
        write(tmp_path / "no" / "a", "")


def test_the_error_says_what_was_kept_and_can_be_pickled() -> None:
    error = files.WriteError(28, "full", "a.png").keeping("2 of 3 pictures were kept")
    assert str(pickle.loads(pickle.dumps(error))) == "cannot write a.png: full; 2 of 3 pictures were kept"


# Reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": ', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"[" * 10**6, "is nested more than 64 deep"),
        (b"[" * 65 + b"]" * 65, "is nested more than 64 deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "is nested more than 64 deep"),
        (b" " * 1001, r"has more than 0 MiB \(1001 bytes\)"),
        (b"9" * 5000, "is not valid JSON|has more"),
    ],
    ids=["empty", "truncated", "binary", "recursion", "lists", "objects", "large", "digits"],
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} ({message})"):
        files.read_json(path, limit=1000 if set(content) <= {32, 57} else files.JSON_BYTES)


def test_json_within_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in (None, [], {"a": [1.5, "ñ"]}, json.loads("[" * 64 + "]" * 64)):
        path.write_text(json.dumps(value))
        assert files.read_json(path, limit=path.stat().st_size) == value


def test_large_files_are_not_read_through(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(300 << 30)  # a hole: takes no room, and would take all memory
    with pytest.raises(ValueError, match="more than 8 MiB"):
        files.read_json(path)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory, not a file"):
        files.read_json(tmp_path)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json must hold a JSON object, not list"):
        files.read_object(tmp_path / "a.json")
    assert not files.is_there("a" * 5000)
    assert not files.is_there("a\0b")


# What is damaged


def test_what_is_set_aside_keeps_its_contents_and_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for place, name in enumerate(["a.json.damaged", "a.json.damaged-2", "a.json.damaged-3"]):
        path.write_text(str(place))
        with pytest.warns(files.DamagedFileWarning, match=rf"{path} is damaged \(why\); it is now {name}, instead"):
            assert files.set_aside(path, "why", "instead") == tmp_path / name
        assert (tmp_path / name).read_text() == str(place)
    assert names(tmp_path) == ["a.json.damaged", "a.json.damaged-2", "a.json.damaged-3"]
