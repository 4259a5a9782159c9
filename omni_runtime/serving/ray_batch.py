"""A batch on several workers: Ray Data, with actors that keep the model and have an engine each.

Each row is a block of its own, and a worker runs as many blocks at once as its engine has requests in flight. A worker
that dies is started again, and its rows are made again: a row has a seed, so its picture is the same.

A row that kills its worker would do so for ever. So an actor counts how often each row was begun. A row that was begun
before, and not finished, is made alone in its worker, so that no other row is lost with it. After `ATTEMPTS` it has
failed.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

from omni_runtime.generation.omni import Omni
from omni_runtime.serving import local_ray
from omni_runtime.serving.jobs import DeviceFailedError
from omni_runtime.serving.results import Made
from omni_runtime.serving.rows import Row
from omni_runtime.serving.worker import AHEAD, Worker

__all__ = ["ATTEMPTS", "made_by_workers"]

#: So often a row is begun if its worker dies each time.
ATTEMPTS = 4


def made_by_workers(
    rows: Sequence[Row],
    omni: Omni,
    *,
    workers: int,
    in_flight: int,
    threads: int | None = None,
    gpus: bool | None = None,
    quiet: bool = True,
) -> Generator[Made, None, None]:
    """Make rows on several workers, and yield each when it is over. Closing the generator stops Ray.

    Args:
        rows: the rows.
        omni: the model, which each worker loads anew.
        workers: how many.
        in_flight: how many rows each runs at once.
        threads: CPU threads of each; None for an equal share of the CPUs.
        gpus: whether each has a GPU; None: if the cluster has any.
        quiet: hide Ray's own messages.

    Raises:
        TooFewError: the cluster has fewer GPUs or CPUs than workers.
        WorkersFailedError: Ray cannot be started, or the workers cannot load the model.
        ModuleNotFoundError: Ray is not installed.
    """
    with local_ray.ray_runs(workers + 1, quiet) as ray:
        all_gpus, all_cpus = local_ray.resources(ray)
        gpus = all_gpus > 0 if gpus is None else gpus
        there, kind = (all_gpus, "GPU") if gpus else (all_cpus, "CPU")
        if there < workers:
            raise local_ray.TooFewError(f"{workers} workers need a {kind} each, and Ray has {there}")
        threads = threads or max(1, all_cpus // workers)
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
        dataset = _dataset(
            rows, (omni, in_flight, threads, attempts), workers, in_flight + AHEAD, gpus, quiet
        )  # fmt: skip
        for one in dataset.iter_rows():
            made: Made | str = pickle.loads(one["made"])
            if isinstance(made, str):
                raise local_ray.WorkersFailedError(f"a worker cannot load the model: {made}")
            yield made


def _dataset(
    rows: Sequence[Row], arguments: tuple[Any, ...], workers: int, at_once: int, gpus: bool, quiet: bool
) -> Any:
    """The rows, and what becomes of them: a dataset that Ray runs when it is read."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = not quiet
    context.execution_options.preserve_order = False
    if quiet:
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    given = [{"row": pickle.dumps(row)} for row in rows]
    return ray.data.from_items(given, override_num_blocks=len(given)).map_batches(
        RowMaker,
        fn_constructor_args=arguments,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=at_once + AHEAD,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=True,
        ),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )


class Attempts:
    """Counts how often each row was begun, and notes why a worker gave up. An actor."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._why: dict[str, str] = {}

    def of(self, id: str) -> tuple[int, str]:
        """How often a row was begun, and why it was not finished."""
        return self._begun[id], self._why.get(id, "")

    def begin(self, id: str) -> None:
        """Note that a row begins."""
        self._begun[id] += 1

    def note(self, id: str, why: str) -> None:
        """Note why the worker of this row gives up."""
        self._why[id] = why


class RowMaker:
    """A worker that keeps the model. An actor of Ray Data, called with a row at a time, from several threads.

    Args:
        omni: the model, made anew in this process.
        in_flight: how many rows run at once.
        threads: CPU threads.
        attempts: the actor that counts.
    """

    def __init__(self, omni: Omni, in_flight: int, threads: int, attempts: Any) -> None:
        import ray
        import torch

        warnings.simplefilter("ignore")
        torch.set_num_threads(threads)
        self._attempts = attempts
        self._wrong = ""
        try:
            self._worker = Worker(omni, in_flight, lambda row: ray.get(attempts.begin.remote(row.id)))
        except Exception as error:  # raised here, Ray would print pages, and try again
            self._wrong = f"{type(error).__name__}: {error}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the row of a batch of one. The result is a `Made`, or why no row can be made."""
        return {"made": [pickle.dumps(self._wrong or self._made(pickle.loads(batch["row"][0])))]}

    def _made(self, row: Row) -> Made:
        import ray

        before, why = ray.get(self._attempts.of.remote(row.id))
        if before >= ATTEMPTS:
            ends = f"its worker ended {ATTEMPTS} times while it made this row"
            return Made(row.id, 0.0, {"error": "WorkerDiedError", "message": f"{ends}: {why}" if why else ends})
        try:
            return self._worker.make(row, alone=before > 0)
        except DeviceFailedError as error:  # this process can do nothing more: Ray starts another
            ray.get(self._attempts.note.remote(row.id, str(error)))
            os._exit(1)
