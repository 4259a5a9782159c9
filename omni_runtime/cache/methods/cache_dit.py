"""DBCache, TaylorSeer and SCM, with the keys of the cache-dit project and of vLLM-Omni.

What the first Fn blocks add to the hidden states is compared with what they added in the last computed step. While
Σ|x − y| / Σ|y| is below `residual_diff_threshold`, blocks [Fn, N−Bn) are skipped, and their last residual is added
again, or a forecast of it (TaylorSeer, arXiv:2503.06923).

Every `warmup_interval`-th of the first `max_warmup_steps` is always computed. At most `max_cached_steps` are skipped
in a request, and at most `max_continuous_cached_steps` in a row. A steps computation mask (SCM), given as a list or as
the name of a policy, computes the steps at its ones. At its zeros, the distance decides ("dynamic"), or the steps are
always skipped ("static").

site: blocks [Fn, N−Bn) · signal: residual of the first Fn blocks · gate: threshold, under limits and a mask ·
forecaster: reuse, TaylorSeer, or another

`engine` selects what runs the blocks: this project, or the installed cache-dit library (`omni_runtime.cache.library`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omni_runtime.cache import config as keys
from omni_runtime.cache import library
from omni_runtime.cache.forecasters import make_forecaster
from omni_runtime.cache.gates import Limits, RefreshedGate, ThresholdGate
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.masks import POLICIES, parse_mask, steps_mask
from omni_runtime.cache.methods.method import Config, Method
from omni_runtime.cache.methods.shared_keys import (
    DECISION_KEYS,
    FORECASTER_KEYS,
    TOLD_STEPS,
    drift_tolerance,
    warn_of_told_steps,
)
from omni_runtime.cache.models import ModelRow
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.signals import FirstBlocksResidual


def _mask(config: Config, steps: int) -> tuple[int, ...] | None:
    mask = config["steps_computation_mask"]
    if mask is None:
        policy = config["scm_steps_mask_policy"]
        return None if policy is None else steps_mask(policy, steps)
    if len(mask) != steps:
        raise ValueError(f"steps_computation_mask has {len(mask)} entries, but the request has {steps} steps")
    return mask


def _request_mask(config: Config, request: Request) -> tuple[int, ...] | None:
    warn_of_told_steps(config, request)
    mask, policy = _mask(config, request.steps), config["scm_steps_mask_policy"]
    if mask is None and policy is not None:
        note = f"there is no mask {policy!r} for {request.steps} steps: the distance alone decides"
        if note not in request.notes:
            request.notes.append(note)
    return mask


def _gate(config: Config) -> Callable[[Request], ThresholdGate]:
    def gate(request: Request) -> ThresholdGate:
        limits = Limits(
            warmup=config["max_warmup_steps"],
            warmup_interval=config["warmup_interval"],
            mask=_request_mask(config, request),
            static=config["scm_steps_policy"] == "static",
            most_skips=config["max_cached_steps"],
            longest_run=config["max_continuous_cached_steps"],
        )
        threshold, after = config["residual_diff_threshold"], config["force_refresh_step_hint"]
        if after is None:
            return ThresholdGate(limits, threshold)
        return RefreshedGate(limits, threshold, after, config["force_refresh_step_policy"] == "repeat")

    return gate


def _parts(config: Config, row: ModelRow, blocks: int) -> Parts:
    forecaster, order = library.forecaster_of(config)
    return Parts(
        first=config["Fn_compute_blocks"],
        last=blocks - config["Bn_compute_blocks"],
        signal=FirstBlocksResidual(),
        gate=_gate(config),
        forecaster=make_forecaster(forecaster or "reuse", order),
        drift_tolerance=drift_tolerance(config),
    )


def _relations(config: Config, blocks: int | None, steps: int | None) -> None:
    first, last = config["Fn_compute_blocks"], config["Bn_compute_blocks"]
    if blocks is not None and first + last >= blocks:
        raise ValueError(
            f"Fn_compute_blocks + Bn_compute_blocks is {first} + {last}: of the transformer's {blocks} blocks at "
            "least one must be left to skip"
        )
    enabled = [key for key in library.ENABLES if config[key]]
    if len(enabled) > 1:
        raise ValueError(f"{enabled[0]} contradicts {enabled[1]}: give one of them")
    if enabled and config["forecaster"] not in (None, library.ENABLES[enabled[0]]):
        raise ValueError(f"{enabled[0]} contradicts forecaster={config['forecaster']!r}: give one of them")
    if config["scm_steps_mask_policy"] is not None and config["steps_computation_mask"] is not None:
        raise ValueError("scm_steps_mask_policy and steps_computation_mask cannot be combined: give one of them")
    told = config["num_inference_steps"] if steps is None else steps
    if told is not None and config["steps_computation_mask"] is not None:
        _mask(config, told)
    if config["engine"] == "library":
        library.check(config)


def _mask_key() -> keys.Key:
    def convert(value: Any) -> tuple[int, ...]:
        return parse_mask(value)

    allowed = "None or one 0 or 1 for each step, as a list or a string"
    doc = "explicit steps computation mask: 1 computes the step"
    return keys.Key("steps_computation_mask", None, "mask", allowed, doc, convert)


CACHE_DIT = Method(
    name="cache_dit",
    summary="DBCache, with TaylorSeer and SCM: skip the middle blocks while what the first Fn add has changed little",
    keys=(
        keys.integer("Fn_compute_blocks", 1, 1, None, "first blocks, always computed and watched"),
        keys.integer("Bn_compute_blocks", 0, 0, None, "last blocks, always computed"),
        keys.integer("max_warmup_steps", 4, 0, None, "first steps, always computed"),
        keys.integer("warmup_interval", 1, 1, None, "within the warmup, compute every n-th step"),
        keys.integer("max_cached_steps", -1, -1, None, "most steps skipped in a request; −1: no limit"),
        keys.integer("max_continuous_cached_steps", 3, -1, None, "most steps skipped in a row; −1: no limit"),
        keys.number("residual_diff_threshold", 0.24, "distance below which a step is skipped; ≤ 0 never, ≥ 1 always"),
        keys.flag("enable_taylorseer", False, "forecast the residual by TaylorSeer instead of reusing it"),
        keys.integer("taylorseer_order", 1, 0, 3, "order of TaylorSeer; see forecaster_order"),
        keys.flag("enable_foca", False, "the same as forecaster='foca'"),
        keys.flag("enable_dmd", False, "the same as forecaster='dmd'"),
        keys.choice(
            "scm_steps_mask_policy",
            None,
            POLICIES,
            "steps computation mask by name; fewer than 8 steps have one if they are 4 or 6",
        ),
        _mask_key(),
        keys.choice(
            "scm_steps_policy",
            "dynamic",
            ("dynamic", "static"),
            "what happens at the mask's zeros. dynamic: the distance decides; static: the step is skipped",
        ),
        keys.integer(
            "force_refresh_step_hint",
            None,
            1,
            None,
            "the first step, counted from 0, that is treated as a request's first, with warmup, limits and mask",
        ),
        keys.choice(
            "force_refresh_step_policy",
            "once",
            ("once", "repeat"),
            "whether that is done once, or again after as many steps",
        ),
        TOLD_STEPS,
        keys.choice(
            "engine", "own", ("own", "library"), "what runs the blocks: this project, or the cache-dit library"
        ),
        *DECISION_KEYS,
        *FORECASTER_KEYS,
    ),
    parts=_parts,
    relations=_relations,
    mask=_request_mask,
)
