"""`omni batch`: a file of rows becomes a directory of pictures and `results.jsonl`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from omni_runtime.cli.inputs import (
    gpus_of_workers,
    make_directory,
    make_omni,
    request_arguments,
    settle,
    speed_of,
    threads_of_workers,
    wrong_input,
)
from omni_runtime.cli.options import SOME_FAILED, UsageError
from omni_runtime.cli.output import print_json
from omni_runtime.progress import Line, Progress
from omni_runtime.serving import batch as batches
from omni_runtime.serving import local_ray
from omni_runtime.serving.results import FILE, BusyError

#: Seconds between two lines of progress where a line cannot be redrawn.
PAUSE = 10.0


def batch(options: argparse.Namespace) -> int | None:
    """Make the rows that are not made yet."""
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out} is a file: give a directory")
    gpus = gpus_of_workers(options, f"--workers {options.workers}") if options.workers > 1 else None
    settle(options)
    with wrong_input():
        omni = make_omni(options, **speed_of(options))
        defaults = request_arguments(options) | {"seed": options.seed, "fps": options.fps}
        model = os.path.realpath(options.model) if Path(options.model).is_dir() else options.model
        about = {"model": model, **{name: getattr(options, name) for name in ("dtype", "revision", "variant")}}
        rows = batches.read(options.rows, omni, defaults, about)
        make_directory(options.out)
    ray = {"threads": threads_of_workers(options), "gpus": gpus} if options.workers > 1 else {}
    told = _Told(len(rows), options.quiet)

    def started(found: int) -> None:
        told.started(found)
        if options.workers == 1 and found < len(rows):
            with wrong_input():
                omni.load()

    try:
        summary = batches.run(
            rows, options.out, omni, workers=options.workers, in_flight=options.in_flight, fresh=options.fresh,
            retry_failed=options.retry_failed, listener=told.over, started=started, **ray,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {told.done} of {len(rows)} rows are done, and kept in {options.out}; "
            "run the same command to continue"
        ) from None
    except (BusyError, local_ray.TooFewError) as error:
        raise UsageError(str(error)) from error
    finally:
        told.line.close()
    results = options.out / FILE
    if options.json:
        print_json({"results": str(results), **summary._asdict()})
    else:
        found = f", {summary.found} of them before" if summary.found else ""
        failed = f", {summary.failed} of them with an error (--retry-failed makes them again)" if summary.failed else ""
        print(
            f"{summary.rows} rows are done{found}{failed}; {summary.made} in {summary.seconds:.1f} s", results, sep="\n"
        )
    return SOME_FAILED if summary.failed else None


class _Told:
    """Shows the progress: on a terminal in one line that is redrawn, elsewhere in a new line now and then."""

    def __init__(self, rows: int, quiet: bool) -> None:
        self.line = Line(sys.stderr, quiet)
        self.done = 0
        self._rows = rows
        self._quiet = quiet
        self._made = self._failed = 0
        self._start: float | None = None
        self._said = time.perf_counter()

    def started(self, found: int) -> None:
        """Show how many rows were found."""
        self.done = found
        if found and not self._quiet:
            print(f"{found} rows were done before: --fresh makes them again", file=sys.stderr)
        self.line.tell(f"{found} of {self._rows} rows")

    def over(self, row: batches.Row, record: dict[str, Any]) -> None:
        """Show that a row is over."""
        self.done += 1
        self._made += 1
        now = time.perf_counter()
        self._start = self._start or now - record["seconds"]  # the model is loaded before
        if "error" in record:
            self._failed += 1
            if not self._quiet:
                self.line.clear()
                message = " ".join(record["message"].split())
                print(f"line {row.line} ({row.id}): {record['error']}: {message:.300}", file=sys.stderr, flush=True)
        to_come = self._rows - self.done
        left = (now - self._start) / self._made * to_come if to_come else None
        failed = f", {self._failed} failed" if self._failed else ""
        text = f"{Progress(self.done, self._rows, left)}{failed}: {row.id}"
        self.line.tell(text)
        if not self._quiet and not self.line.live and (now - self._said >= PAUSE or not to_come):
            self._said = now
            print(text, file=sys.stderr, flush=True)
