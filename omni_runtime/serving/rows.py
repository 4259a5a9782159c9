"""The rows of a batch: read from a file, and checked before any weight is loaded.

A row of a `.jsonl` file is a JSON object with arguments of `Omni.generate`:

    {"id": "cat", "prompt": "a cat", "seed": 1, "cache_backend": "velocity_cache", "cache_config": {"speedup": 2}}

`image` is a path, or a list of paths, relative to the file. `id` names the row and its picture. `fps` is for videos. A
`.txt` file has a prompt on each line.

A row without a seed gets one that follows from its content and its id, or from its content and its place among equal
rows. So a row has the same picture each time, and two equal rows have two pictures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_runtime import files
from omni_runtime.generation.omni import Omni

__all__ = ["Row", "RowsError", "read"]

#: So many wrong lines are shown.
SHOWN = 8
#: Arguments that a row cannot have: the start or the end of the name → why.
REFUSED = (
    (re.compile(r"callback|on_step$"), "is a function, which a row cannot hold"),
    (re.compile(r".*(latents|_embeds|_mask)$"), "is a tensor, which a row cannot hold"),
    (re.compile(r"generator$"), "is an object, which a row cannot hold: give seed"),
    (re.compile(r"output_type$"), "cannot be set: pictures are written as PNG, videos as MP4 or WebP"),
    (re.compile(r"deadline$"), "is not for a batch"),
)
#: Arguments whose text no check depends on.
WORDS = ("prompt", "negative_prompt")
#: An id that is a file name as it is. Names that are made from other ids have a full stop.
PLAIN = re.compile(r"[a-z0-9_][a-z0-9_-]{0,99}")


class RowsError(ValueError):
    """Some lines of the file are wrong. The message names them."""


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        line: its line in the file, from 1.
        id: its name; made from its content if the row has none.
        name: the name of its files, without an ending.
        arguments: those of `Engine.submit`, with the prompt, the seed and the paths of the images.
        fps: frames per second of a video; None for the request's own.
        digest: of everything that its picture depends on: the arguments, the images' contents, the model, the cache.
    """

    line: int
    id: str
    name: str
    arguments: dict[str, Any]
    fps: float | None
    digest: str


def read(
    path: Path, omni: Omni, defaults: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None
) -> list[Row]:
    """Read and check the rows of a file.

    Args:
        path: a file with a JSON object per line; a `.txt` file has a prompt per line.
        omni: the model, whose weights are not loaded, and the cache of rows that have none of their own.
        defaults: arguments of rows that do not have them.
        model: what else the pictures depend on, such as the revision of the model; ready for JSON.

    Raises:
        RowsError: some lines are wrong, or there are none; the message names the first `SHOWN`.
        FileNotFoundError: there is no such file.
    """
    return _Reader(path, omni, defaults or {}, model or {}).rows()


class _Reader:
    def __init__(self, path: Path, omni: Omni, defaults: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        self.path = path
        self.omni = omni
        self.defaults = defaults
        self.model = model
        self.equal: Counter[str] = Counter()  # rows without an id, by content
        self.lines: dict[str, int] = {}  # id → line
        self.images: dict[Path, str] = {}  # path → digest
        self.checked: set[str] = set()  # kinds of rows that are right

    def rows(self) -> list[Row]:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} {'is a directory' if self.path.is_dir() else 'does not exist'}")
        rows: list[Row] = []
        wrong: list[str] = []
        for line, text in self._lines(wrong):
            try:
                rows.append(self._row(line, text))
            except (ValueError, TypeError, OSError) as error:  # noqa: PERF203 (all wrong lines are told at once)
                wrong.append(f"line {line}: {error}")
        if wrong:
            more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            count = "1 line is" if len(wrong) == 1 else f"{len(wrong)} lines are"
            raise RowsError(f"{self.path}: {count} wrong, and nothing was made. {'; '.join(wrong[:SHOWN])}{more}")
        if not rows:
            raise RowsError(f"{self.path} has no rows: it must have one per line")
        return rows

    def _lines(self, wrong: list[str]) -> Iterator[tuple[int, str]]:
        with open(self.path, "rb") as file:
            for number, data in enumerate(file, 1):
                try:
                    text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    wrong.append(f"line {number}: not UTF-8: {error.reason} at byte {error.start + 1}")
                    continue
                if text:
                    yield number, text

    def _row(self, line: int, text: str) -> Row:
        given = {"prompt": text} if self.path.suffix.lower() == ".txt" else _object(text)
        own = None if given.get("id") is None else _own_id(given["id"])
        written = {key: value for key, value in given.items() if key != "id"}
        arguments = {key: value for key, value in {**self.defaults, **written}.items() if value is not None}
        if written.get("cache_backend", "") is None:
            arguments["cache_backend"] = "none"  # null: no cache, whatever the default
        _check(arguments)
        fps = _rate(arguments.pop("fps", None), self.omni)
        paths = self._paths(arguments.get("image"))
        self._check(arguments, paths)
        content = dict(arguments)
        if paths is not None:
            each = paths if isinstance(paths, list) else [paths]
            content["image"] = [self.images[one] for one in each]
            arguments["image"] = [str(one) for one in paths] if isinstance(paths, list) else str(paths)
        number = _digest(written)
        place = own or self.equal[number]
        self.equal[number] += own is None
        content["seed"] = arguments["seed"] = int(arguments.get("seed", int(_digest([written, place])[:8], 16)))
        id = own or f"{_words(arguments.get('prompt') or 'image')}.{_digest([number, place])[:12]}"
        if id in self.lines:
            raise ValueError(f"id {id!r} is that of line {self.lines[id]}, too")
        self.lines[id] = line
        name = id if own is None or PLAIN.fullmatch(own) else f"{_words(own)}.{_digest(own)[:12]}"
        return Row(line, id, name, arguments, fps, _digest([self.model, self._cache(arguments), content, fps]))

    def _check(self, arguments: Mapping[str, Any], paths: Path | list[Path] | None) -> None:
        """Check what the model makes of a row. Rows that differ only in their words and seeds are checked once."""
        seed = arguments.get("seed", 0)
        others = {key: value for key, value in arguments.items() if key not in (*WORDS, "seed", "image")}
        images = len(paths) if isinstance(paths, list) else paths is None
        kind = _digest([others, [key in arguments for key in WORDS], images])
        if kind in self.checked and type(seed) is int and 0 <= seed < 2**64:
            return
        self.omni.check(**dict(arguments) | ({} if paths is None else {"image": _stand_ins(paths)}))
        self.checked.add(kind)

    def _cache(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The cache of a row, as far as it is known before the model is loaded."""
        if "cache_backend" in arguments:
            return [arguments["cache_backend"], arguments.get("cache_config")]
        return [self.omni.cache_backend, arguments.get("cache_config", self.omni.cache_config)]

    def _paths(self, given: Any) -> Path | list[Path] | None:
        """The full path of an image, or of each in a list. Each must be a picture; its pixels are not read."""
        if given is None:
            return None
        if isinstance(given, list):
            found = [self._paths(one) for one in given]
            return [one for one in found if isinstance(one, Path)]
        if not isinstance(given, str | Path):
            raise TypeError(f"image must be a path, or a list of paths, not {type(given).__name__}")
        path = Path(given).expanduser()
        if isinstance(given, str):  # of a row; those of the command are relative to the working directory
            path = self.path.parent / path
        path = path.resolve()
        if path not in self.images:
            _check_image(path, given)
            self.images[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return path


def _object(text: str) -> dict[str, Any]:
    try:
        row = files.parse_json(text, "it")
    except ValueError as error:
        raise ValueError(re.sub(r"line 1 (column \d+) .*", r"\1", str(error)).removeprefix("it is ")) from None
    if not isinstance(row, dict):
        raise TypeError(f'a row is a JSON object, like {{"prompt": "a cat"}}, not {text:.40}')
    return row


def _own_id(given: Any) -> str:
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise TypeError(f"id must be text or a whole number, not {given!r}")
    if not 1 <= len(str(given).strip()) <= 1000:
        raise ValueError(f"id must have from 1 to 1000 characters, not {given!r:.40}")
    return str(given)


def _check(arguments: Mapping[str, Any]) -> None:
    for name in arguments:
        for kind, why in REFUSED:
            if kind.match(name):
                raise TypeError(f"{name} {why}")
    for name in ("prompt", "negative_prompt", "cache_backend"):
        if not isinstance(arguments.get(name, ""), str):
            raise TypeError(f"{name} must be text, not {type(arguments[name]).__name__}: a row is one request")
    if isinstance(arguments.get("seed"), list):
        raise TypeError("seed must be a whole number, not a list: a row is one request")


def _rate(fps: Any, omni: Omni) -> float | None:
    if fps is None:
        return None
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= 1000:
        raise ValueError(f"fps must be a number above 0, of 1000 at most, not {fps!r}")
    if not omni.makes_video:
        raise ValueError(f"fps is for videos, and {omni.name} makes pictures")
    return float(fps)


def _words(text: str) -> str:
    plain = text.lower().encode("ascii", "ignore").decode()
    return re.sub(r"\W+", "-", plain).strip("-")[:48].strip("-") or "row"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_image(path: Path, given: str | Path) -> None:
    from PIL import Image, UnidentifiedImageError

    if not files.is_there(path):
        raise FileNotFoundError(f"no image file {str(given)!r}")
    try:
        with Image.open(path):
            pass
    except UnidentifiedImageError:
        raise ValueError(f"{given} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{given} cannot be read: {error}") from error


def _stand_ins(paths: Path | list[Path]) -> Any:
    """A small picture in the place of each path."""
    return [_picture()] * len(paths) if isinstance(paths, list) else _picture()


@functools.cache
def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (16, 16))
