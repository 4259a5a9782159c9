"""A tiny pipeline whose transformer two ranks run together (context parallelism), on the CPU with gloo."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import pkgutil
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.models import families

RANKS = 2
#: So long a rank waits for the other.
PATIENCE = datetime.timedelta(seconds=60)


def of_each_rank(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank has found for a pipeline under `first_block_cache`: see `_rank`.

    Raises:
        RuntimeError: a rank has died.
    """
    context = multiprocessing.get_context("forkserver")
    builders = [f"{families.__name__}.{one.name}" for one in pkgutil.iter_modules(families.__path__)]
    context.set_forkserver_preload(["benchmarks.models.cells", *builders])  # imported once for all pipelines
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, folder, name, config)) for rank in range(RANKS)]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join()
        if any(one.exitcode for one in ranks):
            raise RuntimeError(f"the ranks ended with exit codes {[one.exitcode for one in ranks]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]


def _rank(rank: int, folder: str, name: str, config: dict[str, Any]) -> None:
    """Write `refused` (a message), or `steps` (the computed steps of each branch), `saved`, `run` and `off`.

    `off` is how far the result is from that of one rank, without a cache and with it.
    """
    import logging
    import warnings

    import torch
    from diffusers import ContextParallelConfig

    import omni_kernels
    from benchmarks.models import cells, tiny

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # type: ignore[method-assign]  # diffusers divides by this
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", PATIENCE, RANKS, rank)
    found: dict[str, Any] = {}
    begin = time.process_time()
    try:
        alone, shared = tiny.build(name), tiny.build(name)
        plain = alone.generate()
        try:
            with omni_kernels.patched(alone.pipe, "first_block_cache", config):
                cached = alone.generate()
        except ValueError as error:
            found["refused"] = cells.in_words(error, alone.pipe)
        try:
            shared.pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
            both = shared.generate()
        except Exception as error:
            words = re.sub(r"\d+", "n", cells.in_words(error, shared.pipe))  # so that equal reasons are equal
            found["refused"] = f"diffusers cannot run it in parallel: {words}"
        if "refused" not in found:
            with omni_kernels.patched(shared.pipe, "first_block_cache", config) as handle:
                try:
                    made = shared.generate()
                    report = handle.report
                    found["steps"] = {one: branch.computed for one, branch in report.branches.items()}
                    found |= {"saved": report.forwards_saved, "run": report.forwards}
                    found["off"] = [cells.off(both, plain), cells.off(made, cached)]
                except ValueError as error:
                    found["refused"] = cells.in_words(error, shared.pipe)
    finally:
        torch.distributed.destroy_process_group()
    found["seconds"] = time.process_time() - begin
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
