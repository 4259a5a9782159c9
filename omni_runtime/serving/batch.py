"""Batches: a file of rows becomes a directory of pictures, through an engine that has several rows in flight.

    rows = read(Path("prompts.jsonl"), omni)
    summary = run(rows, Path("out"), omni)

What was made is not made again (`omni_runtime.serving.results`). A row that fails is recorded, and does not stop the
others. With several workers, each keeps the model and has an engine of its own (`omni_runtime.serving.ray_batch`).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from omni_runtime import files
from omni_runtime.generation.omni import Omni
from omni_runtime.serving.results import Made, Results
from omni_runtime.serving.rows import Row, RowsError, read
from omni_runtime.serving.worker import AHEAD, Worker

__all__ = ["Made", "Row", "RowsError", "Summary", "made_here", "read", "run"]


class Summary(NamedTuple):
    """What a batch has done.

    Attributes:
        rows: the number of rows.
        found: how many of them were done before.
        made: how many were made now.
        failed: how many have an error, now or from before.
        seconds: from the start of the first row to the end of the last one; the model is loaded before.
    """

    rows: int
    found: int
    made: int
    failed: int
    seconds: float


def run(
    rows: Sequence[Row],
    directory: Path,
    omni: Omni,
    *,
    workers: int = 1,
    in_flight: int = 8,
    fresh: bool = False,
    retry_failed: bool = False,
    listener: Callable[[Row, dict[str, Any]], None] | None = None,
    started: Callable[[int], None] | None = None,
    **ray: Any,
) -> Summary:
    """Make the rows that are not done, and write their files and lines to the directory.

    Args:
        rows: from `read`.
        directory: for `results.jsonl` and the pictures.
        omni: the model. With several workers, it is not loaded here.
        workers: how many processes have the model. More than 1 need Ray.
        in_flight: how many rows a worker runs at once.
        fresh: make all rows again.
        retry_failed: make rows again that have failed.
        listener: called with each row that is over, and its line.
        started: called with the number of rows that were found, before the first row is made.
        ray: arguments of `ray_batch.made_by_workers`.

    Raises:
        files.WriteError: a file cannot be written, for example because the disk is full. What was made before is kept.
        DeviceFailedError: the device can no longer be used. What was made before is kept.
        BusyError: another batch writes to the directory.
        TooFewError: Ray has fewer GPUs or CPUs than workers.
        WorkersFailedError: Ray cannot be started, or the workers cannot load the model.
    """
    with contextlib.closing(Results(directory, rows)) as results:
        todo = [row for row in rows if fresh or not results.done(row, failed=retry_failed)]
        found = len(rows) - len(todo)
        if started is not None:
            started(found)
        start, made, by_id = None, 0, {row.id: row for row in todo}
        if workers > 1:
            from omni_runtime.serving import ray_batch

            making = ray_batch.made_by_workers(todo, omni, workers=workers, in_flight=in_flight, **ray)
        else:
            making = made_here(todo, omni, in_flight)
        with contextlib.closing(making):
            for one in making if todo else ():
                start = start or time.perf_counter() - one.seconds
                try:
                    line = results.keep(by_id[one.id], one)
                except files.WriteError as error:
                    raise error.keeping(f"{found + made} of {len(rows)} rows are done and kept") from error
                made += 1
                if listener is not None:
                    listener(by_id[one.id], line)
        failed = sum("error" in results.records[row.id] for row in rows)
        return Summary(len(rows), found, made, failed, 0.0 if start is None else time.perf_counter() - start)


def made_here(rows: Iterable[Row], omni: Omni, in_flight: int) -> Generator[Made, None, None]:
    """Make rows in this process, and yield each when it is over. Closing the generator cancels those in flight."""
    worker = Worker(omni, in_flight)
    rows = iter(rows)
    try:
        with ThreadPoolExecutor(in_flight + AHEAD, "omni-row") as threads:

            def begun(count: int) -> set[Future[Made]]:
                return {threads.submit(worker.make, row) for row in itertools.islice(rows, count)}

            try:
                pending = begun(in_flight + AHEAD)
                while pending:
                    over, pending = wait(pending, return_when=FIRST_COMPLETED)
                    pending |= begun(len(over))
                    for one in over:
                        yield one.result()
            except BaseException:
                worker.close()  # before the threads are waited for
                raise
    finally:
        worker.close()
