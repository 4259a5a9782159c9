"""The cases of compare_trees.py: settings of every cache on the tiny and embedded models, with requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]

# Two requests in a row with different sizes, prompts, seeds and numbers of steps.
TWO: tuple[Config, ...] = (
    {"num_inference_steps": 10},
    {"num_inference_steps": 8, "prompt": "a dog on a long road", "seed": 1, "width": 96},
)
# Three requests of one kind, whose schedule is replayed, then one of another kind.
ALIKE: tuple[Config, ...] = (
    {"num_inference_steps": 10},
    {"num_inference_steps": 10, "seed": 1},
    {"num_inference_steps": 10, "seed": 2, "prompt": "a cow"},
    {"num_inference_steps": 8, "seed": 3},
)
MANY: tuple[Config, ...] = ({"num_inference_steps": 10, "prompt": ["a cat", "a long dog"], "images": 2},)


@dataclass(frozen=True)
class Case:
    """One setting on one model, and its requests.

    Attributes:
        model: a key of `_tiny_models`, or the name of an embedded model.
        backend: None for no cache.
        requests: what differs from the defaults in each request. "seed" is the generator's seed, "images" the number of
            reference images for an edit pipeline.
        dtype: name of a torch dtype.
    """

    name: str
    model: str
    backend: str | None = None
    config: Config = field(default_factory=dict)
    requests: tuple[Config, ...] = TWO
    dtype: str = "float32"
    fuse: bool = False
    quick: bool = False


# At least one setting of each method, at thresholds where the tiny models skip some steps and compute others.
CORE: dict[str, tuple[str, Config]] = {
    "tea": ("tea_cache", {"rel_l1_thresh": 0.2, "coefficients": [0.0, 0.0, 0.0, 1.0, 0.0]}),
    "dbcache": ("cache_dit", {"residual_diff_threshold": 0.12, "max_warmup_steps": 2}),
    "taylorseer": (
        "cache_dit",
        {"residual_diff_threshold": 0.2, "max_warmup_steps": 3, "enable_taylorseer": True, "Bn_compute_blocks": 1},
    ),
    "first block": ("first_block_cache", {"threshold": 0.08}),
    "magnitude": (
        "mag_cache",
        {"mag_ratios": [1.0, 0.99, 1.03, 0.98, 1.01, 0.97, 1.05, 0.99, 0.96, 0.9], "threshold": 0.08},
    ),
    "sea": ("sea_cache", {"threshold": 0.3}),
    "velocity": ("velocity_cache", {}),
    "easy": ("easy_cache", {"thresh": 0.2, "ret_steps": 2}),
}
LIBRARY: Config = {"engine": "library", "residual_diff_threshold": 0.15, "max_warmup_steps": 3}

_DB: Config = {"residual_diff_threshold": 0.15, "max_warmup_steps": 2, "max_continuous_cached_steps": -1}
_ALL: Config = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": -1, "max_warmup_steps": 3}
_IDENTITY: Config = {"coefficients": [0.0, 0.0, 0.0, 1.0, 0.0]}
_FORECASTERS = ("reuse", "taylorseer", "newton", "hermite", "foca", "dmd")
_REPLAY: Config = {"decision": "replay"}

# Settings of single methods, by name.
SETTINGS: dict[str, tuple[str, Config]] = {
    "tea own polynomial": ("tea_cache", {}),
    "tea tight": ("tea_cache", _IDENTITY | {"rel_l1_thresh": 0.1}),
    "tea loose": ("tea_cache", _IDENTITY | {"rel_l1_thresh": 0.9}),
    "tea polynomial": ("tea_cache", {"coefficients": [1.0, -0.5, 0.3, 0.8, 0.01]}),
    "db defaults": ("cache_dit", {}),
    "db Fn 2": ("cache_dit", _DB | {"Fn_compute_blocks": 2}),
    "db Fn 1 Bn 2": ("cache_dit", _DB | {"Bn_compute_blocks": 2}),
    "db Fn 2 Bn 1": ("cache_dit", _DB | {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}),
    "db no warmup": ("cache_dit", _DB | {"max_warmup_steps": 0}),
    "db warmup interval": ("cache_dit", _DB | {"max_warmup_steps": 6, "warmup_interval": 2}),
    "db at most 3": ("cache_dit", _ALL | {"max_cached_steps": 3}),
    "db runs of 1": ("cache_dit", _ALL | {"max_continuous_cached_steps": 1}),
    "db never": ("cache_dit", {"residual_diff_threshold": 0.0}),
    "db always": ("cache_dit", _ALL),
    "db taylorseer 2": ("cache_dit", _ALL | {"enable_taylorseer": True, "taylorseer_order": 2}),
    "db taylorseer 3": ("cache_dit", _ALL | {"enable_taylorseer": True, "taylorseer_order": 3, "max_warmup_steps": 5}),
    "db scm fast": ("cache_dit", _DB | {"scm_steps_mask_policy": "fast"}),
    "db scm slow static": ("cache_dit", _DB | {"scm_steps_mask_policy": "slow", "scm_steps_policy": "static"}),
    "db scm ultra static": ("cache_dit", _DB | {"scm_steps_mask_policy": "ultra", "scm_steps_policy": "static"}),
    "db replay": ("cache_dit", _DB | _REPLAY),
    "db replay any drift": ("cache_dit", _DB | _REPLAY | {"drift_tolerance": 100.0}),
    "db replay no drift": ("cache_dit", _DB | _REPLAY | {"drift_tolerance": 0.0}),
    "tea replay": ("tea_cache", _IDENTITY | _REPLAY | {"rel_l1_thresh": 0.15}),
    "first block replay": ("first_block_cache", _REPLAY | {"threshold": 0.1}),
    "sea replay": ("sea_cache", _REPLAY | {"threshold": 0.4}),
    "easy replay": ("easy_cache", _REPLAY | {"thresh": 0.3, "ret_steps": 2}),
    "first block always": ("first_block_cache", {"threshold": 1.0}),
    "first block newton": ("first_block_cache", {"threshold": 0.1, "forecaster": "newton", "forecaster_order": 2}),
    "mag no retention": ("mag_cache", CORE["magnitude"][1] | {"retention_ratio": 0.0}),
    "mag runs of 1": ("mag_cache", CORE["magnitude"][1] | {"max_skip_steps": 1, "threshold": 9.0}),
    "mag taylorseer": ("mag_cache", CORE["magnitude"][1] | {"forecaster": "taylorseer", "threshold": 0.2}),
    "sea power 2": ("sea_cache", {"threshold": 0.4, "power_exp": 2.0, "max_consecutive_cached": -1}),
    "sea runs of 1": ("sea_cache", {"threshold": 2.0, "max_consecutive_cached": 1}),
    "sea newton": ("sea_cache", {"threshold": 0.4, "forecaster": "newton"}),
    "velocity budget 4": ("velocity_cache", {"budget": 4}),
    "velocity speedup 3": ("velocity_cache", {"speedup": 3.0}),
    "velocity steps": ("velocity_cache", {"schedule": [0, 1, 4, 5]}),
    "velocity qwen-image-25": ("velocity_cache", {"schedule": "qwen-image-25"}),
    "velocity lemica 8": ("velocity_cache", {"schedule": "lemica-z-image-turbo-8"}),
    "velocity autohq-25": ("velocity_cache", {"schedule": "autohq-25"}),
    "velocity scm fast": ("velocity_cache", {"schedule": "scm-fast"}),
    "velocity order 0": ("velocity_cache", {"forecaster_order": 0, "budget": 4}),
    "velocity order 2": ("velocity_cache", {"forecaster_order": 2, "reach": 3.0, "budget": 5}),
    "velocity reach 0.5": ("velocity_cache", {"reach": 0.5, "budget": 4}),
    "velocity uncorrected": ("velocity_cache", {"corrector_order": 0}),
    "velocity corrector 1": ("velocity_cache", {"corrector_order": 1, "budget": 4}),
    "velocity corrector 3": ("velocity_cache", {"corrector_order": 3, "budget": 5}),
    "easy newton": ("easy_cache", {"thresh": 0.3, "ret_steps": 3, "forecaster": "newton"}),
    "easy reach 2": ("easy_cache", {"thresh": 0.6, "ret_steps": 3, "forecaster": "newton", "reach": 2.0}),
    "library": ("cache_dit", LIBRARY),
    "library taylorseer": ("cache_dit", LIBRARY | {"enable_taylorseer": True, "taylorseer_order": 1}),
    "library foca": ("cache_dit", LIBRARY | {"forecaster": "foca"}),
    "library dmd": ("cache_dit", LIBRARY | {"forecaster": "dmd", "max_warmup_steps": 6}),
    "library Fn 2 Bn 1": ("cache_dit", LIBRARY | {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}),
    "library scm": ("cache_dit", LIBRARY | {"scm_steps_mask_policy": "fast", "scm_steps_policy": "static"}),
}
for _name in _FORECASTERS:
    SETTINGS[f"db {_name}"] = ("cache_dit", _ALL | {"forecaster": _name, "max_warmup_steps": 5})
    SETTINGS[f"tea {_name}"] = ("tea_cache", _IDENTITY | {"rel_l1_thresh": 0.12, "forecaster": _name})
    SETTINGS[f"velocity {_name}"] = ("velocity_cache", {"forecaster": _name, "budget": 5})
#: The settings that `--quick` runs on Qwen-Image.
QUICK = {
    "tea own polynomial", "tea newton", "db Fn 2 Bn 1", "db warmup interval", "db at most 3", "db scm fast", "db dmd",
    "db taylorseer 2", "db replay", "first block replay", "easy replay", "mag no retention", "sea power 2", "library",
    "velocity order 2", "velocity corrector 3", "velocity reach 0.5", "velocity steps", "easy newton",
}  # fmt: skip

MODELS = ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "z_image", "flux")
#: Arguments that turn guidance off; for FLUX, which has no such guidance by default, they turn it on.
OTHER_GUIDANCE: dict[str, Config] = {
    "qwen_image": {"negative_prompt": None},
    "qwen_image_edit": {"negative_prompt": None},
    "qwen_image_edit_plus": {"negative_prompt": None},
    "z_image": {"guidance_scale": 0.0},
    "flux": {"negative_prompt": " ", "true_cfg_scale": 3.0},
}
EMBEDDED: dict[str, tuple[str | None, Config]] = {
    "plain": (None, {}),
    "tea": ("tea_cache", {}),
    "tea newton": ("tea_cache", {"rel_l1_thresh": 0.3, "forecaster": "newton"}),
    "dbcache": ("cache_dit", {"residual_diff_threshold": 0.3}),
    "taylorseer": ("cache_dit", {"residual_diff_threshold": 0.3, "enable_taylorseer": True, "Bn_compute_blocks": 1}),
    "first block": ("first_block_cache", {"threshold": 0.2}),
    "magnitude": ("mag_cache", {}),
    "sea": ("sea_cache", {}),
    "velocity": ("velocity_cache", {}),
    "velocity 5": ("velocity_cache", {"budget": 5}),
    "velocity quality": ("velocity_cache", {"quality": 45.0}),
    "velocity speedup": ("velocity_cache", {"speedup": 2.5}),
    "easy": ("easy_cache", {"thresh": 0.1, "ret_steps": 3}),
    "library": ("cache_dit", LIBRARY),
}


def _with(requests: tuple[Config, ...], more: Config) -> tuple[Config, ...]:
    return tuple({**one, **more} for one in requests)


def cases() -> Iterator[Case]:
    """Yield all cases; those of one model and dtype are consecutive."""
    for model in MODELS:
        qwen = model == "qwen_image"
        yield Case(f"{model}: plain", model, quick=True)
        for name, (backend, config) in CORE.items():
            config = {**config, "Bn_compute_blocks": 0} if model == "flux" and "Bn_compute_blocks" in config else config
            yield Case(f"{model}: {name}", model, backend, config, quick=qwen or name in ("dbcache", "velocity"))
            guided = OTHER_GUIDANCE[model]
            yield Case(f"{model}, other guidance: {name}", model, backend, config, _with(TWO, guided))
            if model != "qwen_image_edit_plus":  # it takes one prompt only
                yield Case(f"{model}, two prompts: {name}", model, backend, config, MANY, quick=qwen and name == "tea")
            yield Case(f"{model}, fused: {name}", model, backend, config, fuse=True, quick=name == "taylorseer")
        yield Case(f"{model}, fused: plain", model, fuse=True)
        if model != "qwen_image":  # its settings include the library
            yield Case(f"{model}: library", model, "cache_dit", LIBRARY)
        if model in ("qwen_image", "z_image", "flux"):
            for name, (backend, config) in SETTINGS.items():
                if qwen or not name.startswith(("library", "velocity")):
                    requests = ALIKE if "replay" in name else TWO
                    fits = not (model == "z_image" and name == "tea own polynomial")
                    if fits:
                        quick = name in QUICK if qwen else name == "db replay"
                        yield Case(f"{model}: {name}", model, backend, config, requests, quick=quick)
        yield Case(f"{model}: plain again", model, quick=True)
    yield from _half_precision()
    yield from _other_pipelines()
    yield from _embedded()


def _half_precision() -> Iterator[Case]:
    for model in MODELS:
        yield Case(f"{model}, bf16: plain", model, dtype="bfloat16")
        for name, (backend, config) in CORE.items():
            quick = model == "qwen_image" and name == "dbcache"
            yield Case(f"{model}, bf16: {name}", model, backend, config, dtype="bfloat16", quick=quick)
            if model in ("qwen_image", "z_image", "flux"):
                yield Case(f"{model}, bf16, fused: {name}", model, backend, config, dtype="bfloat16", fuse=True)


def _other_pipelines() -> Iterator[Case]:
    """Image-to-image pipelines, which leave out the first steps, and models without a row for caches of blocks."""
    for model in ("qwen_image_img2img", "z_image_img2img", "flux_img2img"):
        yield Case(f"{model}: plain", model, requests=_with(TWO, {"strength": 0.7}), quick=True)
        for name, (backend, config) in CORE.items():
            quick = model.startswith("qwen") and name in ("magnitude", "velocity")
            yield Case(f"{model}: {name}", model, backend, config, _with(TWO, {"strength": 0.7}), quick=quick)
    for model in ("wan", "wan_two", "chroma"):
        yield Case(f"{model}: plain", model)
        yield Case(f"{model}: velocity", model, "velocity_cache", {"budget": 5}, quick=model == "wan")
        yield Case(f"{model}: easy", model, "easy_cache", {"thresh": 0.3, "ret_steps": 2})
        yield Case(f"{model}: library", model, "cache_dit", LIBRARY)


def _embedded() -> Iterator[Case]:
    for model in ("emoji-qwen-image", "emoji-z-image", "emoji-qwen-image-edit"):
        requests = (
            {"prompt": "red apple on blue", "num_inference_steps": 16, "seed": 0},
            {"prompt": "a wolf and a castle", "num_inference_steps": 12, "seed": 1, "output_type": "latent"},
        )
        if model.endswith("edit"):
            requests = _with(requests, {"prompt": "turn it into a castle", "image": "references/03.png"})
        for name, (backend, config) in EMBEDDED.items():
            yield Case(f"{model}: {name}", model, backend, config, requests, quick=name in ("plain", "velocity"))
