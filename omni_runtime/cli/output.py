"""Printing on any terminal: JSON, and text that also works on ASCII and Latin-1 streams."""

from __future__ import annotations

import codecs
import io
import json
import sys
from typing import Any

#: Replacements for signs that a stream's encoding lacks; other such characters are escaped.
PLAIN = {"≥": ">=", "≤": "<=", "×": "x", "±": "+-", "−": "-", "–": "-", "σ": "sigma", "²": "^2"}


def settle_streams() -> None:
    """Make stdout and stderr replace or escape characters that they cannot encode, instead of raising an error."""
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
