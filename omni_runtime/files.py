"""File helpers: complete writes, and reads with limits.

`write` renames a finished temporary file, so a full disk leaves the old file unchanged. `read_json` reads JSON
of limited size and depth. `set_aside` renames a file that cannot be read, so nothing is lost and work can go on.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import warnings
from pathlib import Path
from typing import Any

#: The largest JSON file in bytes: a model's configuration, a calibration, a record of one image.
JSON_BYTES = 8 << 20
#: The largest journal in bytes: a file with one line per sampled schedule.
JOURNAL_BYTES = 64 << 20
#: The largest nesting depth of lists and objects in a JSON file.
JSON_DEPTH = 64

__all__ = [
    "JOURNAL_BYTES",
    "JSON_BYTES",
    "JSON_DEPTH",
    "DamagedFileWarning",
    "WriteError",
    "append",
    "is_there",
    "make_directory",
    "parse_json",
    "read_json",
    "read_object",
    "read_text",
    "set_aside",
    "write",
]


class WriteError(OSError):
    """A file could not be written. The message names the file, the reason, and what is kept.

    Attributes:
        errno, strerror, filename: as for any OSError.
        kept: a sentence about what was kept; empty if there is nothing to say.
    """

    def __init__(self, number: int | None, reason: str, path: str | os.PathLike[str], kept: str = "") -> None:
        super().__init__(number, reason, os.fspath(path))
        self.kept = kept

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.strerror, self.filename, self.kept)

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}" + (f"; {self.kept}" if self.kept else "")

    def keeping(self, kept: str) -> WriteError:
        """Return a copy of this error whose message says what was kept."""
        return type(self)(self.errno, self.strerror or "", self.filename, kept)


class DamagedFileWarning(UserWarning):
    """A file that this package wrote cannot be read. The message says what is done instead."""


# Writing


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file completely, or leave the old one unchanged. Text is encoded as UTF-8.

    The content is written to a temporary file in the same directory, which replaces the file once it is on the disk. A
    link stays a link, and a file keeps its permissions. A path that is neither a file nor a directory, such as
    /dev/stdout, is written to directly.

    Raises:
        WriteError: the disk is full, the directory does not exist or is read-only, the path is a directory, ...
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        if Path(path).exists() and not Path(path).is_file():
            Path(path).write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), path) from error


def _replace(target: Path, data: bytes) -> None:
    beside = target.with_name(f".omni-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o7777)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def append(path: str | os.PathLike[str], text: str) -> None:
    """Add text to the end of a file, and wait until it is on the disk.

    Raises:
        WriteError: for the reasons given at `write`. Part of the text may have been written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), path) from error


def make_directory(path: str | os.PathLike[str]) -> None:
    """Create a directory and its parents, if they do not exist.

    Raises:
        WriteError: it cannot be created, or is a file.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), path) from error


# Reading


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file of that name. False also for names that no file can have."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def read_text(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> str:
    """Read a file's text.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is a directory, has more than `limit` bytes, or is not UTF-8; the message names the file.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a directory, not a file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit >> 20} MiB ({os.path.getsize(path)} bytes): it is not read")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: `read_text` raises it, the text is not JSON, or it is nested deeper than `JSON_DEPTH`.
    """
    return parse_json(read_text(path, limit), str(path))


def read_object(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> dict[str, Any]:
    """Like `read_json`, but raise ValueError if the file does not hold a JSON object."""
    parsed = read_json(path, limit)
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(parsed).__name__}")
    return parsed


def parse_json(text: str, name: str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: it is not JSON, or nested deeper than `JSON_DEPTH`; the message starts with `name`.
    """
    too_deep = f"{name} is nested more than {JSON_DEPTH} deep"
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [parsed]
    for _ in range(JSON_DEPTH):
        level = [one for value in level for one in _entries(value) if isinstance(one, dict | list)]
        if not level:
            return parsed
    raise ValueError(too_deep)


def _entries(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


# What cannot be read


def set_aside(path: Path, why: str, instead: str) -> Path:
    """Rename a damaged file or directory to `NAME.damaged` (`.damaged-2`, ...), and warn about it.

    Args:
        path: the file or directory that cannot be read.
        why: what is wrong with it.
        instead: what is done instead, such as "and the search starts again".

    Returns:
        The new path.

    Raises:
        WriteError: the path cannot be renamed.
    """
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    try:
        path.rename(aside)
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), path) from error
    warnings.warn(f"{path} is damaged ({why}); it is now {aside.name}, {instead}", DamagedFileWarning, stacklevel=3)
    return aside
