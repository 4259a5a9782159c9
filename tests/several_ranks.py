"""Runs functions of test modules on several ranks, as torchrun starts them, with gloo on the CPU.

    results = on_ranks(compute, directory, ranks=4)   # what compute() has returned on each rank

A rank that raises has {"error": "ValueError: ..."} as its result; one that ends its process has None.
"""

import contextlib
import json
import logging
import os
import socket
import warnings
from unittest import mock

import torch
from two_ranks import NEEDED, _stand_in, start

__all__ = ["NEEDED", "free_port", "on_ranks"]


def on_ranks(compute, directory, ranks=2):
    """What `compute()`, a function of a test module, returns on each rank, after a round trip through JSON."""
    directory.mkdir(exist_ok=True)
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):
        start(_rank, (compute, str(directory), ranks, free_port()), ranks)
    files = [directory / f"{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text(encoding="utf-8")) if file.exists() else None for file in files]


def free_port():
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _rank(rank, compute, directory, ranks, port):
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    _stand_in()
    with mock.patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
        try:
            results = compute()
        except Exception as error:
            results = {"error": f"{type(error).__name__}: {error}"}
        with open(f"{directory}/{rank}.part", "w", encoding="utf-8") as file:
            json.dump(results, file)
        os.replace(f"{directory}/{rank}.part", f"{directory}/{rank}.json")
        from omni_runtime.parallel import world

        if world._world is not None:
            world._world.leave()
