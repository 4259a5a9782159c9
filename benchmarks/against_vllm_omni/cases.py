"""The models and settings of the comparison with vLLM-Omni. Data only: both environments import this."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Model → its pipeline's class. "tiny …" is of `benchmarks.models.tiny`, with random weights; the others are embedded.
MODELS = {
    "tiny Qwen-Image": "QwenImagePipeline",
    "emoji-qwen-image": "QwenImagePipeline",
    "tiny Z-Image": "ZImagePipeline",
    "emoji-z-image": "ZImagePipeline",
    "tiny FLUX": "FluxPipeline",
}
#: Numbers of steps of the tiny models, and of the embedded ones.
TINY_STEPS, STEPS = (50, 20, 7), (50,)
#: Settings that are run at fewer than this many steps: those of the masks.
FEW = 8
PROMPT, NEGATIVE = "red apple on blue", " "

_IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]


@dataclass(frozen=True)
class Setting:
    """A cache and its configuration, as each side spells it.

    Attributes:
        theirs, ours: the configurations. `ours` is `theirs` where nothing else is given: the keys are the same.
    """

    name: str
    backend: str
    theirs: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.backend}: {self.name}"


def steps_of(model: str) -> tuple[int, ...]:
    """The numbers of steps of a model's requests."""
    return TINY_STEPS if model.startswith("tiny") else STEPS


def calls_of(model: str, guided: bool) -> int:
    """How often a step calls the transformer: Z-Image's guidance runs in one batch."""
    return 2 if guided and MODELS[model] != "ZImagePipeline" else 1


def sigmas(steps: int) -> list[float]:
    """The noise levels before the scheduler's shift.

    They are given to both, because the default of vLLM-Omni's Z-Image pipeline is that of an older diffusers: there,
    the last step is one from σ = 0 to 0.
    """
    return [1.0 - step / steps for step in range(steps)]


def ratios(steps: int) -> list[float]:
    """Magnitude ratios for MagCache, the same for both sides; they belong to no model."""
    return [1.0 if step == 0 else 1.0 + 0.05 * math.sin(step) for step in range(steps)]


def settings(steps: int, calls: int) -> Iterator[Setting]:
    """The settings for requests of `steps` steps, in which guidance calls the transformer `calls` times a step."""
    if steps >= FEW:
        yield from _others(steps, calls)
    for policy in ("slow", "medium", "fast", "ultra"):
        mask = {"scm_steps_mask_policy": policy, "scm_steps_policy": "dynamic", "residual_diff_threshold": 0.4}
        yield Setting(f"SCM {policy}, dynamic", "cache_dit", mask)
    mask = {"scm_steps_mask_policy": "ultra", "scm_steps_policy": "static", "enable_taylorseer": True}
    yield Setting("SCM ultra, static, TaylorSeer 1", "cache_dit", mask)


def _others(steps: int, calls: int) -> Iterator[Setting]:
    for threshold in (0.1, 0.3):
        yield Setting(f"{threshold}", "tea_cache", {"rel_l1_thresh": threshold})
    yield Setting("None", "tea_cache", {"rel_l1_thresh": None})
    for threshold in (0.05, 0.15, 0.4):
        yield Setting(f"{threshold}, poly(r) = r", "tea_cache", {"rel_l1_thresh": threshold, "coefficients": _IDENTITY})

    loose = {"residual_diff_threshold": 0.4}
    yield Setting("defaults", "cache_dit")
    yield Setting("0.08, warmup 8", "cache_dit", {"residual_diff_threshold": 0.08, "max_warmup_steps": 8})
    yield Setting("0.4, no limit in a row", "cache_dit", loose | {"max_continuous_cached_steps": -1})
    yield Setting("0.4, at most 5 skipped", "cache_dit", loose | {"max_cached_steps": 5})
    yield Setting("F2B1", "cache_dit", {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1})
    yield Setting("TaylorSeer 1", "cache_dit", {"enable_taylorseer": True, "taylorseer_order": 1})
    for warmup in (4, 8):
        order = {"enable_taylorseer": True, "taylorseer_order": 2, "max_warmup_steps": warmup}
        yield Setting(f"TaylorSeer 2, 0.4, warmup {warmup}", "cache_dit", loose | order)
    hint = 2 * steps // 5
    refreshes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("once", loose),
        ("repeat", loose | {"scm_steps_mask_policy": "fast"}),
    )
    for policy, keys in refreshes:
        named = f"refresh {policy} at step {hint}, 0.4" + ", SCM fast" * (policy == "repeat")
        keys |= {"force_refresh_step_policy": policy}
        theirs = keys | {"force_refresh_step_hint": hint * calls}  # which counts calls
        yield Setting(named, "cache_dit", theirs, keys | {"force_refresh_step_hint": hint})

    for threshold, most, retention in ((0.24, 5, 0.1), (0.06, 3, 0.2), (0.12, 2, 0.3)):
        keys = {"mag_threshold": threshold, "mag_max_skip_steps": most, "mag_retention_ratio": retention}
        keys |= {"mag_ratios": ratios(steps), "num_inference_steps": steps}
        yield Setting(f"{threshold}, at most {most} in a row, retention {retention}", "mag_cache", keys)

    keys = {"sea_threshold": 0.25, "sea_residual_order": 1}
    yield Setting("0.25, order 1", "sea_cache", keys)
