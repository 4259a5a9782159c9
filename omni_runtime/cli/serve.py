"""`omni serve`: a model behind OpenAI's API of images and videos, and a page in the browser."""

from __future__ import annotations

import argparse
import os
from typing import Any

from omni_runtime.cli.inputs import make_omni, settle, wrong_input
from omni_runtime.cli.options import UsageError

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
    settle(options)
    logs.to_stderr()
    how: dict[str, Any] = {"fuse": options.fuse or None, "compile": options.compile}
    if options.cache_backend is not None:
        how["cache_backend"] = options.cache_backend
    with wrong_input():
        settings = settings_of(options)
        omni = make_omni(options, cache_config=options.cache_config, **how)
        logs.adopt()
        sock = server.listening(options.host, options.port)
    with sock:
        app = build_app(omni, settings, failed=lambda: running.stop())
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


def _raise(error: BaseException) -> None:
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
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
    "drain_seconds",
)
