"""`omni calibrate schedule`: batches, full runs, what it keeps, the file, on a tiny pipeline."""

from __future__ import annotations

import contextlib
import functools
import json

import diffusers
import numpy as np
import pytest
import tiny
import torch

import omni_kernels
from omni_runtime import Omni, cli
from omni_runtime.cache import calibration, schedules
from omni_runtime.calibrate import images as module
from omni_runtime.calibrate.images import Images, agreed
from omni_runtime.calibrate.schedule import find, plot, words
from omni_runtime.calibrate.search import Forecast, Tried, most_steps
from omni_runtime.cli.options import parser
from omni_runtime.compare import quality

STEPS = 8
FORECAST = Forecast(1.0, 2)
ARGUMENTS = {"num_inference_steps": STEPS, "height": 64, "width": 64, "negative_prompt": " ", "true_cfg_scale": 4.0}


@pytest.fixture
def omni():
    pipe = tiny.qwen_image(layers=2)
    pipe.set_progress_bar_config(disable=True)
    with Omni(pipe, cache_backend=None) as made:
        yield made


def requests_of(omni, prompts=("a cat", "a dog that sits"), seeds=(0, 1)):
    return [one for prompt in prompts for seed in seeds for one in omni.prepare(prompt, seed=seed, **ARGUMENTS)]


def test_a_batch_gives_what_its_images_give_alone(omni):
    """PSNR of a schedule, in batches and one by one; prompts of different lengths are padded, which rounds."""
    requests = requests_of(omni)
    found = []
    for batch in (1, 3, 8):
        images = Images(omni.pipe, requests, batch)
        images.record()
        found.append(images.sample((0, 3, 7), FORECAST).psnr)
        assert len(found[-1]) == len(requests)
    for psnr in found[1:]:
        np.testing.assert_allclose(psnr, found[0], atol=0.05)


def test_psnr_is_of_pictures_against_the_full_run(omni):
    """As comparisons measure it: what is lost in rounding to 8 bits, nobody sees."""
    (request,) = requests_of(omni, ("a cat",), (0,))
    images = Images(omni.pipe, [request], 1)
    images.record()
    full = tiny.generate(omni.pipe, output_type="pil")
    omni_kernels.unpatch(omni.pipe)
    with omni_kernels.patched(omni.pipe, "velocity_cache", {"schedule": [0, 3, 7], "reach": 0.5, "corrector_order": 3}):
        cached = tiny.generate(omni.pipe, output_type="pil")
    assert images.sample((0, 3, 7), Forecast(0.5, 3)).psnr == (float(quality.psnr(cached, full)),)
    assert images.sample(tuple(range(STEPS)), FORECAST).psnr == (100.0,)


def test_memory_that_is_too_small_for_a_batch_halves_it(omni, monkeypatch):
    made, requests = [], requests_of(omni)
    call = type(omni.pipe).__call__

    def limited(self, *args, **kwargs):
        prompts = kwargs["prompt"] if isinstance(kwargs["prompt"], list) else [kwargs["prompt"]]
        made.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(omni.pipe), "__call__", limited)
    images = Images(omni.pipe, requests, 4)
    images.record()
    assert made == [4, 2, 1, 1, 1, 1]


def test_memory_that_becomes_too_small_halves_a_batch_for_good(omni, monkeypatch):
    """Schedules hold more than full runs do."""
    images = Images(omni.pipe, requests_of(omni), 4)
    images.record()
    expected = images.sample((0, 3, 7), FORECAST).psnr
    made, call = [], type(omni.pipe).__call__

    def limited(self, *args, **kwargs):
        made.append(len(kwargs["prompt"]) if isinstance(kwargs["prompt"], list) else 1)
        if made[-1] > 1:
            raise torch.OutOfMemoryError
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(omni.pipe), "__call__", limited)
    found = images.sample((0, 3, 7), FORECAST).psnr
    assert made[:3] == [4, 2, 1]
    assert set(made[3:]) <= {1, 2}
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_speedups_are_medians_of_pairs_of_a_single_image(omni, monkeypatch):
    """A machine that becomes slower in one run, or for both runs of a pair, changes nothing."""
    images = Images(omni.pipe, requests_of(omni), 4)
    images.record()
    clock, made, call = [0.0], [], type(omni.pipe).__call__

    def timed(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        handle = images.under_way
        made.append(handle)
        slow = 3.0 if len(made) == 5 or len(made) > 15 else 1.0
        clock[0] += {None: 10.0, (0, 3, 7): 4.0, (0, 7): 2.5}[handle] * slow
        return output

    scheduled = Images._scheduled

    @contextlib.contextmanager
    def noted(self, computed, forecast):
        with scheduled(self, computed, forecast) as session:
            self.under_way = computed
            yield session
        self.under_way = None

    images.under_way = None
    monkeypatch.setattr(type(omni.pipe), "__call__", timed)
    monkeypatch.setattr(Images, "_scheduled", noted)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert images.speedups([((0, 3, 7), FORECAST), ((0, 7), FORECAST)]) == [2.5, 4.0]
    assert made == [None, *[None, (0, 3, 7), None, (0, 7)] * 5]


@pytest.mark.parametrize(
    ("ratios", "most", "expected"),
    [
        ([1.9, 1.95, 2.0, 1.9, 1.92], 2.0, 1.92),
        ([1.9, 1.95, 9.0, 1.9, 1.92], 2.0, 1.92),
        ([2.05, 2.05, 2.05, 2.05, 2.05], 2.0, 2.05),  # within the noise of a measurement
        ([5.17, 5.2, 5.1, 5.17, 5.2], 2.0, None),  # 25 of 50 steps cannot be five times as fast
        ([0.5, 0.5, 0.5, 0.5, 0.5], 2.0, None),
        ([1.0, 1.9, 1.2, 1.7, 1.4], 2.0, None),  # the rounds disagree
    ],
)
def test_times_that_cannot_be_are_none(ratios, most, expected):
    assert agreed(ratios, most) == expected


def test_an_edit_takes_one_picture_a_call(monkeypatch):
    """The seeds of one edit go together; other words or another picture do not."""
    pipe = tiny.qwen_image_edit()
    pipe.set_progress_bar_config(disable=True)
    calls, call = [], type(pipe).__call__

    @functools.wraps(call)
    def counted(self, *args, **kwargs):
        calls.append(kwargs.get("num_images_per_prompt", 1))
        return call(self, *args, **kwargs)

    picture = tiny.reference_image()
    edits = [("make it red", picture), ("make it red", picture.rotate(90)), ("make it blue", picture)]
    with Omni(pipe, cache_backend=None) as omni, tiny.small_references():
        requests = [
            one
            for prompt, image in edits
            for seed in (0, 1)
            for one in omni.prepare(prompt, seed=seed, image=image.copy(), **ARGUMENTS)
        ]
        monkeypatch.setattr(type(pipe), "__call__", counted)
        found = []
        for batch in (1, 8):
            images = Images(omni.pipe, requests, batch)
            images.record()
            found.append(images.sample((0, 3, 7), FORECAST).psnr)
    assert calls == [1] * 12 + [2] * 6
    np.testing.assert_allclose(found[1], found[0], atol=0.05)


def test_a_hopeless_schedule_is_not_sampled_on_all_images(omni):
    images = Images(omni.pipe, requests_of(omni, ("a cat", "a dog"), range(6)), 6)
    images.record()
    tried = images.sample((0, 3, 7), FORECAST)
    assert len(tried.psnr) == 12
    far = Tried((0, 1, 7), tuple(one + 10 + 0.1 * n for n, one in enumerate(tried.psnr)))
    assert images.sample((0, 3, 7), FORECAST, far).psnr == tried.psnr[:6]
    assert images.sample((0, 3, 7), FORECAST, tried).psnr == tried.psnr


def test_find_searches_and_measures_on_other_images(omni, tmp_path, monkeypatch):
    events = []
    journal = tmp_path / "search.jsonl"
    sample = Images.sample

    def in_known_time(self, *given):
        tried = sample(self, *given)
        self.spent[:] = [2.0]
        return tried

    monkeypatch.setattr(Images, "sample", in_known_time)

    def run(tries):
        return find(
            omni, requests_of(omni), requests_of(omni, ("a fox",), (7,)), [5, 3], tries=tries, journal=journal,
            listener=events.append,
        )  # fmt: skip

    found, document = run(16)
    assert list(found) == [5, 3]
    for budget, one in found.items():
        assert len(one.best.computed) == budget
        trail = [tried.score for tried in one.searched.trail]
        assert max(trail) == trail[-1] >= one.searched.even.score
        assert one.even.computed == schedules.even(STEPS, budget).computed
        assert [len(tried.psnr) for tried in (one.best, one.held_out, one.plain, one.even)] == [4, 1, 1, 1]
        assert one.held_out.computed == one.best.computed
    assert [event.budget for event in events] == sorted(e.budget for e in events), "nearest to a quarter first"
    first = [event for event in events if event.budget == 3]
    # Forecasts that are tried, the other known schedule, those of the search, and where it has ended.
    most, later = 6 + 1 + 16 + 1, 6 + 1 + 8 + 1
    assert [event.tries for event in first] == [most] * len(first)
    assert [event.seconds_left for event in first] == [
        2.0 * ((most - n) * 3 + later * 5) for n in range(1, len(first) + 1)
    ]
    assert events[-1].seconds_left == 2.0 * (later - events[-1].number) * 5
    rows = document["schedules"]
    assert [row["computed"] for row in rows] == [list(one.best.computed) for one in found.values()]
    assert rows[0]["psnr"]["images"] == 1
    text = "\n".join(words(found))
    assert "not searched on" in text
    assert plot(found).count("<polyline") == 2

    lines = journal.read_text().splitlines()
    again, _ = run(16)
    assert journal.read_text().splitlines() == lines, "what was sampled is not sampled again"
    assert {b: one.best for b, one in again.items()} == {b: one.best for b, one in found.items()}
    further, _ = run(24)
    assert further[3].searched.trail[-1].score >= found[3].searched.trail[-1].score
    assert journal.read_text().splitlines()[: len(lines)] == lines


@pytest.mark.parametrize("budgets", [[1], [9]])
def test_budgets_that_are_none_are_named(omni, budgets):
    with pytest.raises(ValueError, match=f"from 2 to the 8 steps of a request, not {budgets[0]}"):
        find(omni, requests_of(omni), requests_of(omni), budgets)


def test_two_steps_leave_nothing_to_search(omni):
    (request,) = omni.prepare("a cat", seed=0, **ARGUMENTS | {"num_inference_steps": 2})
    with pytest.raises(ValueError, match="nothing to search in 2 steps"):
        find(omni, [request], [request], [2])


def test_most_steps_counts_every_run():
    # 8 searched and 16 other images in full; 4 forecasts, the other known schedule, 60 schedules of 17 and the last; on
    # the others 3 finalists, both known schedules, the one with the chosen forecast, and fewer steps; one image in full
    # and under the schedule, five times.
    searched, others = 17 * 8 * (4 + 1 + 60 + 1), 17 * 16 * 7
    assert most_steps([17], 60, 8, 16, 50, 5) == 24 * 50 + searched + others + 50 + 5 * (50 + 17)


def test_the_methods_name_means_its_schedule():
    assert parser().parse_args(["calibrate", "velocity_cache"]).method == "schedule"


def test_command_writes_a_file_that_the_cache_takes(tmp_path, saved, capsys):
    out = tmp_path / "made" / "velocity_cache.json"
    arguments = ["calibrate", "schedule", "--model", str(saved["qwen_image"]), "--steps", "6", "--budgets", "3"]
    arguments += ["--size", "64", "--prompts", "a cat", "--prompts", "a dog", "--seeds", "0,1000", "--tries", "4"]
    arguments += ["--out", str(out), "--quiet"]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "3 computed steps" in told
    assert str(out) in told
    document = json.loads(out.read_text())
    provenance = document["provenance"]
    assert (provenance["prompts"], provenance["seeds"]) == (["a cat"], [0, 1000])
    assert (provenance["held_out"]["prompts"], provenance["held_out"]["seeds"]) == (["a dog"], [1001, 1002])
    (row,) = document["schedules"]
    assert row["speedup"] is None or 0.9 < row["speedup"] < 2.2  # of a tiny pipeline on a busy machine
    assert row["seconds"] > 0.0
    found = calibration.read(out, "velocity_cache")
    assert len(found["schedules"][0]["computed"]) == 3
    assert out.with_suffix(".search.svg").read_text().startswith("<svg")
    with Omni(str(saved["qwen_image"]), cache_backend="velocity_cache", cache_config={"calibration": str(out)}) as omni:
        result = omni.generate("a cat", seed=1, num_inference_steps=6, height=64, width=64)[0]
    assert (
        result.cache.branches["0" if "0" in result.cache.branches else "cond"].computed
        == found["schedules"][0]["computed"]
    )


def test_a_calibration_is_found_again_and_tells_how_it_goes_on(saved, tmp_path, capsys, monkeypatch):
    """Kept where the user's data are, taken by whatever loads the model; what is going on is told, and what is left."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    model = str(saved["qwen_image"])
    arguments = ["calibrate", "schedule", "--model", model, "--steps", "6", "--budgets", "4,3", "--size", "64"]
    arguments += ["--prompts", "a cat", "--held-out", "a dog", "--seeds", "0", "--tries", "3"]
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    file = calibration.kept_for(model, "velocity_cache")
    assert str(file) in told.out
    made = "--prompt 'a cat' --steps 6 --size 64x64"
    command = f"omni generate --model {model} {made} --cache-backend velocity_cache"
    assert f"""{command} --cache-config '{{"budget": 4}}'""" in told.out
    most = most_steps([4, 3], 3, 1, 1, 6, 5)
    hours = "2 min at 0.2 s each (a large model)"
    assert f"at most {most} computed steps of one image: with guidance {2 * most} forwards, {hours}" in told.err
    assert "3 steps: 1 of 11 schedules, " in told.err, "6 forecasts are tried, the other known schedule, and 3"
    assert "left at most, best " in told.err

    known = json.loads(file.read_text())["schedules"]
    for made in (model, diffusers.DiffusionPipeline.from_pretrained(model)):
        with Omni(made, cache_backend="velocity_cache", cache_config={"budget": 3}) as omni:
            (result,) = omni.generate("a cat", seed=1, num_inference_steps=6, height=64, width=64)
        assert [row["computed"] for row in known if row["budget"] == 3] == [
            branch.computed for branch in list(result.cache.branches.values())[:1]
        ]
        assert "calibrated on qwen_image" in " ".join(result.cache.notes)
    other = str(saved["z_image"])
    assert calibration.own_file(other, "velocity_cache") is None
    assert calibration.kept_for("Qwen/Qwen-Image", "tea_cache").parent.name.startswith("Qwen--Qwen-Image-")


def test_an_interrupted_search_goes_on_with_the_same_command(saved, tmp_path, capsys, monkeypatch):
    arguments = ["calibrate", "schedule", "--model", str(saved["qwen_image"]), "--steps", "6", "--budgets", "3"]
    arguments += ["--size", "64", "--prompts", "a cat", "--held-out", "a dog", "--seeds", "0", "--tries", "4"]
    arguments += ["--out", str(tmp_path / "velocity_cache.json"), "--json", "--quiet"]
    sample, sampled = Images.sample, []

    def interrupted(self, computed, forecast, best=None):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        sampled.append((computed, forecast))
        return sample(self, computed, forecast, best)

    with monkeypatch.context() as patch:
        patch.setattr(Images, "sample", interrupted)
        assert cli.main(arguments) == 130
    assert "run the same command to continue" in capsys.readouterr().err
    monkeypatch.setattr(Images, "sample", lambda *given: [sampled.append(given[1:3]), sample(*given)][1])
    assert cli.main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["schedules"]
    on_searched, on_others = sampled[: row["tries"]], sampled[row["tries"] :]
    assert len(set(on_searched)) == row["tries"] >= 4, "none was sampled again"
    assert schedules.even(6, 3).computed in [computed for computed, _ in on_others]
    assert tuple(row["computed"]) in [computed for computed, _ in on_others]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tea_cache", "--budgets", "3"], "--budgets is for a schedule"),
        (["tea_cache", "--fresh"], "--fresh is for a schedule"),
        (["schedule", "--budgets", "x"], "must be a whole number of at least 1"),
        (["schedule", "--budgets", "99", "--steps", "4", "--held-out", "a dog"], "from 2 to the 4 steps"),
        (["schedule"], "--held-out is missing: a schedule is measured on other prompts than those of its search"),
        (["schedule", "--held-out", "a cat"], "--held-out has prompts that are searched on: a cat"),
    ],
)
def test_wrong_options_are_named(arguments, named, saved, tmp_path, capsys):
    model = ["--model", str(saved["qwen_image"]), "--prompts", "a cat", "--out", str(tmp_path / "x.json"), "--quiet"]
    assert cli.main(["calibrate", *arguments, *model, "--size", "64"]) == 2
    assert named in capsys.readouterr().err


def test_no_schedule_is_searched_under_new_noise(omni, monkeypatch):
    monkeypatch.setattr("omni_runtime.calibrate.schedule.draws_noise", lambda scheduler: True)
    with pytest.raises(ValueError, match="draws new noise at each step: a schedule cannot be searched"):
        find(omni, requests_of(omni), requests_of(omni), [4])
