"""benchmarks/quality.py and the libraries that it installs, on few steps."""

import json

import pytest
import tiny
import torch
from calibrated import CALIBRATED

pytest.importorskip("cache_dit")

from benchmarks import libraries, quality
from benchmarks.results import RESULTS
from omni_runtime import Omni
from omni_runtime.cache.forecasters import FORECASTERS
from omni_runtime.cache.masks import POLICIES
from omni_runtime.cache.methods import METHODS
from omni_runtime.compare import report_html
from omni_runtime.compare.cells import Run
from omni_runtime.generation.loading import embedded_models
from omni_runtime.generation.result import identified

STEPS = 8
#: The embedded models whose comparison is recorded.
RECORDED = [model for model in CALIBRATED if (RESULTS / f"quality-{model}.json").is_file()]
RUNS = [
    libraries.cache_dit_run("a", "m", {"residual_diff_threshold": 0.3, "enable_taylorseer": True}, STEPS),
    libraries.cache_dit_run("d", "m", {"residual_diff_threshold": 0.3, "forecaster": "foca"}, STEPS),
    libraries.cache_dit_run("e", "m", {"residual_diff_threshold": 0.3, "forecaster": "dmd"}, STEPS),
    libraries.diffusers_run("b", "m", "FirstBlockCacheConfig", {"threshold": 0.2}, STEPS),
    libraries.diffusers_run("f", "m", "MagCacheConfig", {"threshold": 0.3, "mag_ratios": [1.0, 1.01]}, STEPS),
    libraries.diffusers_run("c", "m", "TaylorSeerCacheConfig", {"taylor_factors_dtype": "float32"}, STEPS),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_librarys_cache_works_while_it_is_open_and_leaves_nothing(run):
    pipe = tiny.qwen_image(layers=4)
    expected = tiny.generate(pipe, num_inference_steps=STEPS, output_type="latent")
    with run.install(pipe):
        cached = tiny.generate(pipe, num_inference_steps=STEPS, output_type="latent")
        assert not libraries.is_clean(pipe)
        again = tiny.generate(pipe, num_inference_steps=STEPS, output_type="latent")
    assert libraries.is_clean(pipe)
    assert not torch.equal(cached, expected)
    torch.testing.assert_close(again, cached, rtol=0, atol=0)
    torch.testing.assert_close(
        tiny.generate(pipe, num_inference_steps=STEPS, output_type="latent"), expected, rtol=0, atol=0
    )


def test_a_setting_that_the_library_lacks_is_refused():
    run = libraries.cache_dit_run("a", "m", {"threshold": 0.3}, STEPS)
    with pytest.raises(ValueError, match="threshold"), run.install(tiny.qwen_image()):
        pass


def test_mag_ratios_are_of_every_step_and_near_one():
    pipe = tiny.qwen_image(layers=4)
    ratios = libraries.mag_ratios(pipe, lambda: tiny.generate(pipe, num_inference_steps=STEPS), STEPS)
    assert len(ratios) == STEPS
    assert ratios[0] == 1.0
    assert all(0.2 < ratio < 5 for ratio in ratios)
    assert libraries.is_clean(pipe)


def test_a_pair_holds_where_ours_is_as_good_and_as_fast():
    def run(name, psnr, seconds):
        cells = [{"psnr": p, "speedup": 1 / s} for p, s in zip(psnr, seconds, strict=True)]
        return {"name": name, "nfe": {"mean": 10.0}, "cells": cells}

    document = {
        "runs": [
            run("ours", [30.0, None, 31.0], [1.0, 1.0, 9.0]),
            run("worse", [30.2, None, 31.2], [1.1, 1.2, 1.0]),
            run("slower", [29.0, 30.0, 31.0], [0.9, 0.9, 0.9]),
        ]
    }
    better_there = quality.compared(quality.Pair("ours", "worse"), document)
    assert not better_there["as_good"]
    assert better_there["as_fast"]
    assert better_there["times_as_fast"] == 1.1
    slower_here = quality.compared(quality.Pair("ours", "slower"), document)
    assert slower_here["as_good"]
    assert not slower_here["as_fast"]


def test_aims_are_held_against_plain_sampling_and_the_nearest_caches_of_blocks_with_no_fewer_forwards():
    def run(name, backend, method, nfe, *psnr):
        cells = [{"psnr": p} for p in psnr]
        return {"name": name, "cache_backend": backend, "method": method, "nfe": {"mean": nfe}, "cells": cells}

    document = {
        "runs": [
            run("25 steps", None, "fewer steps", 50, 40.0, 41.0),
            run("velocity 25", "velocity_cache", "velocity cache", 50, 48.0, 50.0),
            run("easy", "easy_cache", "EasyCache", 60, 90.0, 90.0),
            run("fewer forwards", "tea_cache", "TeaCache", 49, 80.0, 80.0),
            run("nearest", "tea_cache", "TeaCache", 51, 47.0, 47.0),
            run("many more", "tea_cache", "TeaCache", 70, 80.0, 80.0),
            run("a library", "cache-dit 1", "DBCache", 55, 40.0, 48.0),
            run("10 steps", None, "fewer steps", 20, 30.0, 32.0),
            run("velocity 10", "velocity_cache", "velocity cache", 20, 30.0, None),
            {"name": "velocity, even 10", "cache_backend": "velocity_cache", "method": "velocity, evenly spread"}
            | {"nfe": {"mean": 20}, "psnr": {"mean": 64.0, "p5": 35.0}},  # kept from earlier results
        ]
    }
    told = [(one["what"], one["figure"], one["at_least"], one["met"]) for one in quality.aims(document)]
    assert told == [
        ("velocity 25 above 25 steps, mean", 8.5, 8.0, True),
        ("velocity 25 above 25 steps, 5th percentile", 8.05, 0.0, True),
        ("velocity 25 above nearest, mean", 2.0, 3.0, False),
        ("velocity 25 above nearest, 5th percentile", 1.1, 0.0, True),
        ("velocity 10 above 10 steps, mean", 34.0, 0.0, True),
        ("velocity 10 above 10 steps, 5th percentile", 3.4, 0.0, True),
        ("velocity 10 above velocity, even 10, mean", 1.0, 0.0, True),
        ("velocity 10 above velocity, even 10, 5th percentile", -1.5, 0.0, False),
    ]


def test_every_method_and_forecaster_is_in_the_contest():
    contest = quality.contest_of([1.0] * quality.STEPS, quick=False)
    assert {run.backend for run in contest.runs if run.install is None} - {None} == set(METHODS)
    configs = [run.config or {} for run in contest.runs]
    told = {"taylorseer" if config.get("enable_taylorseer") else config.get("forecaster") for config in configs}
    assert told - {None} == set(FORECASTERS) - {"reuse"}


def test_every_mask_is_a_schedule_in_the_contest():
    contest = quality.contest_of(None, quick=False)
    configs = {run.name: run.config for run in contest.runs if run.backend == "velocity_cache"}
    for policy in POLICIES:
        assert configs[f"velocity, scm-{policy}"] == {"schedule": f"scm-{policy}"}
        assert METHODS["velocity_cache"].check(configs[f"velocity, scm-{policy}"])


def test_each_budget_with_an_aim_is_in_the_contest_and_the_small_ones_also_undamped():
    contest = quality.contest_of(None, quick=False)
    configs = {run.name: run.config for run in contest.runs}
    for budget in quality.ABOVE_PLAIN:
        assert configs[f"velocity {budget}"] == {"budget": budget}
        assert f"{budget} steps" in configs
    for budget in (13, 10):
        config = METHODS["velocity_cache"].check(configs[f"velocity {budget}, undamped"])
        assert config["budget"] == budget
        assert config["corrector_order"] == 0
        assert config["reach"] > quality.STEPS


def test_a_run_on_a_schedule_tells_its_computed_steps():
    def run(backend, *cells):
        return {"cache_backend": backend, "cells": [{"branches": one} for one in cells]}

    one = {"cond": {"computed": "101", "measured": [None] * 3}, "uncond": {"computed": "101"}}
    other = {"cond": {"computed": "111"}}
    runs = [run("velocity_cache", one, one), run("velocity_cache", one, other), run("tea_cache", one)]
    assert quality.summary({"model": "m", "runs": runs}) == {
        "model": "m",
        "runs": [
            {"cache_backend": "velocity_cache", "computed": [0, 2]},
            {"cache_backend": "velocity_cache", "computed": None},
            {"cache_backend": "tea_cache"},
        ],
    }


def test_only_some_runs_are_made_again_and_the_others_kept():
    """Of those that are still in the contest, in its order."""

    def runs(**psnr):
        return [
            {"name": name, "cache_backend": None, "method": "m", "nfe": {"mean": 1}, "psnr": {"mean": one, "p5": one}}
            for name, one in psnr.items()
        ]

    before = {"runs": runs(full=1.0, old=2.0, gone=3.0, again=4.0), "pairs": ["p"], "left_out": {"x": "y"}}
    made = {"command": "c", "runs": runs(full=5.0, again=6.0, new=7.0)}
    found = quality.merged(made, before, ["full", "new", "again", "old", "not made"])
    assert [(run["name"], run["psnr"]["mean"]) for run in found["runs"]] == [
        ("full", 5.0), ("new", 7.0), ("again", 6.0), ("old", 2.0),
    ]  # fmt: skip
    assert (found["pairs"], found["left_out"], found["kept"], found["command"]) == (["p"], {"x": "y"}, ["old"], "c")
    assert quality.matches("velocity, even 8", ["auto*", "velocity*"])
    assert not quality.matches("TeaCache + velocity", ["auto*", "velocity*"])


def test_every_pair_is_one_method_at_the_same_settings():
    contest = quality.contest_of([1.0] * quality.STEPS, quick=False)
    runs = {run.name: run for run in contest.runs}
    assert len(runs) == len(contest.runs)
    assert contest.pairs
    for pair in contest.pairs:
        assert runs[pair.ours].config == runs[pair.theirs].config
        assert runs[pair.ours].install is None
        assert runs[pair.theirs].install is not None


def test_what_a_model_cannot_have_is_left_out_and_said():
    contest = quality.contest_of(None, quick=True)
    pipe = tiny.z_image()
    request = quality.Omni(pipe, cache_backend=None)
    (prepared,) = request.prepare("a cat", seed=0, num_inference_steps=quality.STEPS, height=64, width=64)
    request.close()
    quality.leave_out(contest, pipe, prepared)
    assert "calibrat" in contest.left_out.pop("MagCache"), "ours: this model has no ratios"
    assert set(contest.left_out) == {"diffusers first-block", "diffusers TaylorSeer"}
    assert all("enable_cache" in why for why in contest.left_out.values())
    assert not any("diffusers" in pair.theirs for pair in contest.pairs)
    assert any(isinstance(run, Run) and run.install is not None for run in contest.runs)


def test_the_command_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "STEPS", STEPS)
    arguments = ["--quick", "--prompts", "1", "--model", "emoji-qwen-image", "--work", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert quality.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "quality-emoji-qwen-image.json").read_text())
    assert {run["name"] for run in found["runs"]} >= {"no cache", "DBCache 0.12", "cache-dit DBCache 0.12"}
    assert found["pairs"]
    # The library takes no derivative before its third computed step: in so short a run its TaylorSeer is another.
    same = [pair for pair in found["pairs"] if "TaylorSeer" not in pair["ours"]]
    assert same
    assert all(pair["as_good"] and pair["nfe"] == pair["their_nfe"] for pair in same)
    velocity = [run for run in found["runs"] if run["cache_backend"] == "velocity_cache"]
    assert velocity
    for run in velocity:
        assert (run["computed"][0], run["computed"][-1]) == (0, STEPS - 1)
        assert len(run["computed"]) == run["nfe"]["mean"] / 2
    assert (tmp_path / "quality-emoji-qwen-image.svg").read_text().startswith("<svg")
    assert "no cache" in capsys.readouterr().out


@pytest.mark.parametrize("model", CALIBRATED)
def test_shipped_schedules_were_searched_on_other_images(model):
    """Neither a prompt that is compared on (of an edit: its picture) nor a seed, and no held-out seed either."""
    provenance = json.loads((embedded_models()[model] / "velocity_cache.json").read_text())["provenance"]
    with Omni(model, device="cpu", cache_backend=None) as omni:
        compared = quality.requests_of(omni, model, quality.PROMPTS, quality.SEEDS)
    assert not {request.seed for request in compared} & {*provenance["seeds"], *provenance["held_out"]["seeds"]}
    pictures = [identified(request.arguments["image"]) for request in compared if "image" in request.arguments]
    if pictures:
        assert provenance["references"]
        assert not [one for one in provenance["references"] if one in pictures]
    else:
        assert not {request.prompt for request in compared} & set(provenance["prompts"])


# What the repository records


def recorded(kind, model):
    return json.loads((RESULTS / f"{kind}-{model}.json").read_text())


#: Model → aims that it misses. On emoji-wan, the rival computes 69 of 100 forwards in part, and the velocity cache 50.
#: Edits have a calibration; the default schedule, which they do without, is a little below even steps there.
MISSED = {
    "emoji-wan": ["velocity 25 above DBCache + TaylorSeer 0.04, mean"],
    "emoji-z-image": [
        f"velocity, uncalibrated {budget} above velocity, even {budget}, 5th percentile" for budget in (17, 8)
    ],
    "emoji-qwen-image-edit": [
        f"velocity, uncalibrated {budget} above velocity, even {budget}, {statistic}"
        for budget in (10, 8)
        for statistic in ("mean", "5th percentile")
    ],
}


@pytest.mark.parametrize("model", RECORDED)
def test_every_recorded_aim_is_met_or_known_to_be_missed(model):
    """Also where the figures are held against the aims again, as far as they are there."""
    found = recorded("quality", model)
    assert found["aims"]
    missed = [one["what"] for one in found["aims"] if not one["met"] or one["figure"] < one["at_least"]]
    assert missed == MISSED.get(model, [])
    told = " ".join(one["what"] for one in found["aims"])
    for budget in quality.ABOVE_PLAIN:
        assert f"velocity {budget} above {budget} steps, mean" in told
    runs = {run["name"]: run["psnr"] for run in found["runs"]}
    for budget, above in quality.ABOVE_PLAIN.items():
        assert runs[f"velocity {budget}"]["mean"] - runs[f"{budget} steps"]["mean"] >= above
        assert runs[f"velocity {budget}"]["p5"] >= runs[f"{budget} steps"]["p5"]


def test_runs_that_are_better_with_as_many_forwards_are_told():
    def run(name, method, nfe, mean, p5):
        return {"name": name, "method": method, "nfe": {"mean": nfe}, "psnr": {"mean": mean, "p5": p5}}

    document = {
        "runs": [
            run("no cache", "no cache", 50, None, None),
            run("velocity 8", "velocity cache", 8, 30.0, 20.0),
            run("velocity 25", "velocity cache", 25, 50.0, 40.0),
            run("velocity 45", "velocity cache", 45, 60.0, 50.0),
            run("few", "TeaCache", 7, 99.0, 99.0),
            run("even", "velocity, evenly spread", 25, 50.02, 41.0),
            run("between", "TeaCache", 35, 55.1, 44.0),
            run("worse", "DBCache", 30, 51.0, 41.0),
            run("most", "DBCache", 46, 99.0, 99.0),
        ]
    }
    assert quality.behind(document) == [
        {"run": "between", "statistic": "mean", "forwards": 70.0, "psnr": 55.1, "ours": 55.0},
        {"run": "even", "statistic": "5th percentile", "forwards": 50.0, "psnr": 41.0, "ours": 40.0},
    ]


@pytest.mark.parametrize("model", RECORDED)
def test_what_is_better_elsewhere_is_recorded(model):
    found = recorded("quality", model)
    assert found["behind"] == quality.behind(found)
    assert all(one["run"].startswith("velocity, uncalibrated ") for one in found["behind"]), "the page says so"


@pytest.mark.parametrize("model", RECORDED)
def test_recorded_runs_are_of_the_schedules_that_are_shipped(model):
    """Results of before their computed steps were recorded tell the model that the schedule was calibrated on alone."""
    shipped = json.loads((embedded_models()[model] / "velocity_cache.json").read_text())["schedules"]
    computed = {(row["steps"], len(row["computed"])): row["computed"] for row in shipped}
    runs = {run["name"]: run for run in recorded("quality", model)["runs"]}
    for budget in quality.ABOVE_PLAIN:
        run = runs[f"velocity {budget}"]
        assert run["notes"] == [f"schedule: {budget} of {run['steps']} steps computed, calibrated on {model}"]
        if "computed" in run:
            assert run["computed"] == computed[run["steps"], budget]


@pytest.mark.parametrize("model", RECORDED)
def test_the_plot_names_the_presets(model):
    found = recorded("quality", model)
    text = (RESULTS / f"quality-{model}.svg").read_text(encoding="utf-8")
    assert text == report_html.plot_svg(found)
    presets = [run["name"] for run in found["runs"] if run["cache_backend"] == "auto"]
    for name in ("no cache = auto, exact" if presets else "no cache", *presets):
        assert f">{name}</text>" in text
