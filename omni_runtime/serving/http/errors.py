"""Errors as OpenAI's API has them: `{"error": {"message", "type", "param", "code"}}`, with the field at fault.

No answer holds a path of the server, a traceback or a secret.
"""

from __future__ import annotations

import re
from typing import Any

from omni_runtime.generation.result import NotANumberError
from omni_runtime.serving.jobs import CancelledError, DeadlineError, DeviceFailedError, QueueFullError

#: Status of an answer that no one receives: the client has left.
CLIENT_LEFT = 499

#: Status → (OpenAI's error type, what the log and the metrics call it)
KINDS: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid"),
    401: ("invalid_request_error", "unauthorized"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "invalid"),
    408: ("invalid_request_error", "invalid"),
    409: ("invalid_request_error", "invalid"),
    413: ("invalid_request_error", "too_large"),
    429: ("rate_limit_error", "busy"),
    CLIENT_LEFT: ("server_error", "cancelled"),
    500: ("server_error", "failed"),
    503: ("server_error", "not_ready"),
    504: ("server_error", "deadline"),
}

#: Arguments of the pipeline → the field that a client knows.
FIELDS = {
    "height": "size",
    "width": "size",
    "num_inference_steps": "steps",
    "steps": "steps",
    "true_cfg_scale": "guidance",
    "guidance_scale": "guidance",
    "num_frames": "frames",
    "max_sequence_length": "prompt",
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image": "image",
    "seed": "seed",
    "cache_backend": "cache_backend",
    "cache_config": "cache_config",
}

_PATH = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;]+[/\\])+[^\s'\",;]*")


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP's status code.
        message: what is wrong, for the client to read.
        param: the field at fault; None if there is none.
        code: the error's short name.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        """The answer."""
        kind, _ = KINDS.get(self.status, ("server_error", "failed"))
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """The client's mistake, in this field. The message names it."""
    if param is not None and param not in message:
        message = f"{param}: {message}"
    return ApiError(400, message, param=param, code=code)


def outcome_of(status: int) -> str:
    """What the log and the metrics call an answer with this status."""
    return "ok" if status < 400 else KINDS.get(status, ("", "failed"))[1]


def without_paths(text: str) -> str:
    """`text` on one line, with paths of files replaced."""
    return _PATH.sub("<path>", " ".join(text.split()))


def of_submission(error: BaseException, retry_after: int) -> ApiError:
    """The answer to a request that the engine did not take.

    Args:
        error: what `Engine.submit` has raised.
        retry_after: seconds after which a full queue may have room.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(
            429, "too many requests wait already: try again later", code="queue_full", retry_after=retry_after
        )
    if isinstance(error, ValueError | TypeError | FileNotFoundError):
        message = without_paths(str(error))
        return invalid(_field_of(message), message)
    if isinstance(error, DeviceFailedError):
        return device_failed()
    if isinstance(error, RuntimeError) and "closed" in str(error):
        return ApiError(503, "the server is stopping", code="stopping", retry_after=retry_after)
    return _failed(error)


def of_job(error: BaseException, began: bool) -> ApiError:
    """The answer to a request that the engine took and that did not succeed.

    Args:
        error: what it ended with.
        began: whether a forward was made for it. What is raised before is the pipeline's own check of its arguments.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), code="deadline_exceeded")
    if isinstance(error, CancelledError):
        return ApiError(CLIENT_LEFT, str(error), code="cancelled")
    if isinstance(error, DeviceFailedError):
        return device_failed()
    if isinstance(error, NotANumberError):
        return ApiError(500, str(error), code="not_a_number")
    if not began and isinstance(error, ValueError | TypeError):
        message = without_paths(str(error))
        return invalid(_field_of(message), message)
    return _failed(error)


def device_failed() -> ApiError:
    """The answer to all requests once the device, or the engine, can do nothing more."""
    return ApiError(503, "the device has failed: the server must be started again", code="device_failed")


def _failed(error: BaseException) -> ApiError:
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return ApiError(500, "the device has no memory for this request: ask for a smaller size", code="out_of_memory")
    return ApiError(500, "the server could not finish this request", code="internal_error")


def _field_of(message: str) -> str | None:
    """The field that a message of `Omni.generate` or of a pipeline begins with, or names first."""
    for word in re.findall(r"\w+", message)[:12]:
        if word in FIELDS:
            return FIELDS[word]
    return None
