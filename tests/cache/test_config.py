"""Configuration: what is left out takes its default, and wrong input fails by name before anything changes."""

import math

import pytest
import tiny

import omni_kernels
from omni_runtime.cache.config import resolve
from omni_runtime.cache.methods import METHODS

NAN, INFINITY = math.nan, math.inf
FORECASTER = {"forecaster": None, "forecaster_order": 1}
DECISION = {"decision": "measure", "drift_tolerance": 0.1}
DEFAULTS = {
    "tea_cache": {"rel_l1_thresh": 0.2, "coefficients": None, **FORECASTER, **DECISION},
    "first_block_cache": {"threshold": 0.05, **FORECASTER, **DECISION},
    "mag_cache": {
        "threshold": 0.06,
        "max_skip_steps": 3,
        "retention_ratio": 0.2,
        "mag_ratios": None,
        "mag_calibrate": False,
        "num_inference_steps": None,
        **FORECASTER,
    },
    "sea_cache": {
        "threshold": 0.25,
        "max_consecutive_cached": 2,
        "power_exp": 3.0,
        "residual_order": None,
        **FORECASTER,
        **DECISION,
    },
    "cache_dit": {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": 4,
        "warmup_interval": 1,
        "max_cached_steps": -1,
        "max_continuous_cached_steps": 3,
        "residual_diff_threshold": 0.24,
        "enable_taylorseer": False,
        "taylorseer_order": 1,
        "enable_foca": False,
        "enable_dmd": False,
        "scm_steps_mask_policy": None,
        "steps_computation_mask": None,
        "scm_steps_policy": "dynamic",
        "force_refresh_step_hint": None,
        "force_refresh_step_policy": "once",
        "num_inference_steps": None,
        "engine": "own",
        **FORECASTER,
        **DECISION,
    },
    "velocity_cache": {
        "schedule": None,
        "budget": None,
        "speedup": None,
        "quality": None,
        "calibration": None,
        "forecaster": "newton",
        "forecaster_order": 1,
        "reach": None,
        "corrector_order": None,
    },
    "auto": {"quality": None, "speedup": None, "psnr": None, "calibration": None},
    "easy_cache": {"thresh": 0.05, "ret_steps": 10, **FORECASTER, **DECISION, "reach": 1.0},
}


@pytest.fixture(scope="module")
def pipe():
    """A pipeline of 4 blocks, which no test here may leave patched."""
    return tiny.qwen_image()


@pytest.fixture(autouse=True)
def nothing_is_changed(pipe):
    before = [dict(vars(owner)) for owner in (pipe, pipe.transformer, pipe.scheduler)]
    yield
    assert [dict(vars(owner)) for owner in (pipe, pipe.transformer, pipe.scheduler)] == before


@pytest.mark.parametrize("backend", DEFAULTS)
@pytest.mark.parametrize("config", [None, {}])
def test_what_is_left_out_takes_its_default(pipe, backend, config):
    with omni_kernels.patched(pipe, backend, config) as handle:
        assert handle.cache_config == DEFAULTS[backend]


@pytest.mark.parametrize("backend", DEFAULTS)
def test_defaults_pass_their_own_checks(backend):
    given = {key: value for key, value in DEFAULTS[backend].items() if value is not None}
    assert METHODS[backend].check(given) == DEFAULTS[backend]
    assert METHODS[backend].check(DEFAULTS[backend]) == DEFAULTS[backend]


def test_the_users_dict_is_not_kept(pipe):
    config = {"threshold": 0.3}
    with omni_kernels.patched(pipe, "first_block_cache", config) as handle:
        config["threshold"] = 0.7
        assert handle.cache_config["threshold"] == 0.3


@pytest.mark.parametrize(
    ("backend", "named"),
    [
        ("teacache", r"unknown cache backend 'teacache': did you mean 'tea_cache'\? Known: .*cache_dit.*tea_cache"),
        ("cache-dit", "did you mean 'cache_dit'"),
        ("xyz", r"unknown cache backend 'xyz': Known: "),
        ("", r"unknown cache backend ''"),
    ],
)
def test_unknown_backend_is_named_with_the_nearest(pipe, backend, named):
    with pytest.raises(ValueError, match=named):
        omni_kernels.patch(pipe, backend)


@pytest.mark.parametrize("backend", [3, True, ["tea_cache"]])
def test_backend_that_is_no_name_is_refused(pipe, backend):
    with pytest.raises(TypeError, match="cache_backend must be the name of a backend"):
        omni_kernels.patch(pipe, backend)


@pytest.mark.parametrize("backend", [None, "none"])
def test_configuration_without_a_backend_is_refused(pipe, backend):
    with pytest.raises(ValueError, match=r"'rel_l1_thresh': 0.1.* without a cache_backend"):
        omni_kernels.patch(pipe, backend, {"rel_l1_thresh": 0.1})


@pytest.mark.parametrize("config", [0.2, "rel_l1_thresh=0.2", ["rel_l1_thresh"], {0.2}])
def test_configuration_that_is_no_dict_is_refused(pipe, config):
    with pytest.raises(TypeError, match="configuration of tea_cache must be a dict"):
        omni_kernels.patch(pipe, "tea_cache", config)


@pytest.mark.parametrize(
    ("backend", "key", "nearest"),
    [
        ("tea_cache", "rel_l1_tresh", "rel_l1_thresh"),
        ("tea_cache", "coeficients", "coefficients"),
        ("cache_dit", "fn_compute_blocks", "Fn_compute_blocks"),
        ("cache_dit", "residual_threshold", "residual_diff_threshold"),
        ("cache_dit", "taylorseer", "taylorseer_order"),
        ("first_block_cache", "treshold", "threshold"),
        ("mag_cache", "mag_ratio", "mag_ratios"),
        ("mag_cache", "retention", "retention_ratio"),
        ("sea_cache", "power", "power_exp"),
        ("easy_cache", "threshold", "thresh"),
        ("easy_cache", "ret_step", "ret_steps"),
    ],
)
def test_misspelt_key_is_named_with_the_nearest(pipe, backend, key, nearest):
    with pytest.raises(ValueError, match=rf"{backend} has no key '{key}': did you mean '{nearest}'\?"):
        omni_kernels.patch(pipe, backend, {key: 1})


def test_key_of_another_backend_is_refused_with_all_known(pipe):
    with pytest.raises(ValueError, match=r"first_block_cache has no key 'Bn_compute_blocks'.*Known: .*threshold"):
        omni_kernels.patch(pipe, "first_block_cache", {"Bn_compute_blocks": 1})


@pytest.mark.parametrize("backend", ["mag_cache", "velocity_cache"])
def test_method_that_measures_nothing_has_nothing_to_replay(pipe, backend):
    with pytest.raises(ValueError, match=f"{backend} has no key 'decision'"):
        omni_kernels.patch(pipe, backend, {"decision": "replay"})


def test_key_that_is_no_string_is_refused(pipe):
    with pytest.raises(ValueError, match="tea_cache has no key 3"):
        omni_kernels.patch(pipe, "tea_cache", {3: 1})


@pytest.mark.parametrize(
    ("backend", "key", "value"),
    [
        *(("tea_cache", "rel_l1_thresh", value) for value in (0, 0.0, -0.1, NAN, INFINITY, -INFINITY)),
        ("tea_cache", "coefficients", [1, 2, 3, 4]),
        ("tea_cache", "coefficients", [1, 2, 3, 4, 5, 6]),
        ("tea_cache", "coefficients", []),
        ("tea_cache", "coefficients", [1, 2, 3, 4, NAN]),
        ("tea_cache", "forecaster_order", 4),
        ("tea_cache", "forecaster_order", -1),
        ("tea_cache", "forecaster", "taylor"),
        ("tea_cache", "decision", "replays"),
        *(("first_block_cache", "drift_tolerance", value) for value in (-0.1, NAN, INFINITY)),
        *(("first_block_cache", "threshold", value) for value in (NAN, INFINITY)),
        *(("mag_cache", "threshold", value) for value in (NAN, INFINITY)),
        ("mag_cache", "max_skip_steps", -1),
        *(("mag_cache", "retention_ratio", value) for value in (-0.1, 1.1, NAN, INFINITY)),
        *(("mag_cache", "mag_ratios", value) for value in ([], [1.0, 0.0], [1.0, -1.0], [1.0, NAN], [1.0, INFINITY])),
        *(("sea_cache", "threshold", value) for value in (0, -0.1, NAN, INFINITY)),
        *(("sea_cache", "power_exp", value) for value in (0, -1.0, NAN)),
        ("sea_cache", "max_consecutive_cached", -2),
        *(("easy_cache", "thresh", value) for value in (0, -0.1, NAN, INFINITY)),
        ("easy_cache", "ret_steps", -1),
        *(("easy_cache", "reach", value) for value in (0, -1.0, NAN, INFINITY)),
        *(("cache_dit", "residual_diff_threshold", value) for value in (NAN, INFINITY)),
        *(("cache_dit", "Fn_compute_blocks", value) for value in (0, -1)),
        ("cache_dit", "Bn_compute_blocks", -1),
        ("cache_dit", "max_warmup_steps", -1),
        ("cache_dit", "warmup_interval", 0),
        ("cache_dit", "max_cached_steps", -2),
        ("cache_dit", "max_continuous_cached_steps", -2),
        ("cache_dit", "taylorseer_order", 4),
        ("cache_dit", "taylorseer_order", -1),
        ("cache_dit", "scm_steps_mask_policy", "faster"),
        ("cache_dit", "scm_steps_policy", "statical"),
        ("cache_dit", "num_inference_steps", 0),
        *(("cache_dit", "steps_computation_mask", value) for value in ("", [], "1021", [1, 2], [True, 0], [1, None])),
    ],
)  # fmt: skip
def test_value_out_of_range_is_named(pipe, backend, key, value):
    with pytest.raises(ValueError, match=key):
        omni_kernels.patch(pipe, backend, {key: value})


@pytest.mark.parametrize(
    ("backend", "key", "value"),
    [
        *(("tea_cache", "rel_l1_thresh", value) for value in ("0.2", True, [0.2])),
        *(("tea_cache", "coefficients", value) for value in (1.0, [1, 2, 3, 4, "5"], [1, 2, 3, 4, True])),
        ("tea_cache", "forecaster", 1),
        *(("sea_cache", "decision", value) for value in (None, True)),
        *(("cache_dit", "drift_tolerance", value) for value in (None, "0.1", True)),
        ("tea_cache", "forecaster_order", 1.0),
        *(("cache_dit", "Fn_compute_blocks", value) for value in (1.0, "1", None, True)),
        *(("cache_dit", "enable_taylorseer", value) for value in (1, "True", None)),
        ("cache_dit", "scm_steps_mask_policy", 1),
        ("cache_dit", "scm_steps_policy", None),
        *(("cache_dit", "steps_computation_mask", value) for value in (5, 1.5)),
        ("first_block_cache", "threshold", "0.1"),
        *(("mag_cache", "retention_ratio", value) for value in ("0.2", None, True)),
        *(("mag_cache", "mag_ratios", value) for value in (1.0, [1.0, "1"], [1.0, True])),
        ("mag_cache", "max_skip_steps", 2.0),
        ("sea_cache", "threshold", None),
        ("sea_cache", "max_consecutive_cached", None),
        *(("easy_cache", "thresh", value) for value in ("0.05", None, True)),
        *(("easy_cache", "ret_steps", value) for value in (2.0, None, True)),
    ],
)
def test_value_of_the_wrong_type_is_named(pipe, backend, key, value):
    with pytest.raises(TypeError, match=key):
        omni_kernels.patch(pipe, backend, {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("rel_l1_thresh", 10**400), ("coefficients", [0, 0, 0, 0, 10**400]), ("mag_ratios", [10**400])],
    ids=["number", "coefficients", "ratios"],
)
def test_number_too_large_for_a_float_is_named(pipe, key, value):
    with pytest.raises(ValueError, match=key):
        omni_kernels.patch(pipe, "mag_cache" if key == "mag_ratios" else "tea_cache", {key: value})


def test_message_names_the_value_and_what_is_allowed(pipe):
    with pytest.raises(ValueError, match=r"rel_l1_thresh must be None or a finite number > 0, not -0.5"):
        omni_kernels.patch(pipe, "tea_cache", {"rel_l1_thresh": -0.5})
    with pytest.raises(ValueError, match=r"drift_tolerance must be a finite number ≥ 0, not -0.5"):
        omni_kernels.patch(pipe, "tea_cache", {"drift_tolerance": -0.5})
    with pytest.raises(ValueError, match=r"taylorseer_order must be a whole number from 0 to 3, not 4"):
        omni_kernels.patch(pipe, "cache_dit", {"taylorseer_order": 4})
    with pytest.raises(ValueError, match=r"coefficients must be None or 5 finite numbers.*, not \[1, 2\]: these are 2"):
        omni_kernels.patch(pipe, "tea_cache", {"coefficients": [1, 2]})
    with pytest.raises(ValueError, match=r"one of 'slow', 'medium', 'fast', 'ultra', not 'fastt': did you mean 'fast'"):
        omni_kernels.patch(pipe, "cache_dit", {"scm_steps_mask_policy": "fastt"})


@pytest.mark.parametrize(("first", "last"), [(4, 0), (1, 3), (2, 2), (60, 0)])
def test_blocks_must_leave_one_to_skip(pipe, first, last):
    config = {"Fn_compute_blocks": first, "Bn_compute_blocks": last}
    with pytest.raises(ValueError, match=rf"Fn_compute_blocks \+ Bn_compute_blocks is {first} \+ {last}.*4 blocks"):
        omni_kernels.patch(pipe, "cache_dit", config)


def test_blocks_may_leave_just_one_to_skip(pipe):
    for first, last in ((3, 0), (1, 2)):
        omni_kernels.patch(pipe, "cache_dit", {"Fn_compute_blocks": first, "Bn_compute_blocks": last}).undo()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"enable_taylorseer": True, "forecaster": "newton"}, "enable_taylorseer contradicts forecaster='newton'"),
        ({"enable_taylorseer": True, "enable_dmd": True}, "enable_taylorseer contradicts enable_dmd"),
        (
            {"scm_steps_mask_policy": "fast", "steps_computation_mask": "1101"},
            "scm_steps_mask_policy and steps_computation_mask cannot be combined",
        ),
        (
            {"steps_computation_mask": "1101", "num_inference_steps": 5},
            "steps_computation_mask has 4 entries, but the request has 5 steps",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named(pipe, config, named):
    with pytest.raises(ValueError, match=named):
        omni_kernels.patch(pipe, "cache_dit", config)


def test_keys_have_the_names_of_vllm_omni_too():
    given = {"sea_threshold": 0.4, "sea_max_consecutive_cached": 0, "sea_power_exp": 2.0, "sea_residual_order": 1}
    found = METHODS["sea_cache"].check(given)
    assert (found["threshold"], found["max_consecutive_cached"], found["power_exp"]) == (0.4, 0, 2.0)
    assert found["residual_order"] == 1
    given = {"mag_threshold": 0.24, "mag_max_skip_steps": 5, "mag_retention_ratio": 0.1, "num_inference_steps": 28}
    found = METHODS["mag_cache"].check(given | {"mag_calibrate": False})
    assert (found["threshold"], found["max_skip_steps"], found["retention_ratio"]) == (0.24, 5, 0.1)
    assert METHODS["tea_cache"].check({"rel_l1_thresh": None})["rel_l1_thresh"] == 0.2
    with pytest.raises(ValueError, match="mag_threshold is another name of threshold: give one of them"):
        METHODS["mag_cache"].check({"mag_threshold": 0.24, "threshold": 0.24})
    with pytest.raises(ValueError, match="mag_calibrate: ratios are found by `omni calibrate mag_cache`"):
        METHODS["mag_cache"].check({"mag_calibrate": True})


def test_mask_of_the_wrong_length_is_known_once_the_steps_are():
    check = METHODS["cache_dit"].check
    assert check({"steps_computation_mask": "1101"}, steps=4)["steps_computation_mask"] == (1, 1, 0, 1)
    with pytest.raises(ValueError, match="4 entries, but the request has 8 steps"):
        check({"steps_computation_mask": "1101"}, steps=8)


def test_masks_may_be_lists_or_strings():
    for mask in ("101", [1, 0, 1], (1, 0, 1)):
        assert METHODS["cache_dit"].check({"steps_computation_mask": mask})["steps_computation_mask"] == (1, 0, 1)


def test_every_key_is_documented():
    for method in METHODS.values():
        assert method.summary
        for key in method.keys:
            assert key.doc
            assert key.allowed
    assert set(METHODS) == set(DEFAULTS)


def test_nothing_configured_is_every_default():
    for name, method in METHODS.items():
        assert resolve(method.keys, None, name) == DEFAULTS[name]
