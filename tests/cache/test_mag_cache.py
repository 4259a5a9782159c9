"""mag_cache against the published rule written out, and against diffusers' own MagCache on the same weights."""

import contextlib
import io
import json
import math
from fractions import Fraction

import diffusers
import pytest
import tiny
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp
from pairs import in_turn

import omni_kernels
from omni_runtime.cache import calibration, magnitudes
from omni_runtime.cache.gates import Limits, MagnitudeRatioGate, Plan
from omni_runtime.cache.models import MODELS
from omni_runtime.calibrate import fitting as calibrate

QWEN = MODELS["QwenImageTransformer2DModel"].mag_ratios
STEPS = 20


def skipped_steps(ratios, steps, threshold, most, retention):
    """MagCache's rule; step 0 fills the cache."""
    accumulated, err, n, skipped = 1.0, 0.0, 0, []
    for step in range(1, steps):
        if step < int(retention * steps + 0.5):
            continue
        accumulated *= ratios[round(step * (len(ratios) - 1) / (steps - 1))]
        n += 1
        err += abs(1.0 - accumulated)
        if err <= threshold and n <= most:
            skipped.append(step)
        else:
            accumulated, err, n = 1.0, 0.0, 0
    return skipped


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": STEPS} | arguments)


# The gate


@pytest.mark.parametrize("steps", [50, 28, 20, 7, 1])
@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.06, 2, 0.2), (0.06, 3, 0.0), (0.3, 5, 0.1), (0, 3, 0)])
def test_the_gate_skips_as_the_rule_does(steps, threshold, most, retention):
    retained = int(retention * steps + 0.5)
    gate = MagnitudeRatioGate(Limits(warmup=retained, longest_run=most), threshold, magnitudes.resized(QWEN, steps))
    gate.settle(True)  # step 0: nothing cached yet
    skipped = []
    for step in range(1, steps):
        plan, _ = gate.plan(step)
        assert plan is not Plan.MEASURE
        gate.settle(plan is Plan.COMPUTE)
        if plan is Plan.SKIP:
            skipped.append(step)
    assert skipped == skipped_steps(QWEN, steps, threshold, most, retention)


def test_an_error_at_the_threshold_skips():
    gate = MagnitudeRatioGate(Limits(), 0.25, [1.0, 1.25, 1.0])
    gate.settle(True)
    assert gate.plan(1) == (Plan.SKIP, "error within threshold")
    assert gate.accumulated == 0.25
    gate.settle(False)
    assert gate.plan(2) == (Plan.COMPUTE, "error above threshold")
    assert gate.accumulated == 0.5


@pytest.mark.parametrize("steps", range(1, 120))
def test_ratios_are_resized_to_the_nearest_as_diffusers_does(steps):
    """Halfway between two, which one is diffusers' depends on the rounding of float32."""
    places = torch.arange(50.0, dtype=torch.float64)
    theirs = nearest_interp(places, steps).tolist()
    for step, (place, expected) in enumerate(zip(magnitudes.resized(places.tolist(), steps), theirs, strict=True)):
        exact = Fraction(49 * step, steps - 1) if steps > 1 else Fraction(49)
        assert abs(place - exact) <= Fraction(1, 2)
        assert place == expected or abs(place - exact) == Fraction(1, 2)


#: As the MagCache project gives them for Qwen-Image in 50 steps: without the first step's, which has none before it.
QWEN_IMAGE = """
    1.64062 1.45312 1.1875 1.17188 1.05469 1.21094 1.10938 1.11719 1.13281 1.11719 1.07812 1.07031 1.08594 1.08594
    1.07812 1.03906 1.04688 1.07812 1.07031 1.03125 1.07812 1.04688 1.04688 1.04688 1.03906 1.01562 1.03125 1.02344
    1.02344 1.02344 1.03906 1.0 1.01562 1.0 0.99219 1.00781 0.98047 0.95703 0.96875 0.99219 0.92578 0.92578 0.90625
    0.85938 0.80469 0.87891 0.75 0.60938 0.55078
"""


def test_published_ratios():
    assert list(QWEN) == [1.0, *map(float, QWEN_IMAGE.split())]
    assert len(QWEN) == 50
    assert MODELS["FluxTransformer2DModel"].mag_ratios == pytest.approx(FLUX_MAG_RATIOS.tolist(), abs=1e-6)


# Against diffusers

GUIDANCE = {"CFG": {}, "no CFG": {"negative_prompt": None}}
SETTINGS = {
    "defaults": {},
    "tight": {"threshold": 0.02, "retention_ratio": 0.0},
    "loose": {"threshold": 0.5, "max_skip_steps": 4, "retention_ratio": 0.1},
    "no retention, one": {"threshold": 1.0, "max_skip_steps": 1, "retention_ratio": 0.0},
}


@pytest.mark.parametrize(("setting", "guidance"), in_turn(SETTINGS, GUIDANCE))
def test_computed_steps_and_images_are_those_of_diffusers(setting, guidance):
    guidance = GUIDANCE[guidance]
    keys = {"mag_ratios": list(QWEN), **SETTINGS[setting]}
    theirs = tiny.qwen_image()
    calls = []
    theirs.transformer.transformer_blocks[1].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    theirs.transformer.enable_cache(diffusers.MagCacheConfig(num_inference_steps=STEPS, **keys))
    expected = latents(theirs, **guidance)
    ours = tiny.qwen_image()
    with omni_kernels.patched(ours, "mag_cache", keys) as handle:
        found = latents(ours, **guidance)
        report = handle.report
    wanted = {"threshold": 0.06, "max_skip_steps": 3, "retention_ratio": 0.2} | SETTINGS[setting]
    skipped = skipped_steps(QWEN, STEPS, *wanted.values())
    assert [branch.skipped for branch in report.branches.values()] == [skipped] * (1 if guidance else 2)
    assert report.forwards == len(calls)
    assert report.forwards_saved > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_another_forecaster_may_stand_in():
    pipe = tiny.qwen_image()
    made = {}
    for forecaster in (None, "newton", "dmd"):
        with omni_kernels.patched(pipe, "mag_cache", {"threshold": 0.5, "forecaster": forecaster}) as handle:
            made[forecaster] = latents(pipe)
            skipped = handle.report.branches["cond"].skipped
    assert skipped
    assert not torch.equal(made[None], made["newton"])


def test_the_report_tells_the_error_and_which_ratios():
    pipe = tiny.qwen_image()
    with omni_kernels.patched(pipe, "mag_cache", {"mag_ratios": [1.0, 1.02], "retention_ratio": 0.0}) as handle:
        latents(pipe, num_inference_steps=4)
        report = handle.report
    decisions = report.branches["cond"].decisions
    assert [(d.computed, d.reason) for d in decisions] == [
        (True, "nothing cached yet"),
        (False, "error within threshold"),
        (False, "error within threshold"),
        (True, "error above threshold"),
    ]
    assert [d.accumulated for d in decisions[1:]] == pytest.approx([0.0, 0.02, 0.02 + (1.02**2 - 1)])
    assert report.notes == ["mag_ratios: given as numbers"]


def test_image_to_image_goes_by_the_ratios_of_the_steps_that_it_runs(qwen_pipe):
    pipe = diffusers.QwenImageImg2ImgPipeline.from_pipe(qwen_pipe)
    ratios = [1.0] * 4 + [1.0, 1.0, 9.0, 1.0]
    handle = omni_kernels.patch(pipe, "mag_cache", {"mag_ratios": ratios, "retention_ratio": 0.0})
    pipe(
        prompt="a cat", image=tiny.reference_image(64), strength=0.5, num_inference_steps=8, height=64, width=64,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert handle.report.branches["cond"].computed == [0, 2]


def test_a_model_without_ratios_is_refused_before_anything_is_patched(z_pipe):
    with pytest.raises(ValueError, match=r"no MagCache ratios are known .* 'mag_ratios', .*omni calibrate mag_cache"):
        omni_kernels.patch(z_pipe, "mag_cache")
    assert "_omni_kernels_handle" not in vars(z_pipe)


# Calibration


def diffusers_ratios(pipe, steps):
    """What diffusers prints of a run with `calibrate=True`."""
    told = io.StringIO()
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with contextlib.redirect_stdout(told):
        latents(pipe, num_inference_steps=steps, negative_prompt=None)
    pipe.transformer.disable_cache()
    return json.loads(told.getvalue().splitlines()[2])


def test_recorded_ratios_are_those_that_diffusers_calibrates():
    expected = diffusers_ratios(tiny.qwen_image(), STEPS)
    pipe = tiny.qwen_image()
    with calibrate.recording(pipe, "mag_cache") as session:
        latents(pipe, negative_prompt=None)
    assert [(point.branch, point.step, point.sample) for point in session.points] == [
        ("cond", step, 0) for step in range(1, STEPS)
    ]
    assert [1.0, *(point.ratio for point in session.points)] == pytest.approx(expected, rel=1e-5)
    assert magnitudes.fit((p.step, p.ratio) for p in session.points).mag_ratios == pytest.approx(expected, abs=1e-5)


def test_ratios_are_of_each_sample_and_of_the_noise_alone():
    pipe = tiny.qwen_image_edit()
    seen = []
    blocks = pipe.transformer.transformer_blocks
    blocks[0].register_forward_pre_hook(lambda _, a, kwargs: seen.append([kwargs["hidden_states"]]), with_kwargs=True)
    blocks[-1].register_forward_hook(lambda _, a, output: seen[-1].append(output[1]))
    with calibrate.recording(pipe, "mag_cache") as session:
        latents(pipe, num_inference_steps=4, negative_prompt=None, num_images_per_prompt=2)
    norms = [(after - before)[:, :16].double().norm(dim=-1) for before, after in seen]
    assert norms[0].shape == (2, 16)
    for point in session.points:
        expected = (norms[point.step][point.sample] / norms[point.step - 1][point.sample]).mean()
        assert point.ratio == pytest.approx(expected.item(), rel=1e-4)
    assert len(session.points) == 2 * 3


def test_the_ratio_of_a_step_is_the_mean_over_the_samples():
    fitted = magnitudes.fit([(1, 1.1), (2, 0.9), (1, 1.3), (2, 0.9)])
    assert fitted.mag_ratios == (1.0, 1.2, 0.9)
    assert fitted.spread == pytest.approx(0.1)
    assert fitted.points == 4
    assert "4 points" in fitted.words()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "no ratios of one step to the next"),
        ([(1, 1.0), (2, math.nan)], "1 of 2 recorded ratios"),
        ([(1, math.inf), (2, 0.0)], "2 of 2 recorded ratios"),
    ],
)
def test_useless_ratios_are_refused_in_plain_words(points, message):
    with pytest.raises(calibration.UselessFitError, match=message):
        magnitudes.fit(points)


def document(**changes):
    pipe = tiny.qwen_image()
    run = calibration.describe(pipe.transformer, 4, pipe.scheduler, 8, (16, 64))
    return calibration.document(magnitudes.fit([(1, 1.1), (2, 0.9)]), run | changes, {"model": "tiny"})


def test_the_file_and_the_bare_numbers_decide_alike(tmp_path):
    calibration.write(document(), tmp_path / "mag.json")
    decided = []
    for given in (tmp_path / "mag.json", document(), [1.0, 1.1, 0.9]):
        pipe = tiny.qwen_image()
        with omni_kernels.patched(pipe, "mag_cache", {"mag_ratios": given, "threshold": 0.15}) as handle:
            latents(pipe, num_inference_steps=8)
            decided.append([d.computed for d in handle.report.branches["cond"].decisions])
    assert decided == [decided[0]] * 3
    assert {True, False} == set(decided[0])


def test_a_run_unlike_the_calibrated_ones_is_warned_of():
    pipe = tiny.qwen_image()
    with omni_kernels.patched(pipe, "mag_cache", {"mag_ratios": document(steps=50)}) as handle:
        with pytest.warns(UserWarning, match="mag_cache was calibrated for other runs: this one has 8 steps"):
            latents(pipe, num_inference_steps=8)
        assert handle.report.notes[0] == "mag_ratios: calibrated on tiny, 50 steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "tea_cache"}, "is not a calibration of MagCache"),
        ({"mag_ratios": []}, "mag_ratios must be finite numbers > 0"),
        ({"mag_ratios": [1.0, 0.0]}, "mag_ratios must be finite numbers > 0"),
        ({"mag_ratios": [1.0, math.nan]}, "mag_ratios must be finite numbers > 0"),
        ({"mag_ratios": 1.0}, "mag_ratios must be finite numbers > 0"),
        ({"calibrated_for": None}, "calibrated_for must say"),
    ],
)
def test_a_broken_file_is_named(change, message):
    with pytest.raises(ValueError, match=f"mag_ratios: this dict.*{message}"):
        omni_kernels.patching.backends.get("mag_cache").check({"mag_ratios": document() | change})


def test_a_fit_is_told_without_its_first_step_which_has_none_before_it():
    told = magnitudes.Ratios((1.0, 1.5, 1.25), 0.1, 6).words()
    assert "by a factor of 1.25 to 1.5;" in told
    assert told.endswith("mag_ratios 1, 1.5, 1.25")
