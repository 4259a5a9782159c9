"""Starts Ray, or joins a cluster, with time limits that a busy machine can keep.

If the variable RAY_ADDRESS names a cluster, that one is joined. Else Ray is started here, and ends with the process.
Its ports are open on all addresses of the machine, whatever its settings are. So it asks everyone for a token that only
this process and its workers have.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
from collections.abc import Iterator
from typing import Any

__all__ = ["NEEDED", "TooFewError", "WorkersFailedError", "installed", "ray_runs", "resources"]

NEEDED = "Ray is not installed: pip install 'omni-kernels[ray]'"

#: Ray's settings, unless the environment has them. Its own limits end it on a busy machine: 30 s for the start of the
#: local scheduler, 5 s for each check of Serve's proxy.
SETTINGS = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class TooFewError(ValueError):
    """The cluster has fewer GPUs or CPUs than are needed."""


class WorkersFailedError(RuntimeError):
    """Workers cannot be started, or are lost for good."""


def installed() -> bool:
    """Whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


@contextlib.contextmanager
def ray_runs(cpus: int, quiet: bool = True) -> Iterator[Any]:
    """Context manager: the module `ray`, which is connected. A Ray that runs already in this process is used.

    The thread that enters must not end before it leaves: the processes of a Ray that is started here end with it.

    Args:
        cpus: how many processes a Ray that is started here must have room for.
        quiet: hide Ray's own messages.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        WorkersFailedError: Ray cannot be started, or lost its connection.
    """
    if not installed():
        raise ModuleNotFoundError(NEEDED)
    alone = not os.environ.get("RAY_ADDRESS")
    settings = dict(SETTINGS)
    if quiet:
        settings["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    if alone and "RAY_AUTH_MODE" not in os.environ:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in settings.items():  # read when Ray is imported
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    given: dict[str, Any] = {"log_to_driver": not quiet, "configure_logging": True}
    given["logging_level"] = logging.ERROR if quiet else logging.INFO
    if alone:
        given |= {"address": "local", "include_dashboard": False, "num_cpus": max(cpus, os.cpu_count() or 1)}
    try:
        ray.init(**given)
    except Exception as error:
        raise WorkersFailedError(f"Ray cannot be started: {error}") from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise WorkersFailedError(f"the workers failed: {_cause(error)}") from error
    finally:
        ray.shutdown()


def _cause(error: BaseException) -> str:
    """The last line of an error, which with Ray's errors is the one that a worker has raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def resources(ray: Any) -> tuple[int, int]:
    """The GPUs and CPUs of the cluster."""
    found = ray.cluster_resources()
    return int(found.get("GPU", 0)), int(found.get("CPU", 0))
