"""A pipeline for one request: a shallow copy, with a scheduler of its own, that hands its transformer calls over."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from omni_runtime.cache.lifecycle import Sampling


class Front:
    """Stands for a transformer in a pipeline. It is called like it, has its attributes, and passes calls on.

    Args:
        module: the transformer.
        answer: (transformer, arguments) → the result of a call.
        sampling: returns the sampling under way; None without a cache.
    """

    def __init__(
        self, module: torch.nn.Module, answer: Callable[..., Any], sampling: Callable[[], Sampling | None]
    ) -> None:
        vars(self).update(_omni_module=module, _omni_answer=answer, _omni_sampling=sampling)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the transformer."""
        return self._omni_answer(self._omni_module, args, kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """As diffusers' `CacheMixin.cache_context`: the name of the CFG branch of the calls within."""
        sampling = self._omni_sampling()
        with contextlib.nullcontext() if sampling is None else sampling.within(name, kwargs.get("step_index")):
            yield

    @property
    def __class__(self) -> type:  # `isinstance` in the pipeline is what it would be
        return type(self._omni_module)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("the class of a transformer in a request's pipeline cannot be changed")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._omni_module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._omni_module, name, value)


def copy_for_request(
    pipe: Any, names: dict[torch.nn.Module, str], answer: Callable[..., Any], sampling: Callable[[], Sampling | None]
) -> Any:
    """A copy of the pipeline with schedulers and guiders of its own, which shares the rest, and has `Front`s.

    Args:
        names: transformer → its name in the pipeline.
        answer, sampling: as for `Front`.
    """
    from diffusers import ConfigMixin

    one = copy.copy(pipe)
    # Written to the dict: the pipeline would note in its configuration that its components have changed.
    vars(one).update({name: Front(module, answer, sampling) for module, name in names.items()})
    for name, part in vars(pipe).items():  # not its `components`, which leave out those that may be None
        if isinstance(part, ConfigMixin) and not isinstance(part, torch.nn.Module):  # schedulers, guiders: have state
            vars(one)[name] = copy.deepcopy(part)
    # The bars of several requests would overwrite each other.
    vars(one)["_progress_bar_config"] = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    if getattr(pipe, "_all_hooks", None):  # offloaded: other requests use the models, too
        vars(one)["maybe_free_model_hooks"] = _nothing
    return one


def _nothing() -> None:
    pass
