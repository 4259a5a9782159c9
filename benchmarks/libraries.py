"""Caches of other libraries as runs of a comparison: context managers that install a cache while they are open.

Each is installed on the pipeline as its library's documentation says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cache_dit
import diffusers
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.mag_cache import MagCacheState

from omni_runtime.cache.masks import steps_mask
from omni_runtime.compare.cells import Run

CACHE_DIT = f"cache-dit {importlib.metadata.version('cache-dit')}"
DIFFUSERS = f"diffusers {diffusers.__version__}"

#: our forecaster → the same forecaster's configuration in cache-dit
CALIBRATORS = {None: None, "foca": cache_dit.FoCaCalibratorConfig(), "dmd": cache_dit.DMDCalibratorConfig()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' logs and prints."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def cache_dit_run(name: str, method: str, settings: Mapping[str, Any], steps: int) -> Run:
    """DBCache of the cache-dit library, from the keys of our `cache_dit` backend."""

    @contextlib.contextmanager
    def install(pipe: Any) -> Iterator[None]:
        keys = dict(settings)
        policy = keys.pop("scm_steps_mask_policy", None)
        mask = None if policy is None else steps_mask(policy, steps)
        calibrator = CALIBRATORS[keys.pop("forecaster", None)]
        if keys.pop("enable_taylorseer", False):
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=keys.pop("taylorseer_order", 1))
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=keys.pop("Fn_compute_blocks", 1),
            Bn_compute_blocks=keys.pop("Bn_compute_blocks", 0),
            max_warmup_steps=keys.pop("max_warmup_steps", 4),
            max_continuous_cached_steps=keys.pop("max_continuous_cached_steps", 3),
            residual_diff_threshold=keys.pop("residual_diff_threshold", 0.24),
            steps_computation_mask=None if mask is None else list(mask),
            steps_computation_policy=keys.pop("scm_steps_policy", "dynamic"),
            num_inference_steps=steps if mask else None,
        )
        if keys:
            raise ValueError(f"the cache-dit library has no such settings: {sorted(keys)}")
        with _quiet():
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
            try:
                yield
            finally:
                cache_dit.disable_cache(pipe)

    return Run(name, CACHE_DIT, settings, steps, method, install)


def diffusers_run(name: str, method: str, config_class: str, settings: Mapping[str, Any], steps: int) -> Run:
    """A cache of diffusers, by the class name of its configuration; dtypes in the settings are given by name.

    If the configuration has the number of steps, it is set.
    """

    @contextlib.contextmanager
    def install(pipe: Any) -> Iterator[None]:
        transformer = pipe.transformer
        if not hasattr(transformer, "enable_cache"):
            raise NotImplementedError(f"{type(transformer).__name__} has no enable_cache")
        keys = {key: getattr(torch, value) if key.endswith("dtype") else value for key, value in settings.items()}
        config = getattr(diffusers, config_class)
        if any(field.name == "num_inference_steps" for field in dataclasses.fields(config)):
            keys["num_inference_steps"] = steps
        with _quiet():
            transformer.enable_cache(config(**keys))
            try:
                yield
            finally:
                transformer.disable_cache()

    return Run(name, f"{DIFFUSERS} {config_class}", settings, steps, method, install)


def mag_ratios(pipe: Any, generate: Callable[[], Any], steps: int) -> list[float]:
    """MagCache's ratios of one full run, calibrated by diffusers; those of the first guidance branch.

    Args:
        generate: runs the pipeline once, with `steps` steps.
    """
    found: list[list[float]] = []
    advance = MagCacheState.reset

    @functools.wraps(advance)
    def keep(state: MagCacheState) -> None:
        found.append(list(state.calibration_ratios))
        advance(state)

    transformer = pipe.transformer
    with _quiet():
        # One step too many, so that the ratios are kept until the end of the request resets them.
        transformer.enable_cache(diffusers.MagCacheConfig(num_inference_steps=steps + 1, calibrate=True))
        MagCacheState.reset = keep
        try:
            generate()
        finally:
            MagCacheState.reset = advance
            transformer.disable_cache()
    ratios = next((one for one in found if len(one) == steps), None)
    if ratios is None:
        raise RuntimeError(f"diffusers' MagCache recorded {[len(one) for one in found]} ratios; {steps} were expected")
    return ratios


def is_clean(pipe: Any) -> bool:
    """Whether the transformer has no hook of diffusers and no wrapper of cache-dit left."""
    hooked = [m for m in pipe.transformer.modules() if isinstance(getattr(m, "_diffusers_hook", None), HookRegistry)]
    left = [registry for m in hooked if (registry := m._diffusers_hook).hooks]
    return not left and not getattr(pipe.transformer, "_is_cached", False)
