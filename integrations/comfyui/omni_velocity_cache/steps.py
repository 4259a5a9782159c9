"""Skips whole sampling steps in ComfyUI: the wrappers that a node adds to a model, and what they keep during a run.

ComfyUI's samplers ask a guider for the clean latents x0 that the model predicts from the latents x at a noise level σ,
guidance included. At a skipped step, that call is not made. What is forecast in its place is v = (x − x0) / σ: the
slope of the latents in σ. For models of flow matching it is their guided output, as `velocity_cache` caches it in a
diffusers pipeline. Schedules, forecasts and the corrector are that method's, too (`omni_runtime.cache`).

Samplers that draw new noise change x in a way that v does not foresee, so the last x0 is used again there. Samplers
that evaluate the model more than once a step raise an error, as soon as they do so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from omni_kernels import ops
from omni_runtime.cache import presets
from omni_runtime.cache.forecasters import make_forecaster
from omni_runtime.cache.history import History
from omni_runtime.cache.methods.velocity_cache import chosen
from omni_runtime.cache.output import Corrector, reached

#: ComfyUI's sampler functions without new noise: what is forecast is v. With all others it is x0.
WITHOUT_NOISE = {
    "sample_euler", "sample_dpmpp_2m", "sample_lms", "sample_ipndm", "sample_ipndm_v", "sample_deis",
    "sample_gradient_estimation", "sample_res_multistep", "sample_unipc", "sample_unipc_bh2",
}  # fmt: skip
#: One whose step moves the latents by exactly (σ_{i+1} − σ_i)·v, so that the corrector can be used.
ALONG = "sample_euler"
#: How far the σ of an evaluation may be from that of its step.
TOLERANCE = 1e-3

OTHERS = "Use one with a single evaluation in each step, such as euler or dpmpp_2m, or leave out Omni velocity cache"


class Run:
    """One run of a sampler.

    Args:
        sigmas: the noise levels, falling, one more than there are steps.
        asked: what is wanted.
        sampler: the name of the sampler's function.

    Attributes:
        answer: which steps are computed, and what to expect.
        computed: the steps that were computed so far.
    """

    def __init__(self, sigmas: Sequence[float], asked: presets.Asked, sampler: str) -> None:
        self._sigmas, self._sampler = [*sigmas], sampler
        self.answer = presets.answer(asked, len(sigmas) - 1, sigmas=self._sigmas[:-1])
        how = chosen(self.answer.schedule)
        self._mask, self._reach = self.answer.schedule.mask, how.reach
        self._by_slope = sampler in WITHOUT_NOISE
        self._corrector = Corrector(how.corrector_order) if sampler == ALONG else None
        forecaster = make_forecaster("newton", 1) if self._by_slope else make_forecaster("reuse")
        keep = None if self._corrector is None else max(forecaster.snapshots, how.corrector_order) + 1
        self._history = History(forecaster, keep)
        self._step = -1
        self.computed: list[int] = []

    def evaluate(self, x: torch.Tensor, sigma: float, model: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What the sampler gets for x0 at its next evaluation.

        Args:
            x: the latents.
            sigma: their noise level.
            model: computes x0.

        Returns:
            x0, of the shape and dtype of `x`.

        Raises:
            ValueError: the sampler evaluates the model more than once in a step.
        """
        self._step += 1
        expected = self._sigmas[self._step] if self._step < len(self._mask) else None
        if expected is None or not math.isclose(sigma, expected, rel_tol=TOLERANCE):
            raise ValueError(
                f"Omni velocity cache: the sampler {self._sampler.removeprefix('sample_')} evaluates the model more "
                f"than once in a step, so whole steps cannot be skipped. {OTHERS}"
            )
        if self._mask[self._step] or self._history.shape != x.shape:
            self.computed.append(self._step)
            return self._recorded(x, sigma, model())
        if not self._by_slope:
            return self._history.forecast(None, sigma).to(x.dtype)
        weights = self._history.weights(reached(self._history.positions, sigma, self._reach))
        assert weights is not None  # newton's weights need no snapshots
        if self._corrector is not None:
            self._corrector.skipped(sigma, self._length(sigma), weights)
        return self._clean(x, sigma, self._history.combined(weights))

    def _recorded(self, x: torch.Tensor, sigma: float, clean: torch.Tensor) -> torch.Tensor:
        """Record what was computed, and correct it for the skipped steps before it."""
        if not self._by_slope:
            self._history.record(clean.float(), None, sigma)
            return clean
        if self._corrector is not None and self._history.shape != x.shape:
            self._corrector.clear()
        slope = ops.linear_forecast(None, [x.float(), clean.float()], (1 / sigma, -1 / sigma))
        self._history.record(slope, None, sigma)
        weights = [1.0] if self._corrector is None else self._corrector.computed(sigma, self._length(sigma))
        if len(weights) == 1:
            return clean
        return self._clean(x, sigma, self._history.combined(weights[: len(self._history)]))

    def _length(self, sigma: float) -> float:
        return self._sigmas[self._step + 1] - sigma

    @staticmethod
    def _clean(x: torch.Tensor, sigma: float, slope: torch.Tensor) -> torch.Tensor:
        return ops.linear_forecast(x.float(), [slope], (-sigma,)).to(x.dtype)


class VelocityCache:
    """The wrappers of one node. A run's state is made when a sampler starts, and dropped when it ends in any way.

    Args:
        asked: what is wanted.

    Attributes:
        last: the steps that the last run computed, and their number of all.
    """

    def __init__(self, asked: presets.Asked) -> None:
        self._asked = asked
        self._runs: dict[int, Run] = {}
        self.last: tuple[list[int], int] = ([], 0)

    def sample(self, executor: Any, guider: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around a sampler's run (`WrappersMP.SAMPLER_SAMPLE`)."""
        if len(sigmas) < 2:
            return executor(guider, sigmas, *args, **kwargs)
        sampler = getattr(executor.class_obj, "sampler_function", executor.class_obj)
        name = getattr(sampler, "__name__", type(sampler).__name__)
        run = self._runs[id(guider)] = Run(sigmas.tolist(), self._asked, name)
        logging.info("Omni velocity cache: %s", run.answer)
        try:
            return executor(guider, sigmas, *args, **kwargs)
        finally:
            del self._runs[id(guider)]
            self.last = run.computed, len(sigmas) - 1

    def predict(
        self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, seed: Any = None
    ) -> torch.Tensor:
        """Around one evaluation of the model with its guidance (`WrappersMP.PREDICT_NOISE`)."""
        options = {} if model_options is None else model_options
        run = self._runs.get(id(executor.class_obj))
        if run is None:
            return executor(x, timestep, options, seed)
        hooks = "sampler_post_cfg_function"
        if len(options.get(hooks, ())) > len(executor.class_obj.model_options.get(hooks, ())):
            raise ValueError(
                "Omni velocity cache: this sampler needs the branches of guidance in each step (as those with cfg_pp "
                f"do), so whole steps cannot be skipped. {OTHERS}"
            )
        return run.evaluate(x, float(timestep.flatten()[0]), lambda: executor(x, timestep, options, seed))
