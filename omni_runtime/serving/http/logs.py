"""Logs: one JSON line per event on stderr. No prompt, path, key or traceback is in them.

With `--debug`, tracebacks are written to stderr, after the line of the request that they belong to.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
import warnings
from typing import Any

from omni_runtime.serving.http.errors import without_paths

LOGGER = logging.getLogger("omni.serve")


def event(name: str, **facts: Any) -> None:
    """Write one line. Facts that are None are left out."""
    told = {"time": _now(), "event": name, **{key: value for key, value in facts.items() if value is not None}}
    LOGGER.info("%s", json.dumps(told, default=str))


def failure(error: BaseException, request_id: str, debug: bool) -> None:
    """Write that something unexpected happened: its class and the request's id."""
    event("error", id=request_id, error=type(error).__name__)
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)


def _now() -> str:
    seconds = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds * 1000) % 1000:03d}Z"


class _Lines(logging.Formatter):
    """Our own lines as they are; those of libraries as JSON, without paths and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == LOGGER.name:
            return record.getMessage()
        told = {"time": _now(), "event": "library", "logger": record.name, "level": record.levelname.lower()}
        return json.dumps(told | {"message": without_paths(record.getMessage())[:500]})


def to_stderr() -> None:
    """Send all logs and warnings of this process to stderr, one JSON line each. For `omni serve`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    LOGGER.setLevel(logging.INFO)
    warnings.showwarning = _warned
    threading.excepthook = thread_ended
    adopt()


def adopt() -> None:
    """Loggers of libraries that were imported with handlers of their own use ours."""
    for logger in [*logging.root.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers.clear()
            logger.propagate = True


def thread_ended(thread: threading.ExceptHookArgs) -> None:
    """A thread has ended with an error that no one has caught."""
    event("error", thread=None if thread.thread is None else thread.thread.name, error=thread.exc_type.__name__)


def _warned(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    event("warning", category=category.__name__, message=without_paths(str(message))[:500])
