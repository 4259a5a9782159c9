"""`omni serve`: a model behind OpenAI's API of images and videos, and a page in the browser."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from omni_runtime.cli.inputs import gpus_of_workers, make_omni, settle, speed_of, threads_of_workers, wrong_input
from omni_runtime.cli.options import EXPECTED, UsageError
from omni_runtime.generation.omni import Omni

#: The environment variable that holds an API key.
KEY = "OMNI_API_KEY"


class ServerError(RuntimeError):
    """The server could not do its work; its message says why."""


def serve(options: argparse.Namespace) -> None:
    """Serve until the process is told to stop."""
    try:
        from omni_runtime.serving.http import logs, server
        from omni_runtime.serving.http.app import build_app
    except ModuleNotFoundError as error:
        raise UsageError(f"omni serve needs the package {error.name}: pip install 'omni-kernels[serve]'") from None
    gpus = None if options.replicas is None else gpus_of_workers(options, "--replicas")
    settle(options)
    logs.to_stderr()
    with wrong_input():
        settings = settings_of(options)
        omni = make_omni(options, **speed_of(options))
        logs.adopt()
        sock = server.listening(options.host, options.port)
    with sock:
        app: Any
        if options.replicas is None:
            app = build_app(omni, settings, failed=lambda: running.stop())
        else:
            app = _replicas(options, omni, settings, gpus, failed=lambda: running.stop())
        running = server.Server(app, sock)
        print(running.address, flush=True)
        finished = running.serve_until_stopped()
    service = app.state.service
    if service.stuck:  # what does not stop would keep the process
        logs.event("stuck")
        os._exit(1)
    if service.loaded.is_set():
        omni.close()
    if service.error is not None:
        with wrong_input():
            _raise(service.error)
    if not finished:
        raise ServerError("the server has stopped before all requests were finished")


def _replicas(
    options: argparse.Namespace, omni: Omni, settings: Any, gpus: bool | None, failed: Callable[[], None]
) -> Any:
    """The application in front of several replicas."""
    from omni_runtime.serving import deployment
    from omni_runtime.serving.replicas.fleet import Fleet, Front

    make = deployment.application_of(omni, settings, threads_of_workers(options))
    cluster = deployment.RayServe(make, settings, deployment.Scale(*options.replicas), gpus, quiet=not options.debug)
    name = str(omni.name)
    return Front(Fleet(cluster, settings, settings.name or os.path.basename(name.rstrip("/")) or name), failed)


def _raise(error: BaseException) -> None:
    if isinstance(error, ValueError | TypeError | OSError | ImportError) or type(error).__name__ in EXPECTED:
        raise error
    raise ServerError(f"the model could not be loaded: {type(error).__name__}: {error}") from error


def settings_of(options: argparse.Namespace) -> Any:
    """The server's settings.

    Raises:
        ValueError: a limit is not a positive number.
    """
    from omni_runtime.serving.http.settings import Settings

    keys = options.api_key or [key for key in [os.environ.get(KEY)] if key]
    given = {name: getattr(options, name) for name in LIMITS if getattr(options, name) is not None}
    return Settings(api_keys=tuple(keys), name=options.name, page=not options.no_page, debug=options.debug, **given)


#: Options that are settings of the same name.
LIMITS = (
    "max_batch",
    "in_flight",
    "memory",
    "queue",
    "deadline",
    "max_n",
    "max_steps",
    "max_side",
    "max_pixels",
    "max_frames",
    "max_prompt",
    "max_body",
    "max_held",
    "max_connections",
    "header_seconds",
    "body_seconds",
    "write_seconds",
    "drain_seconds",
)
