"""The caches whose overhead is compared, each installed as its users do: ours, and libraries that do the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cache_dit
import diffusers

import omni_kernels

STEPS = 40  # of a request
WARMUP = 4  # computed steps before the first skip: the library takes no derivative before the third
#: Thresholds that all distances are below, or none. At ≥ 1 or ≤ 0, caches would not measure distances at all.
ALWAYS_SMALL, NEVER_SMALL = 0.999, 1e-9

Install = Callable[[Any, float], Any]


def _ours(backend: str, threshold: str, **config: Any) -> Install:
    def install(pipe: Any, distance: float) -> None:
        limit = distance if threshold != "rel_l1_thresh" else (1e9 if distance == ALWAYS_SMALL else 1e-12)
        omni_kernels.patch(pipe, cache_backend=backend, cache_config={threshold: limit} | config)

    return install


def _library(order: int | None) -> Install:
    """The cache-dit library, configured for one forward a step; the result returns what to call before a request."""

    def install(pipe: Any, distance: float) -> Callable[[], None]:
        settings: dict[str, Any] = {
            "cache_config": cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                residual_diff_threshold=distance,
                max_warmup_steps=WARMUP,
                max_cached_steps=-1,
                max_continuous_cached_steps=-1,
                enable_separate_cfg=False,
                num_inference_steps=STEPS,
            )
        }
        if order is not None:
            settings["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        cache_dit.enable_cache(pipe.transformer, **settings)
        return lambda: cache_dit.refresh_context(pipe.transformer, **settings)

    return install


def _diffusers_first_block_cache(pipe: Any, distance: float) -> Callable[[], None]:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=distance))
    return pipe.transformer._reset_stateful_cache


_DBCACHE = {"max_warmup_steps": WARMUP, "max_continuous_cached_steps": -1}


@dataclass(frozen=True)
class Contender:
    """One way to cache.

    Attributes:
        name: as printed.
        install: (pipeline, distance below which steps are skipped) → what to call before each request, or None.
        runs: blocks that a skipped forward runs.
        peer: the contender that ours is compared with; None for peers, and if there is none.
    """

    name: str
    install: Install
    runs: int = 1
    peer: str | None = None


CONTENDERS = (
    Contender("cache_dit", _ours("cache_dit", "residual_diff_threshold", **_DBCACHE), peer="cache-dit library"),
    Contender("cache-dit library", _library(None)),
    Contender(
        "cache_dit, TaylorSeer 1",
        _ours("cache_dit", "residual_diff_threshold", enable_taylorseer=True, **_DBCACHE),
        peer="cache-dit library, TaylorSeer 1",
    ),
    Contender("cache-dit library, TaylorSeer 1", _library(1)),
    Contender("first_block_cache", _ours("first_block_cache", "threshold"), peer="diffusers first-block cache"),
    Contender("diffusers first-block cache", _diffusers_first_block_cache),
    Contender("tea_cache", _ours("tea_cache", "rel_l1_thresh"), runs=0),
)
