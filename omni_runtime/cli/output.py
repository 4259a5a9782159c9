"""What the commands print, on any terminal: JSON, and text that an ASCII or Latin-1 stream can take too."""

from __future__ import annotations

import codecs
import io
import json
import sys
from typing import Any

#: What stands for the signs of our own texts where a stream's encoding has them not; other characters are escaped.
PLAIN = {"≥": ">=", "≤": "<=", "×": "x", "±": "+-", "−": "-", "–": "-", "σ": "sigma", "²": "^2"}


def settle_streams() -> None:
    """Let no character end a command: what stdout and stderr cannot encode is written otherwise."""
    codecs.register_error("omni.plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="omni.plain")


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and error.object[error.start] in PLAIN:
        return PLAIN[error.object[error.start]], error.start + 1
    return codecs.backslashreplace_errors(error)


def print_json(document: Any) -> None:
    """Print one JSON document, in ASCII."""
    print(json.dumps(document, indent=1), flush=True)
