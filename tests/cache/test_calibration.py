"""TeaCache's polynomial: its fit to synthetic points, what is refused, its file, and the runs that it holds for."""

import json
import math
import warnings

import numpy as np
import pytest
import tiny

import omni_kernels
from omni_runtime.cache import calibration, magnitudes, polynomial
from omni_runtime.cache.gates import AccumulatedPolynomialGate, Limits
from omni_runtime.cache.methods import METHODS
from omni_runtime.cache.models import TransformerFacts
from omni_runtime.files import WriteError

X = np.linspace(0.04, 0.2, 200)
NOISE = np.random.default_rng(0).normal(size=X.size)
IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]


def made(**changes):
    """A calibration of the tiny Qwen-Image pipeline as `tiny.generate` runs it, with changes in `calibrated_for`."""
    pipe = tiny.qwen_image()
    run = calibration.describe(pipe.transformer, 4, pipe.scheduler, 8, (16, 64))
    result = polynomial.fit(X, X)
    about = run | {"width": 64, "height": 64} | changes
    return calibration.document(result, about, {"model": "tiny", "prompts": ["a cat"]})


# The fit


def test_as_many_points_as_are_needed_are_enough():
    x = np.linspace(0.1, 1.0, polynomial.MIN_POINTS)
    polynomial.fit(x, x)
    with pytest.raises(calibration.UselessFitError, match=f"{polynomial.MIN_POINTS - 1} points are too few"):
        polynomial.fit(x[1:], x[1:])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_a_polynomial_is_found_again(scale):
    true = np.array([3.0, -1.0, 0.5, 2.0, 0.1]) / scale ** np.arange(4, -1, -1)
    x = X * scale
    result = polynomial.fit(x, np.polyval(true, x))
    np.testing.assert_allclose(np.polyval(result.coefficients, x), np.polyval(true, x), rtol=1e-9)
    assert result.degree == 4
    assert result.r_squared == pytest.approx(1.0)
    assert result.range == (x[0], x[-1])
    assert result.points == 200
    assert result.rises


def test_a_narrow_range_far_from_zero_is_fitted_soundly():
    x = 1.0 + 0.02 * (X - X[0]) / (X[-1] - X[0])
    y = 0.1 + (x - 1.0) * 5 + np.sin((x - 1.0) * 100) * 0.01
    result = polynomial.fit(x, y)
    scaled = np.polynomial.Polynomial.fit(x, y, 4)
    np.testing.assert_allclose(np.polyval(result.coefficients, x), scaled(x), rtol=1e-6)


def test_the_fit_says_how_good_it_is():
    y = 0.5 * X + 0.01 + 0.004 * NOISE
    result = polynomial.fit(X, y)
    residuals = y - np.polyval(np.polyfit(X, y, 4), X)
    assert result.r_squared == pytest.approx(1 - residuals.var() / y.var(), rel=1e-6)
    assert result.spread == pytest.approx(residuals.std(), rel=1e-6)
    assert result.output_range == (y.min(), y.max())
    assert "200 points" in result.words()
    assert f"R² {result.r_squared:.3f}" in result.words()


def test_a_fit_that_falls_somewhere_is_told():
    result = polynomial.fit(X, 0.05 + (X - 0.1) ** 2)
    assert not result.rises
    assert "not everywhere rising" in result.words()


def test_a_lower_degree_is_taken_where_the_highest_is_not_positive():
    y = 0.02 + 0.1 * (X - 0.04) + np.where(X > 0.15, 0.2, 0.0)  # a quartic swings below zero before such a step
    assert np.polyval(np.polyfit(X, y, 4), X).min() < 0
    result = polynomial.fit(X, y)
    assert result.degree == 3
    assert result.coefficients[0] == 0.0
    np.testing.assert_allclose(np.polyval(result.coefficients, X), np.polyval(np.polyfit(X, y, 3), X), rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:49], X[:49], "49 points are too few for 5 coefficients, which need 50: .*more prompts"),
        ([], [], "0 points are too few"),
        (np.where(X > 0.15, math.nan, X), X, r"\d+ of 200 recorded distances are not finite"),
        (X, np.where(X > 0.15, math.inf, X), r"\d+ of 200 recorded distances are not finite"),
        (np.full(200, 0.1), X, "the modulated input moves by the same 0.1 at every step"),
        (np.zeros(200), X, "the modulated input moves by the same 0 at every step"),
        (X, np.full(200, 0.1) + 1e-5 * NOISE, "the residual moves by the same 0.1"),
        (X, 0.1 + 0.01 * NOISE, r"explains \d% of how much the residual moves \(R² 0.0"),
        (X, np.where(X > 0.19, 5.0, 0.0), "no polynomial of degree 4 or less stays positive"),
    ],
    ids=["few", "none", "nan", "infinite", "same x", "zero x", "same y", "unrelated", "negative"],
)
def test_a_useless_fit_is_refused_in_plain_words(x, y, message):
    with pytest.raises(calibration.UselessFitError, match=message):
        polynomial.fit(x, y)


def test_the_bound_on_r_squared_is_the_stated_one():
    for noise, refused in ((0.068, False), (0.095, True)):
        y = 1.0 + X + noise * NOISE
        r_squared = 1 - np.var(y - np.polyval(np.polyfit(X, y, 4), X)) / y.var()
        assert (r_squared < polynomial.MIN_R_SQUARED) == refused
        if refused:
            with pytest.raises(calibration.UselessFitError, match="hardly predicts"):
                polynomial.fit(X, y)
        else:
            assert polynomial.fit(X, y).r_squared == pytest.approx(r_squared)


# The range


@pytest.mark.parametrize(
    ("r", "value"), [(0.0, 0.1), (0.05, 0.1), (0.1, 0.1), (0.15, 0.15), (0.2, 0.2), (0.9, 0.2), (1e300, 0.2)]
)
def test_a_distance_outside_the_range_counts_like_its_nearer_end(r, value):
    gate = AccumulatedPolynomialGate(Limits(), 1.0, IDENTITY, (0.1, 0.2))
    assert gate.judge([[r, 1.0]], 0).accumulated == pytest.approx(value)
    assert gate.judge([[r, 1.0]], 0).distance == r


@pytest.mark.parametrize("r", [math.nan, math.inf])
def test_a_distance_that_is_no_number_computes_with_a_range_too(r):
    gate = AccumulatedPolynomialGate(Limits(), 1.0, IDENTITY, (0.1, 0.2))
    assert gate.judge([[r, 1.0]], 0).computed


def test_without_a_range_nothing_is_clamped():
    gate = AccumulatedPolynomialGate(Limits(), 1e9, IDENTITY)
    assert gate.judge([[50.0, 1.0]], 0).accumulated == pytest.approx(50.0)


# The file


def test_what_was_written_is_read_without_its_provenance(tmp_path):
    document = made()
    calibration.write(document, tmp_path / "made" / "tea.json")
    read = calibration.read(tmp_path / "made" / "tea.json", "tea_cache")
    assert read["coefficients"] == document["coefficients"]
    assert read["range"] == [X[0], X[-1]]
    assert read["calibrated_for"] == document["calibrated_for"]
    assert (read["file"], read["model"]) == ("tea.json", "tiny")
    assert "provenance" not in read
    assert calibration.read(read, "tea_cache") == read
    assert calibration.read(document, "tea_cache") == {key: value for key, value in read.items() if key != "file"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "tea.json"
    calibration.write(made(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        calibration.write(made() | {"spread": math.nan}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mag_cache"}, "is not a calibration of TeaCache"),
        ({"version": 2}, "of version 2; this version of omni reads 1"),
        ({"coefficients": [1, 2, 3]}, r"coefficients must be 5 finite numbers, not \[1, 2, 3\]"),
        ({"coefficients": [1, 2, 3, 4, True]}, "coefficients must be 5 finite numbers"),
        ({"coefficients": [1, 2, 3, 4, math.inf]}, "coefficients must be 5 finite numbers"),
        ({"range": None}, "range must be the smallest and the largest distance"),
        ({"range": [0.2, 0.1]}, "range must be"),
        ({"range": [0, 10**400]}, "range must be"),
        ({"coefficients": [0, 0, 0, 10**400, 0]}, r"coefficients must be 5 finite numbers, not \[0, 0, 0, <int"),
        ({"coefficients": list(range(10**5))}, r"coefficients must be 5 finite numbers, not \[0, .*, \.\.\.\]"),
        ({"calibrated_for": 3}, "calibrated_for must say"),
        ({"calibrated_for": {"scheduler_settings": [1, 2]}}, r"scheduler_settings must be an object, not \[1, 2\]"),
    ],
)
def test_a_broken_file_is_named_before_anything_is_patched(tmp_path, change, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(made() | change))
    with pytest.raises(ValueError, match=f"coefficients: {path}.*{message}"):
        METHODS["tea_cache"].check({"coefficients": str(path)})
    with pytest.raises(ValueError, match=f"coefficients: this dict.*{message}"):
        METHODS["tea_cache"].check({"coefficients": made() | change})


@pytest.mark.parametrize(
    "row",
    [
        {"steps": 0, "computed": [-1, 0], "sigmas": [1.0], "psnr": {"mean": 3.0}},
        {"steps": 0, "computed": [], "sigmas": [], "psnr": {"mean": 3.0}},
        {"steps": 10**400, "computed": [0], "sigmas": [1.0], "psnr": {"mean": 3.0}},
        {"steps": 3, "computed": [0, 2], "sigmas": [1.0, 0.5], "psnr": {"mean": 3.0}},
        {"steps": 3, "computed": [0, 2], "sigmas": [1.0, 0.5, 10**400], "psnr": {"mean": 3.0}},
        {"steps": 3, "computed": [0, 2], "sigmas": [1.0, 0.5, 0.1], "psnr": {"mean": math.nan}},
        {"steps": 3, "computed": [0, 2], "sigmas": [1.0, 0.5, 0.1], "psnr": {"mean": 3.0}, "speedup": 10**400},
    ],
    ids=["negative", "none", "many", "few sigmas", "large sigma", "psnr", "speedup"],
)
def test_a_schedule_that_is_none_is_named(tmp_path, row):
    path = tmp_path / "velocity.json"
    path.write_text(json.dumps({"method": "velocity_cache", "version": 1, "schedules": [row], "calibrated_for": {}}))
    with pytest.raises(ValueError, match=rf"{path}: (computed|sigmas|psnr|speedup) must .*writes a new one"):
        calibration.read(path, "velocity_cache")


def test_a_schedule_of_one_step_is_one(tmp_path):
    path = tmp_path / "velocity.json"
    row = {"steps": 1, "computed": [0], "sigmas": [1.0], "psnr": {"mean": 3.0}}
    path.write_text(json.dumps({"method": "velocity_cache", "version": 1, "schedules": [row], "calibrated_for": {}}))
    (schedule,) = calibration.read(path, "velocity_cache")["schedules"]
    assert schedule["computed"] == [0]


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\x00"])
def test_a_file_that_is_no_json_is_named_and_what_to_do(tmp_path, text):
    path = tmp_path / "tea.json"
    path.write_text(text)
    message = r"coefficients: .*tea\.json is not valid JSON.*; `omni calibrate` writes a new one, or take the file away"
    with pytest.raises(ValueError, match=message):
        METHODS["tea_cache"].check({"coefficients": path})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 9, "is not UTF-8 text"),
        (b"[" * 10**6, "is nested more than 64 deep"),
        (b" " * (9 << 20), "has more than 8 MiB"),
    ],
    ids=["binary", "deep", "large"],
)
def test_a_file_that_is_not_read_through_is_named(tmp_path, content, message):
    path = tmp_path / "tea.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} {message}"):
        calibration.read(path, "tea_cache")


def test_a_name_that_no_file_can_have():
    with pytest.raises(ValueError, match=r"is not a file path: File name too long"):
        calibration.read("a" * 5000, "tea_cache")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        calibration.read("a\0b", "tea_cache")


def test_a_home_of_nobody():
    with pytest.raises(ValueError, match="'~nosuchuser/x' is not a file path"):
        calibration.read("~nosuchuser/x", "tea_cache")


def test_a_calibration_in_the_place_of_a_directory(tmp_path):
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}: it is a directory"):
        calibration.write(made(), tmp_path)


def test_a_file_that_is_a_list_is_no_calibration(tmp_path):
    path = tmp_path / "tea.json"
    path.write_text("[1, 2, 3, 4, 5]")
    with pytest.raises(ValueError, match=r"tea\.json is not a calibration of TeaCache"):
        METHODS["tea_cache"].check({"coefficients": path})


@pytest.mark.parametrize("name", ["no/such.json", "12345", "."])
def test_a_file_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"coefficients: there is no file '{name}'"):
        METHODS["tea_cache"].check({"coefficients": name})


def test_the_file_and_the_parsed_file_decide_alike_and_as_the_bare_numbers_do(tmp_path):
    path = tmp_path / "tea.json"
    calibration.write(made(), path)
    decided = []
    for given in (path, str(path), made(), made()["coefficients"]):
        pipe = tiny.qwen_image()
        with omni_kernels.patched(pipe, "tea_cache", {"rel_l1_thresh": 0.19, "coefficients": given}) as handle:
            tiny.generate(pipe, num_inference_steps=8)
            decided.append([d.computed for d in handle.report.branches["cond"].decisions])
    # A distance above 0.2, the upper end of the range, counts as 0.2: that is over the threshold too.
    assert decided == [decided[0]] * 4


def test_patching_again_with_the_same_file_is_the_same_patch(tmp_path):
    path = tmp_path / "tea.json"
    calibration.write(made(), path)
    pipe = tiny.qwen_image()
    handle = omni_kernels.patch(pipe, "tea_cache", {"coefficients": path})
    assert omni_kernels.patch(pipe, "tea_cache", {"coefficients": str(path)}) is handle
    assert omni_kernels.patch(pipe, "tea_cache", handle.cache_config) is handle


# The runs that it holds for


def run_with(document, pipe=None, **arguments):
    """The warnings and the report's notes of one request."""
    pipe = pipe or tiny.qwen_image()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with omni_kernels.patched(pipe, "tea_cache", {"coefficients": document}) as handle:
            tiny.generate(pipe, **arguments)
            notes = handle.report.notes
    return [str(warning.message) for warning in caught if "calibrated" in str(warning.message)], notes


def test_a_run_like_those_that_were_calibrated_is_not_warned_of():
    said, notes = run_with(made())
    assert said == []
    assert notes == ["coefficients: calibrated on tiny, 8 steps, 64×64, R² 1.00"]


@pytest.mark.parametrize(
    ("changes", "arguments", "difference"),
    [
        ({"steps": 50}, {}, "8 steps instead of 50"),
        ({}, {"num_inference_steps": 6}, "6 steps instead of 8"),
        ({}, {"height": 96}, "latents of 24×64 instead of 16×64 (64×64 pixels)"),
        ({"blocks": 60}, {}, "4 transformer blocks instead of 60"),
        (
            {"scheduler": "UniPCMultistepScheduler"},
            {},
            "the scheduler FlowMatchEulerDiscreteScheduler instead of UniPCMultistepScheduler",
        ),
        ({"scheduler_settings": {"shift": 3.0, "max_shift": 0.9}}, {}, "the scheduler's shift 1.0 instead of 3.0"),
    ],
)  # fmt: skip
def test_a_run_that_differs_is_warned_of_once_and_in_what(changes, arguments, difference):
    said, notes = run_with(made(**changes), **arguments)
    assert said == [f"tea_cache was calibrated for other runs: this one has {difference}"]
    assert notes[1:] == said


def test_all_differences_are_told_in_one_warning_per_request():
    pipe = tiny.qwen_image()
    for _ in range(2):
        (said,), _ = run_with(made(steps=50, scheduler_settings={"shift_terminal": None}), pipe)
        assert said.endswith("8 steps instead of 50, the scheduler's shift_terminal 0.02 instead of None")


def test_settings_that_the_file_does_not_know_are_no_difference():
    said, _ = run_with(made(scheduler_settings={}, blocks=None))
    assert said == []


@pytest.mark.parametrize(
    ("given", "note"), [(None, "those published for the transformer's class"), (IDENTITY, "given as numbers")]
)
def test_the_report_says_which_coefficients_are_used(given, note):
    pipe = tiny.qwen_image()
    with omni_kernels.patched(pipe, "tea_cache", {"coefficients": given}) as handle:
        tiny.generate(pipe, num_inference_steps=3)
        assert handle.report.to_dict()["notes"] == [f"coefficients: {note}"]


OTHER_CLASS = (
    "was calibrated for the class FluxTransformer2DModel, but this transformer is a QwenImageTransformer2DModel: "
    "calibrate for this model with `omni calibrate tea_cache --model MODEL`"
)


def test_a_calibration_of_another_class_is_refused(tmp_path):
    document = made(transformer="FluxTransformer2DModel")
    calibration.write(document, tmp_path / "flux.json")
    for given, name in ((document, "this dict"), (tmp_path / "flux.json", "flux.json")):
        with pytest.raises(ValueError, match=f"^coefficients: {name} {OTHER_CLASS}$"):
            omni_kernels.patch(tiny.qwen_image(), "tea_cache", {"coefficients": given})
        with pytest.raises(ValueError, match=f"^coefficients: {name} {OTHER_CLASS}$"):  # no weights are loaded for this
            METHODS["tea_cache"].check({"coefficients": given}, TransformerFacts("QwenImageTransformer2DModel", 4))


def test_a_calibration_that_names_no_class_is_taken():
    assert run_with(made(transformer=None))[0] == []


def test_a_subclass_takes_the_calibration_of_its_class():
    """As FSDP makes one: it changes the class of the model."""
    pipe = tiny.z_image()
    run = calibration.describe(pipe.transformer, 4, pipe.scheduler, 8, (16, 64))
    document = calibration.document(magnitudes.fit([(1, 1.1), (2, 0.9)]), run, {"model": "tiny"})
    kind = type(pipe.transformer)
    pipe.transformer.__class__ = type(f"FSDP{kind.__name__}", (kind,), {})
    omni_kernels.patch(pipe, "mag_cache", {"mag_ratios": document}).undo()
    pipe = tiny.qwen_image()
    with pytest.raises(ValueError, match="class ZImageTransformer2DModel, but this transformer is a QwenImage"):
        omni_kernels.patch(pipe, "mag_cache", {"mag_ratios": document})
