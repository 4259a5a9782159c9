"""Whole steps of a pipeline that has a method for them: vLLM-Omni's, from the model's call to the guided output.

There, `predict_noise_maybe_with_cfg` (or, with three branches and more, `predict_noise_with_multi_branch_cfg`) calls
the transformer for each CFG branch, gathers what other ranks have computed, and applies guidance. It is taken for the
one call of a step: a skipped step leaves out all of this. All else is as in `omni_runtime.cache.output`, with the
scheduler as the other seam: it opens the request, and steps with the forecast, or with the corrected output.

A pipeline of vLLM-Omni that calls its transformer itself (Z-Image) is cached by these calls, as in diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from omni_kernels.patching import Patch
from omni_runtime.cache.lifecycle import CURRENT, Sampling
from omni_runtime.cache.output import OutputSession

#: The methods of a pipeline that compute the guided model output of a step.
PREDICTIONS = ("predict_noise_maybe_with_cfg", "predict_noise_with_multi_branch_cfg")


def guides(pipe: Any) -> bool:
    """Whether a pipeline has one of `PREDICTIONS`."""
    return any(callable(getattr(type(pipe), name, None)) for name in PREDICTIONS)


class GuidedSession(OutputSession):
    """An `OutputSession` for which the prediction of a step's guided output is one call."""

    _predicting = False

    def take(self, sampling: Sampling, seams: Patch) -> None:
        """See `CacheSession.take`."""
        super().take(sampling, seams)
        for name in PREDICTIONS:
            predict = getattr(self.pipe, name, None)
            if predict is not None:
                seams.set_method(self.pipe, name, functools.partial(self._predicted, sampling, predict))

    def _predicted(self, sampling: Sampling, predict: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._predicting or CURRENT.get() is not sampling:
            return predict(*args, **kwargs)
        self._predicting = True
        try:
            return super()._answer(sampling, self._called(*args, *kwargs.values()), predict, *args, **kwargs)
        finally:
            self._predicting = False

    def _answer(self, sampling: Sampling, transformer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See `CacheSession._answer`. A transformer's call within a prediction is part of it."""
        if self._predicting:
            return call(*args, **kwargs)
        return super()._answer(sampling, transformer, call, *args, **kwargs)

    def _called(self, *arguments: Any) -> torch.nn.Module:
        """The transformer that a prediction calls: the pipeline's, or the one that is named in the arguments (Wan)."""
        given = (value for branch in _branches(arguments) for value in branch.values())
        return next((one for one in given if isinstance(one, torch.nn.Module)), self.transformer)

    def shape_of(self, *arguments: Any) -> tuple[Any, ...]:
        """See `OutputSession.shape_of`. Of a prediction, whether it is guided stands for the number of samples."""
        branches = _branches(arguments)
        if not self._predicting or not branches:
            return super().shape_of(*arguments)
        guided = next((one for one in arguments if isinstance(one, bool)), None)
        shapes = [tuple(one.shape) for branch in branches for one in branch.values() if isinstance(one, torch.Tensor)]
        return (guided, *shapes[:1]), *shapes


def _branches(arguments: Iterable[Any]) -> list[Mapping[str, Any]]:
    """The arguments of the transformer's calls in a prediction, one mapping for each CFG branch."""
    found: list[Mapping[str, Any]] = []
    for one in arguments:
        found += [each for each in (one if isinstance(one, list) else [one]) if isinstance(each, Mapping)]
    return found
