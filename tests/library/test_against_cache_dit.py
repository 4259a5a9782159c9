"""cache_dit and first_block_cache against the cache-dit library on the same weights: the same steps, the same images.

The library is run as its users run it (`cache_dit.enable_cache` on a pipeline of its own), for one image: it averages
the distance over all images of a batch, which is one of the things that are done better here (`test_batches.py`).

Every setting is run on one pipeline, in turn, and two of them on all; `make test-all` runs every setting on each.
"""

import functools

import cache_dit
import pytest
import tiny
import torch

import omni_kernels
from omni_runtime.cache.masks import steps_mask

STEPS = 28
LAYERS = 6

#: settings under cache_dit's own keys, in both spellings where they differ
SETTINGS = {
    "F1B0": {"residual_diff_threshold": 0.3, "max_warmup_steps": 4},
    "F1B0, no limits": {"residual_diff_threshold": 0.2, "max_warmup_steps": 0, "max_continuous_cached_steps": -1},
    "F1B0, tight": {"residual_diff_threshold": 0.06, "max_warmup_steps": 2, "max_continuous_cached_steps": -1},
    "F2B1": {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1, "residual_diff_threshold": 0.25, "max_warmup_steps": 3},
    "F1B2": {"Bn_compute_blocks": 2, "residual_diff_threshold": 0.15, "max_warmup_steps": 3},
    "F4B1": {"Fn_compute_blocks": 4, "Bn_compute_blocks": 1, "residual_diff_threshold": 0.2, "max_warmup_steps": 1},
    "limits": {
        "residual_diff_threshold": 0.5,
        "max_warmup_steps": 2,
        "max_cached_steps": 9,
        "max_continuous_cached_steps": 2,
    },
    "warmup interval": {"residual_diff_threshold": 0.3, "max_warmup_steps": 9, "warmup_interval": 3},
    "threshold 0": {"residual_diff_threshold": 0.0},
    "threshold 1": {"residual_diff_threshold": 1.0, "max_warmup_steps": 2, "max_continuous_cached_steps": 4},
    "SCM slow, dynamic": {"residual_diff_threshold": 0.25, "scm_steps_mask_policy": "slow"},
    "SCM medium, dynamic": {"residual_diff_threshold": 0.12, "scm_steps_mask_policy": "medium"},
    "SCM fast, static": {"scm_steps_mask_policy": "fast", "scm_steps_policy": "static"},
    "SCM explicit": {
        "steps_computation_mask": [1, 1, 1, 0, 0, 1, 0] * 4,
        "scm_steps_policy": "static",
        "max_warmup_steps": 5,
    },
}
CASES = {
    "Qwen-Image with CFG": (functools.partial(tiny.qwen_image, layers=LAYERS), {}),
    "Qwen-Image without CFG": (functools.partial(tiny.qwen_image, layers=LAYERS), {"negative_prompt": None}),
    "Qwen-Image-Edit with CFG": (functools.partial(tiny.qwen_image_edit, layers=LAYERS), {}),
    "Z-Image with CFG": (functools.partial(tiny.z_image, layers=LAYERS), {"guidance_scale": 5.0}),
    "Z-Image without CFG": (functools.partial(tiny.z_image, layers=LAYERS), {"guidance_scale": 0.0}),
}


def in_turn(everywhere):
    """(case, setting): a setting with the next of the cases, or with all; the other pairs are long."""
    chosen = {(setting, [*CASES][place % len(CASES)]) for place, setting in enumerate(SETTINGS)}
    chosen |= {(setting, case) for setting in everywhere for case in CASES}
    return [
        pytest.param(case, setting, marks=() if (setting, case) in chosen else pytest.mark.long)
        for setting in SETTINGS
        for case in CASES
    ]


def run_library(build, setting, guidance, order=None):
    """(skipped steps by branch, latents) of the cache-dit library; with TaylorSeer, of this order."""
    ours = {"max_warmup_steps": 4, "max_continuous_cached_steps": 3, "residual_diff_threshold": 0.24} | setting
    mask = ours.pop("steps_computation_mask", None)
    policy = ours.pop("scm_steps_mask_policy", None)
    mask = list(steps_mask(policy, STEPS)) if policy else mask
    if hint := ours.pop("force_refresh_step_hint", None):  # which the library counts in calls
        ours["force_refresh_step_hint"] = hint * (2 if guidance == {} else 1)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=ours.pop("Fn_compute_blocks", 1),
        Bn_compute_blocks=ours.pop("Bn_compute_blocks", 0),
        steps_computation_mask=mask,
        steps_computation_policy=ours.pop("scm_steps_policy", "dynamic"),
        enable_separate_cfg=guidance == {},  # two transformer calls a step, told apart by counting
        num_inference_steps=None,
        **ours,
    )
    pipe = build()
    calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    latents = tiny.generate(pipe, num_inference_steps=STEPS, output_type="latent", **guidance)
    transformer = pipe.transformer
    return [transformer._cached_steps, *([transformer._cfg_cached_steps] if guidance == {} else [])], latents


def run_ours(build, setting, guidance, backend="cache_dit"):
    pipe = build()
    with omni_kernels.patched(pipe, backend, setting) as handle:
        latents = tiny.generate(pipe, num_inference_steps=STEPS, output_type="latent", **guidance)
        return [branch.skipped for branch in handle.report.branches.values()], latents


@functools.cache
def of_library(case, setting):
    build, guidance = CASES[case]
    return run_library(build, SETTINGS[setting], guidance)


@functools.cache
def of_ours(case, setting):
    build, guidance = CASES[case]
    return run_ours(build, SETTINGS[setting], guidance)


@pytest.mark.parametrize(("case", "setting"), in_turn(everywhere=["F1B0"]))
def test_computed_steps_and_images_are_the_librarys(case, setting):
    theirs, their_latents = of_library(case, setting)
    ours, our_latents = of_ours(case, setting)
    assert ours == theirs
    torch.testing.assert_close(our_latents, their_latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "setting", "last"),
    [
        ("Qwen-Image with CFG", {"force_refresh_step_hint": 11, "max_warmup_steps": 2, "max_cached_steps": 9}, 11),
        (
            "Z-Image without CFG",
            {"force_refresh_step_hint": 9, "force_refresh_step_policy": "repeat", "scm_steps_mask_policy": "slow"},
            18,
        ),
    ],
)
def test_a_forced_refresh_is_the_librarys(case, setting, last, monkeypatch):
    monkeypatch.setitem(globals(), "STEPS", 27)
    setting = {"residual_diff_threshold": 0.3, **setting}
    build, guidance = CASES[case]
    theirs, their_latents = run_library(build, setting, guidance)
    ours, our_latents = run_ours(build, setting, guidance)
    assert [[step - last for step in skipped if step > last] for skipped in ours] == theirs  # from the last refresh on
    assert all(min(skipped) < setting["force_refresh_step_hint"] not in skipped for skipped in ours)
    torch.testing.assert_close(our_latents, their_latents, rtol=1e-5, atol=1e-5)


ENGINE_SETTINGS = ("F1B0", "F2B1", "limits", "warmup interval", "SCM slow, dynamic", "SCM explicit")


@pytest.mark.parametrize(
    ("case", "setting"), [pair for pair in in_turn(everywhere=["F1B0"]) if pair.values[1] in ENGINE_SETTINGS]
)
def test_engine_library_is_the_library_as_it_is_told_by_hand_of_the_branches(case, setting):
    build, guidance = CASES[case]
    theirs, their_latents = of_library(case, setting)
    ours, our_latents = run_ours(build, SETTINGS[setting] | {"engine": "library"}, guidance)
    assert ours == theirs
    torch.testing.assert_close(our_latents, their_latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "order"),
    [
        ("Qwen-Image with CFG", 2),
        ("Z-Image with CFG", 1),
        pytest.param("Qwen-Image with CFG", 1, marks=pytest.mark.long),
        pytest.param("Z-Image with CFG", 2, marks=pytest.mark.long),
    ],
)
def test_engine_library_forecasts_as_the_library(case, order):
    build, guidance = CASES[case]
    theirs, their_latents = run_library(build, SETTINGS["F2B1"], guidance, order)
    taylorseer = {"enable_taylorseer": True, "taylorseer_order": order, "engine": "library"}
    ours, our_latents = run_ours(build, SETTINGS["F2B1"] | taylorseer, guidance)
    assert ours == theirs
    torch.testing.assert_close(our_latents, their_latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == next(iter(CASES)) else pytest.mark.long) for case in CASES]
)
def test_the_settings_cover_steps_that_compute_and_steps_that_skip(case):
    counts = {len(of_ours(case, setting)[0][0]) for setting in ("F1B0", "F1B0, tight", "F2B1", "limits")}
    assert len(counts) >= 3
    assert min(counts) < STEPS - 8
    assert max(counts) > 4


def test_first_block_cache_is_dbcache_with_one_block_and_no_limits():
    build, guidance = CASES["Qwen-Image with CFG"]
    setting = {"residual_diff_threshold": 0.1, "max_warmup_steps": 0, "max_continuous_cached_steps": -1}
    theirs, their_latents = run_library(build, setting, guidance)
    ours, our_latents = run_ours(build, {"threshold": 0.1}, guidance, "first_block_cache")
    assert ours == theirs
    torch.testing.assert_close(our_latents, their_latents, rtol=1e-5, atol=1e-5)


def test_library_takes_every_second_step_for_the_other_branch_without_a_negative_prompt_and_ours_does_not():
    """As it is set up for Qwen-Image, the library counts calls by parity: with one call a step, half the steps compare
    themselves with the wrong ones, and the step count is halved."""
    build, guidance = CASES["Qwen-Image without CFG"]
    setting = {"residual_diff_threshold": 0.1, "max_warmup_steps": 4, "max_continuous_cached_steps": 3}
    library = build()
    cache_dit.enable_cache(
        library, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, **setting)
    )
    tiny.generate(library, num_inference_steps=STEPS, output_type="latent", **guidance)
    assert max(library.transformer._cached_steps) < STEPS / 2

    (ours,), _ = run_ours(build, setting, guidance)
    (right,), _ = run_library(build, setting, guidance)  # told by hand that there is one branch
    assert ours == right
    assert max(ours) > STEPS / 2


def test_requests_of_other_step_counts_leave_no_trace():
    build, guidance = CASES["Qwen-Image without CFG"]
    pipe = build()
    with omni_kernels.patched(pipe, "cache_dit", SETTINGS["F1B0"]) as handle:
        first = tiny.generate(pipe, num_inference_steps=STEPS, output_type="latent", **guidance)
        skipped = [b.skipped for b in handle.report.branches.values()]
        tiny.generate(pipe, seed=3, num_inference_steps=11, output_type="latent", **guidance)
        again = tiny.generate(pipe, num_inference_steps=STEPS, output_type="latent", **guidance)
        assert [b.skipped for b in handle.report.branches.values()] == skipped
    assert torch.equal(first, again)
