"""Configuration, whatever is given: what is no number, list or file is refused at once, by the key's name."""

import itertools
import math
import time

import numpy as np
import pytest
import torch

import omni_kernels
from omni_runtime.cache.config import MOST, plain
from omni_runtime.cache.methods import METHODS
from omni_runtime.generation.omni import resolve_cache


@pytest.mark.parametrize("scalar", [np.float64, np.float32, np.float16, torch.tensor, lambda x: np.array(x)])
def test_scalars_of_numpy_and_torch_are_numbers(scalar):
    found = METHODS["tea_cache"].check({"rel_l1_thresh": scalar(0.25)})["rel_l1_thresh"]
    assert (found, type(found)) == (0.25, float)
    found = METHODS["mag_cache"].check({"retention_ratio": scalar(0.5)})["retention_ratio"]
    assert (found, type(found)) == (0.5, float)
    found = METHODS["velocity_cache"].check({"speedup": scalar(2.5)})["speedup"]
    assert (found, type(found)) == (2.5, float)


@pytest.mark.parametrize("scalar", [np.int64, np.uint8, torch.tensor, lambda x: np.array(x)])
def test_whole_scalars_of_numpy_and_torch_are_whole_numbers(scalar):
    found = METHODS["velocity_cache"].check({"budget": scalar(7)})["budget"]
    assert (found, type(found)) == (7, int)
    found = METHODS["tea_cache"].check({"rel_l1_thresh": scalar(1)})["rel_l1_thresh"]
    assert (found, type(found)) == (1.0, float)


@pytest.mark.parametrize("scalar", [np.bool_, torch.tensor])
def test_truth_values_of_numpy_and_torch_are_truth_values(scalar):
    assert METHODS["cache_dit"].check({"enable_taylorseer": scalar(True)})["enable_taylorseer"] is True
    with pytest.raises(TypeError, match="rel_l1_thresh must be None or a finite number > 0"):
        METHODS["tea_cache"].check({"rel_l1_thresh": scalar(True)})


@pytest.mark.parametrize("array", [np.array, torch.tensor, iter])
def test_arrays_are_lists(array):
    given = [1.0, 2.0, 3.0, 4.0, 0.5]
    found = METHODS["tea_cache"].check({"coefficients": array(given)})["coefficients"]
    assert (found, {type(one) for one in found}) == (tuple(given), {float})
    found = METHODS["velocity_cache"].check({"schedule": array([5, 0, 3])})["schedule"]
    assert (found, {type(one) for one in found}) == ((0, 3, 5), {int})
    found = METHODS["cache_dit"].check({"steps_computation_mask": array([1, 0, 1])})["steps_computation_mask"]
    assert (found, {type(one) for one in found}) == ((1, 0, 1), {int})
    assert METHODS["mag_cache"].check({"mag_ratios": array([1.0, 1.5])})["mag_ratios"] == (1.0, 1.5)


class Bytes:
    def __fspath__(self):
        return b"x"


def nested(depth):
    found = []
    for _ in range(depth):
        found = [found]
    return found


def calibrated(coefficient):
    return {
        "method": "tea_cache",
        "version": 1,
        "coefficients": [0, 0, 0, coefficient, 0],
        "range": [0, 1],
        "calibrated_for": {},
    }


STRANGE = {
    "nested": ("tea_cache", "rel_l1_thresh", lambda: nested(3000), TypeError),
    "nested list": ("tea_cache", "coefficients", lambda: nested(3000), TypeError),
    "thousands of digits": ("cache_dit", "residual_diff_threshold", lambda: 10**5000, ValueError),
    "thousands of digits, whole": ("velocity_cache", "budget", lambda: 10**5000, ValueError),
    "beyond 64 bits": ("cache_dit", "max_warmup_steps", lambda: 2**63, ValueError),
    "thousands of digits in a schedule": ("velocity_cache", "schedule", lambda: [0, 10**5000], ValueError),
    "thousands of digits in a mask": ("cache_dit", "steps_computation_mask", lambda: [1, 10**5000], ValueError),
    "thousands of digits in a file": ("tea_cache", "coefficients", lambda: calibrated(10**400), ValueError),
    "complex": ("tea_cache", "rel_l1_thresh", lambda: np.complex64(1), TypeError),
    "date": ("tea_cache", "rel_l1_thresh", lambda: np.datetime64("2020-01-01"), TypeError),
    "without data": ("tea_cache", "rel_l1_thresh", lambda: torch.empty((), device="meta"), TypeError),
    "one entry": ("tea_cache", "rel_l1_thresh", lambda: torch.tensor([0.2]), TypeError),
    "whole float": ("velocity_cache", "budget", lambda: np.float64(3.0), TypeError),
    "0-d array": ("mag_cache", "mag_ratios", lambda: torch.tensor(0.2), TypeError),
    "0-d mask": ("cache_dit", "steps_computation_mask", lambda: np.array(1), TypeError),
    "matrix": ("tea_cache", "coefficients", lambda: np.ones((5, 1)), TypeError),
    "mask of tensors": ("cache_dit", "steps_computation_mask", lambda: torch.ones(2, 2), ValueError),
    "endless": ("tea_cache", "coefficients", lambda: itertools.count(1.0), ValueError),
    "endless ratios": ("mag_cache", "mag_ratios", lambda: itertools.repeat(1.0), ValueError),
    "endless mask": ("cache_dit", "steps_computation_mask", lambda: itertools.repeat(1), ValueError),
    "endless schedule": ("velocity_cache", "schedule", lambda: itertools.count(), ValueError),
    "long range": ("velocity_cache", "schedule", lambda: range(10**9), ValueError),
    "long mask": ("cache_dit", "steps_computation_mask", lambda: "1" * 10**6, ValueError),
    "bytes": ("cache_dit", "steps_computation_mask", lambda: b"101", TypeError),
    "class": ("tea_cache", "coefficients", lambda: list, TypeError),
    "long path": ("tea_cache", "coefficients", lambda: "a" * 5000, ValueError),
    "long text": ("cache_dit", "scm_steps_mask_policy", lambda: "a" * 10**6, ValueError),
    "nobody's home": ("tea_cache", "coefficients", lambda: "~nosuchuser/x", ValueError),
    "zero in a path": ("mag_cache", "mag_ratios", lambda: "a\0b", ValueError),
    "path of bytes": ("tea_cache", "coefficients", Bytes, ValueError),
    "no file": ("tea_cache", "coefficients", lambda: "0.2", ValueError),
    "no file of a schedule": ("velocity_cache", "calibration", lambda: "0.2", ValueError),
    "no numbers there": ("velocity_cache", "calibration", lambda: [1, 2], TypeError),
}


@pytest.mark.parametrize(("backend", "key", "value", "error"), STRANGE.values(), ids=STRANGE)
def test_strange_values_are_refused_with_the_keys_name_at_once(qwen_pipe, backend, key, value, error):
    begun = time.process_time()
    with pytest.raises(error, match=rf"^{key}( must be|: )") as raised:
        omni_kernels.patch(qwen_pipe, backend, {key: value()})
    assert type(raised.value) is error
    assert len(str(raised.value)) < 1200, "schedules have many names"
    assert time.process_time() - begun < 5


def test_as_many_entries_as_are_allowed_are_read():
    given = [1.0] * MOST
    assert METHODS["mag_cache"].check({"mag_ratios": given})["mag_ratios"] == tuple(given)
    with pytest.raises(ValueError, match=f"mag_ratios must be .*: more than {MOST} entries"):
        METHODS["mag_cache"].check({"mag_ratios": [*given, 1.0]})


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a":' * 100_000, "is nested more than 64 deep"), (" " * (9 << 20), "has more than 8 MiB")],
    ids=["deep", "large"],
)
def test_a_file_that_is_too_large_or_too_deep_is_named(tmp_path, content, message):
    path = tmp_path / "tea.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^coefficients: .*tea\.json {message}"):
        METHODS["tea_cache"].check({"coefficients": path})


@pytest.mark.parametrize("key", [10**5000, "a" * 10**6, ("a",) * 10**5, None], ids=["large", "long", "tuple", "None"])
def test_strange_keys_are_refused(qwen_pipe, key):
    with pytest.raises(ValueError, match=r"^tea_cache has no key .*Known: coefficients, ") as raised:
        omni_kernels.patch(qwen_pipe, "tea_cache", {key: 1})
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"a":' * 100_000, ValueError, "cache_config is not valid JSON: "),
        ("{" + "a" * 10**6, ValueError, "cache_config is not valid JSON: "),
        ('{"rel_l1_thresh": 1' + "0" * 5000 + "}", ValueError, "cache_config is not valid JSON: "),
        ('["a"]', TypeError, "cache_config must be a JSON object"),
    ],
    ids=["deep", "long", "digits", "list"],
)
def test_strange_json_is_refused_with_the_arguments_name(text, error, message):
    with pytest.raises(error, match=message) as raised:
        resolve_cache("tea_cache", text)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("name", ["a" * 5000, "~nosuchuser/x", "a\0b"])
def test_a_model_of_a_name_that_no_path_can_have_brings_nothing(name):
    config = METHODS["tea_cache"].check({"rel_l1_thresh": 0.1})
    assert METHODS["tea_cache"].with_own(config, name) is config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0, "computed": [-1, 0], "sigmas": []}, "computed must be rising steps"),
        ({"steps": 10**9, "computed": [0, 10**9 - 1]}, "computed must be rising steps"),
        ({"sigmas": [1.0, math.nan]}, "sigmas must be the noise levels of 2 steps"),
        ({"psnr": {"mean": 10**400}}, "psnr must have a mean"),
        ({"speedup": 10**400}, "speedup must be a number > 0"),
    ],
)
def test_a_broken_schedule_is_named(change, message):
    row = {"steps": 2, "computed": [0, 1], "sigmas": [1.0, 0.5], "psnr": {"mean": 40.0}}
    made = {"method": "velocity_cache", "version": 1, "schedules": [row], "calibrated_for": {}}
    METHODS["velocity_cache"].check({"calibration": made})
    with pytest.raises(ValueError, match=f"^calibration: this dict: {message}"):
        METHODS["velocity_cache"].check({"calibration": made | {"schedules": [row | change]}})


def test_broken_settings_of_a_scheduler_are_named():
    made = calibrated(1.0) | {"calibrated_for": {"scheduler_settings": [1]}}
    with pytest.raises(ValueError, match=r"^coefficients: this dict: scheduler_settings must be an object, not \[1\]"):
        METHODS["tea_cache"].check({"coefficients": made})


def test_a_scalar_without_data_is_refused_as_it_is():
    scalar = torch.empty((), device="meta")
    assert plain(scalar) is scalar
    with pytest.raises((ValueError, TypeError), match="rel_l1_thresh must be"):
        METHODS["tea_cache"].check({"rel_l1_thresh": scalar})
