"""The command line: omni generate | batch | compare | calibrate | explain | inspect | serve | backends | models.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 something unexpected, 2 wrong input, 3 some
rows of a batch failed, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from omni_runtime.cli.options import EXPECTED, WRONG_INPUT, UsageError, parser
from omni_runtime.cli.output import settle_streams
from omni_runtime.files import WriteError

OK, UNEXPECTED, INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    settle_streams()
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # --help, --version, or an error that argparse has printed
        return stop.code if isinstance(stop.code, int) else WRONG_INPUT
    try:
        # Imported only now, because it imports torch and --help would have to wait for it.
        code = getattr(import_module(f"omni_runtime.cli.{options.module}"), options.command)(options)
        return code or OK
    except UsageError as error:
        return _say(WRONG_INPUT, str(error))
    except KeyboardInterrupt as stop:
        return _say(INTERRUPTED, str(stop) or "interrupted")
    except BrokenPipeError:  # the reader has closed the pipe: nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            return _say(UNEXPECTED, f"the device is out of memory: {error}")
        if isinstance(error, WriteError) or type(error).__name__ in EXPECTED:
            return _say(UNEXPECTED, str(error))
        traceback.print_exc()
        return _say(UNEXPECTED, f"unexpected {type(error).__name__}: {error}")


def _say(code: int, message: str) -> int:
    print(f"omni: error: {' '.join(message.split())}", file=sys.stderr)
    return code
