"""Warns when the transformer is called outside a call of the patched pipeline: nothing is cached there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


class Watch:
    """Warns once of a transformer call outside the pipeline's calls.

    Args:
        transformer: the transformer to watch.
        name: the backend's name, for the warning.
    """

    held = True

    def __init__(self, transformer: torch.nn.Module, name: str) -> None:
        self.owner = transformer
        self._name = name
        self._hook: Any = None
        self._over = False
        self.listen()

    def listen(self) -> None:
        """Add the hook to the transformer, between the pipeline's calls, unless the warning was given."""
        if self._hook is None and not self._over:
            self._hook = self.owner.register_forward_pre_hook(self)

    def __call__(self, transformer: torch.nn.Module, args: Any) -> None:
        """Warn: the transformer is being called."""
        if torch.compiler.is_compiling():
            return
        self.restore()
        self._over = True
        warnings.warn(
            f"the transformer was called outside a call of the patched pipeline: {self._name} caches nothing there. "
            "For a denoising loop of your own, use `with handle.sampling():`. Another pipeline that shares the "
            "transformer can have a cache of its own",
            stacklevel=5,
        )

    def conflict(self) -> str:
        """See `omni_kernels.patching.changes`. No conflict: a hook can be removed at any time."""
        return ""

    def restore(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __reduce__(self) -> Any:
        return _no_watch, ()


@contextlib.contextmanager
def unwatched(transformers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Context manager: an engine calls these transformers, and each request has a cache of its own: no warnings."""
    watches = [
        hook for one in transformers for hook in one._forward_pre_hooks.values() if isinstance(hook, Watch)
    ]  # fmt: skip
    for watch in watches:
        watch.restore()
    try:
        yield
    finally:
        for watch in watches:
            watch.listen()


def _no_watch() -> Callable[..., None]:
    """The hook that a copy of the transformer gets instead: it does nothing."""
    return _silent


def _silent(transformer: torch.nn.Module, args: Any) -> None:
    return None
