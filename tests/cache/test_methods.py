"""The methods as gates: what they do of very short requests, and numbers worked out by hand."""

import math

import pytest
import tiny
import torch

import omni_kernels
from omni_runtime.cache import schedules
from omni_runtime.cache.gates import Plan
from omni_runtime.cache.lifecycle import Request
from omni_runtime.cache.methods import METHODS
from omni_runtime.cache.models import MODELS

QWEN = "QwenImageTransformer2DModel"


def request(steps, begin=0):
    made = Request([1 - i / (begin + steps) for i in range(begin + steps)] + [0.0], begin + steps)
    made.begin = begin
    return made


def gate_of(name, config, of):
    """The gate of a method for a request, on Qwen-Image with 4 blocks."""
    method = METHODS[name]
    checked = method.check(config)
    if method.parts is not None:
        return method.parts(checked, MODELS[QWEN], 4).gate(of)
    return method.output(checked).choose(of).gate


def test_the_order_of_the_table_is_what_to_try_first():
    assert list(METHODS) == [
        "auto", "velocity_cache", "tea_cache", "cache_dit", "first_block_cache", "mag_cache", "sea_cache", "easy_cache",
    ]  # fmt: skip
    assert all(name == method.name for name, method in METHODS.items())
    assert all((method.parts is None) != (method.output is None) for method in METHODS.values())


# One step and two


#: What each method's defaults plan for the last of two steps. Of MagCache's 50 ratios the last, 0.55, is 0.45 off.
LAST_OF_TWO = {
    "auto": (Plan.COMPUTE, "schedule"),
    "velocity_cache": (Plan.COMPUTE, "schedule"),
    "tea_cache": (Plan.MEASURE, ""),
    "cache_dit": (Plan.COMPUTE, "warmup"),
    "first_block_cache": (Plan.MEASURE, ""),
    "mag_cache": (Plan.COMPUTE, "error above threshold"),
    "sea_cache": (Plan.COMPUTE, "mask"),
    "easy_cache": (Plan.COMPUTE, "warmup"),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_have_a_gate(name):
    gate = gate_of(name, None, request(2))
    gate.settle(True)
    assert gate.plan(1) == LAST_OF_TWO[name]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("begin", [0, 3])
def test_one_step_has_a_gate(name, begin):
    """Also where it is the last of four, of which an image-to-image pipeline leaves out the first three."""
    gate = gate_of(name, None, request(1, begin))
    if name in ("auto", "velocity_cache", "sea_cache", "easy_cache", "cache_dit"):
        assert gate.plan(0)[0] is Plan.COMPUTE


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "config",
    [{}, {"speedup": 2.0}, {"speedup": 100.0}, *({"schedule": name} for name in schedules.NAMES), {"schedule": [0]}],
    ids=str,
)
def test_a_schedule_of_one_or_two_steps_computes_them(config, steps):
    gate = gate_of("velocity_cache", config, request(steps))
    assert [gate.plan(step)[0] for step in range(steps)] == [Plan.COMPUTE] * steps


@pytest.mark.parametrize("name", METHODS)
def test_one_step_under_a_cache_is_that_step(name):
    pipe = tiny.z_image()
    expected = tiny.generate(pipe, num_inference_steps=1, output_type="latent")
    assert torch.isfinite(expected).all()
    config = {"coefficients": [0.0, 0.0, 0.0, 1.0, 0.0]} if name == "tea_cache" else {}
    with omni_kernels.patched(pipe, name, {"mag_ratios": [1.0, 1.1]} if name == "mag_cache" else config) as handle:
        made = tiny.generate(pipe, num_inference_steps=1, output_type="latent")
        assert torch.equal(made, expected)
        assert [branch.computed for branch in handle.report.branches.values()] == [[0]] * len(handle.report.branches)
        tiny.generate(pipe, num_inference_steps=2, output_type="latent")
        assert handle.report.complete


# MagCache


@pytest.mark.parametrize(
    ("steps", "share", "retained"),
    [(28, 0.2, 6), (50, 0.2, 10), (20, 0.2, 4), (7, 0.5, 4), (5, 0.5, 3), (12, 0.2, 2), (10, 0.04, 0), (10, 1.0, 10)],
)
def test_mag_cache_retains_the_share_rounded_half_up(steps, share, retained):
    """28 · 0.2 = 5.6 → 6; 7 · 0.5 = 3.5 → 4; 5 · 0.5 = 2.5 → 3, where rounding to even would give 2."""
    config = {"retention_ratio": share, "mag_ratios": [1.0] * steps}
    gate = gate_of("mag_cache", config, request(steps))
    gate.settle(True)
    plans = [gate.plan(step)[1] for step in range(steps)]
    assert plans == ["warmup"] * retained + ["error within threshold"] * (steps - retained)


def test_mag_cache_retains_by_the_steps_that_are_run():
    """Of 28 steps an image-to-image request runs the last 8: 8 · 0.2 = 1.6 → 2, and the ratios are those of its own."""
    ratios = [1.0] * 23 + [2.0] + [1.0] * 4
    gate = gate_of("mag_cache", {"mag_ratios": ratios}, request(8, begin=20))
    plans = []
    for step in range(8):
        plans.append(gate.plan(step)[1])
        gate.settle(plans[-1] != "error within threshold")
    assert plans == ["warmup"] * 2 + ["error within threshold", "error above threshold"] + [
        "error within threshold"
    ] * 3 + ["max continuous cached steps"]


# The velocity cache's forecaster


def test_no_forecaster_is_the_default_one():
    check = METHODS["velocity_cache"].check
    assert check({"forecaster": None}) == check({}) == check({"forecaster": "newton"})
    with pytest.raises(ValueError, match=r"forecaster must be None or one of 'reuse', .*did you mean 'newton'"):
        check({"forecaster": "newtn"})


def test_thresholds_are_what_was_given():
    assert gate_of("tea_cache", {"rel_l1_thresh": 0.37}, request(9)).threshold == 0.37
    assert gate_of("easy_cache", {"thresh": 0.38}, request(9)).threshold == 0.38
    assert gate_of("sea_cache", {"threshold": 0.39}, request(9)).threshold == 0.39
    assert math.isclose(gate_of("cache_dit", {"residual_diff_threshold": 0.4}, request(9)).threshold, 0.4)
