"""The results of a batch: pictures or videos in a directory, and `results.jsonl` with a line for each row.

A line is written when its row is over, after the row's files, with their digests. So after any interruption, a row
whose line is there and whose files are whole is done, and any other is made again. When a batch ends, the lines are
sorted by row. Lines of rows that are no longer in the batch are kept at the end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_runtime import files
from omni_runtime.serving.rows import Row

__all__ = ["FILE", "BusyError", "Made", "Results"]

FILE = "results.jsonl"


class BusyError(ValueError):
    """Another batch is writing to the directory."""


@dataclass(frozen=True)
class Made:
    """What became of a row.

    Attributes:
        id: of the row.
        seconds: how long it took.
        about: what is recorded of it: steps, computed and skipped; or `error` (the class) and `message`.
        suffix: the ending of its files.
        contents: of each file.
    """

    id: str
    seconds: float
    about: dict[str, Any]
    suffix: str = ".png"
    contents: list[bytes] = field(default_factory=list, repr=False)

    @property
    def failed(self) -> bool:
        """Whether the row has an error in place of pictures."""
        return "error" in self.about


class Results:
    """The results in a directory, which this process alone writes to.

    Args:
        directory: the directory. It is created.
        rows: the rows of the batch.

    Attributes:
        records: id → the line of the row, as a dict.

    Raises:
        files.WriteError: the directory cannot be written to.
        BusyError: another batch is writing to it.

    Warns:
        files.DamagedFileWarning: some lines cannot be read. The file is set aside, and the other lines are kept.
    """

    def __init__(self, directory: Path, rows: Sequence[Row]) -> None:
        self.directory = directory
        self.path = directory / FILE
        self._rows = rows
        files.make_directory(directory)
        self._lock = _locked(directory)
        for left in directory.glob(".omni-*-*.tmp"):  # of a batch that was killed while it wrote a file
            if not _alive(left.name.split("-")[1]):
                left.unlink(missing_ok=True)
        self.records: dict[str, dict[str, Any]] = {}
        self._read()
        self._tidy()

    def close(self) -> None:
        """Sort the lines by row. Others may then write to the directory."""
        try:
            self._tidy()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def done(self, row: Row, failed: bool = False) -> bool:
        """Whether this row is done: its files are whole, or it has failed and `failed` rows are not tried again."""
        record = self.records.get(row.id)
        if record is None or record.get("digest") != row.digest:
            return False
        if "error" in record:
            return not failed
        names, digests = record.get("files"), record.get("sha256")
        if not (isinstance(names, list) and names and isinstance(digests, list) and len(names) == len(digests)):
            return False
        return all(_sha256(self.directory / str(name)) == sha for name, sha in zip(names, digests, strict=True))

    def keep(self, row: Row, made: Made) -> dict[str, Any]:
        """Write the files of a row, and its line.

        Returns:
            The line as a dict.

        Raises:
            files.WriteError: a file cannot be written. The row is then not done.
        """
        names = [f"{row.name}{made.suffix if place == 1 else f'.{place}{made.suffix}'}"
                 for place in range(1, len(made.contents) + 1)]  # fmt: skip
        for name, content in zip(names, made.contents, strict=True):
            files.write(self.directory / name, content)
        record = {
            "id": row.id,
            "line": row.line,
            "prompt": row.arguments.get("prompt"),
            "seed": row.arguments["seed"],
            **({} if made.failed else {"files": names}),
            "seconds": round(made.seconds, 3),
            **made.about,
            **({} if made.failed else {"sha256": [hashlib.sha256(one).hexdigest() for one in made.contents]}),
            "digest": row.digest,
        }
        files.append(self.path, json.dumps(record) + "\n")
        former = self.records.get(row.id, {}).get("files", ())
        self.records[row.id] = record
        if not made.failed:  # a row that was changed may have had more pictures, or others
            for name in {str(one) for one in former} - set(names):
                (self.directory / Path(name).name).unlink(missing_ok=True)
        return record

    def _read(self) -> None:
        if self.path.is_dir():
            files.set_aside(self.path, "it is a directory", "and a new one is begun")
        if not self.path.exists():
            return
        damaged, last = 0, b"\n"
        with open(self.path, "rb") as file:
            for last in file:
                record = _record(last)
                if record is None:
                    damaged += bool(last.strip())
                else:
                    self.records[record["id"]] = record
        # A last line that is not complete is of a batch that was killed while it wrote: its row is made again.
        if damaged > (not last.endswith(b"\n")):
            files.set_aside(self.path, f"{damaged} of its lines cannot be read", "and the others are kept")

    def _tidy(self) -> None:
        """Write the lines in the order of the rows, if they are not so."""
        first = {row.id: self.records[row.id] | {"line": row.line} for row in self._rows if row.id in self.records}
        others = {id: record for id, record in self.records.items() if id not in first}
        text = "".join(json.dumps(record) + "\n" for record in [*first.values(), *others.values()])
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            files.write(self.path, text)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of `results.jsonl`; None if it is damaged."""
    try:
        record = files.parse_json(line.decode(), "line")
    except ValueError:  # UnicodeDecodeError, too
        return None
    return record if isinstance(record, Mapping) and isinstance(record.get("id"), str) else None  # type: ignore[return-value]


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _sha256(path: Path) -> str | None:
    """The digest of a file; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
    return None


def _locked(directory: Path) -> int | None:
    """A descriptor of the directory that other batches cannot have; None where there are no such locks.

    Raises:
        BusyError: another batch has it.
    """
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            message = f"another batch is writing to {directory}: wait for it, or give another directory"
            raise BusyError(message) from None
        return None  # a file system without locks
    return descriptor
