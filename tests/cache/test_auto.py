"""`auto`: presets and numbers instead of a method and its keys, what is answered and what it rests on."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import tiny
import torch

import omni_kernels
from benchmarks.models.tiny import build
from omni_runtime import Omni, cli
from omni_runtime.cache import calibration, presets, schedules
from omni_runtime.cache.methods import METHODS
from omni_runtime.cache.output import Chosen, OutputSteps
from omni_runtime.cache.presets import FEWEST, PRESETS, SHORTEST, Asked, answer
from omni_runtime.cache.schedules import Schedule
from omni_runtime.cli import options

SIGMAS = tuple(1 - i / 50 for i in range(50))


def schedule(budget: int, psnr: float | None = 40.0, steps: int = 50, **more: Any) -> Schedule:
    computed = schedules.even(steps, budget).computed
    return Schedule(steps, computed, "calibrated on a model", sigmas=SIGMAS[:steps], psnr=psnr, **more)


OWN = [schedule(25, 50.0, speedup=1.9), schedule(17, 44.0, speedup=2.6), schedule(10, 32.0, speedup=4.0)]


@pytest.mark.parametrize(("quality", "counts"), [(None, 17), ("high", 25), ("balanced", 17), ("fast", 13)])
def test_a_preset_computes_its_share_of_the_steps(quality: str | None, counts: int) -> None:
    found = answer(Asked(quality=quality), 50)
    assert found.schedule == schedules.early(50, counts)
    assert found.speedup == pytest.approx(50 / counts)
    assert found.speed_basis == "by counting steps; no times were measured"
    assert "embedded models" in found.basis
    low, high = found.psnr or (0, 0)
    assert 25 < low < high < 80


def test_more_computed_steps_promise_more() -> None:
    lows = [(answer(Asked(quality=name), 50).psnr or (0.0,))[0] for name in ("fast", "balanced", "high")]
    assert lows == sorted(lows)
    assert lows[0] < lows[2] - 3


def test_exact_computes_every_step() -> None:
    found = answer(Asked(quality="exact"), 50, OWN)
    assert found.schedule.computed == tuple(range(50))
    assert (found.speedup, found.psnr) == (1.0, None)
    assert str(found) == "all 50 steps computed; every cache changes the picture a little, so nothing is skipped"


@pytest.mark.parametrize("asked", [Asked(), Asked(quality="fast"), Asked(speedup=3.0), Asked(psnr=20.0)])
@pytest.mark.parametrize("steps", [1, 2, 8, SHORTEST - 1])
def test_a_short_request_is_computed_in_full_and_says_so(asked: Asked, steps: int) -> None:
    found = answer(asked, steps, OWN)
    assert found.schedule.computed == tuple(range(steps))
    assert "nothing to gain here" in str(found)


@pytest.mark.parametrize("name", ["high", "balanced", "fast"])
@pytest.mark.parametrize("steps", [SHORTEST, 13, 16, 20, 28, 40, 100])
def test_a_preset_never_computes_too_few_steps_or_nearly_all(name: str, steps: int) -> None:
    budget = len(answer(Asked(quality=name), steps).schedule.computed)
    assert FEWEST <= budget <= -(-steps // 2)
    assert budget == max(FEWEST, -(-steps // {"high": 2, "balanced": 3, "fast": 4}[name]))


def test_the_models_own_calibration_comes_first() -> None:
    found = answer(Asked(), 50, OWN, SIGMAS)
    assert found.schedule is OWN[1]
    assert found.psnr == (44.0, 44.0)
    assert (found.basis, found.speed_basis) == ("measured on this model", "as measured on this model")
    assert found.speedup == pytest.approx(2.6, abs=0.2)
    between = answer(Asked(quality="fast"), 50, OWN, SIGMAS)
    assert between.psnr == (pytest.approx(32 + 12 * 3 / 7),) * 2, "interpolated between 10 and 17 computed steps"
    other = answer(Asked(quality="high"), 20, OWN, SIGMAS[:20])
    assert other.schedule.computed[0] == 0
    assert len(other.schedule.computed) == 10
    assert other.psnr == (32.0, 32.0), "10 of 20 are not as good as 25 of 50"
    assert other.basis == "measured on this model at 50 steps"


def test_the_answer_says_how_sure_it_is() -> None:
    own = [schedule(count, mean, low=low, images=32) for count, mean, low in ((25, 50.0, 44.0), (17, 44.0, 30.0))]
    found = answer(Asked(), 50, own, SIGMAS)
    assert found.low == (30.0, 30.0)
    assert found.basis == "measured on this model, on 32 pictures that its schedules were not searched on"
    assert "and 44 dB, 1 picture of 20 below 30 (measured on this model, on 32" in str(found)
    general = answer(Asked(), 50)
    assert general.low is not None
    assert general.psnr is not None
    assert general.low[0] < general.psnr[0]
    assert general.lowest == "{:.0f} to {:.0f} dB".format(*general.low)
    assert answer(Asked(quality="exact"), 50).lowest == answer(Asked(), 50, OWN).lowest == ""


def test_numbers_ask_for_the_fewest_steps_that_reach_them() -> None:
    assert len(answer(Asked(psnr=44.0), 50, OWN, SIGMAS).schedule.computed) == 17
    assert len(answer(Asked(psnr=45.0), 50, OWN, SIGMAS).schedule.computed) == 19
    nothing = answer(Asked(psnr=60.0), 50, OWN, SIGMAS)
    assert nothing.schedule.computed == tuple(range(50))
    assert "nothing that was measured reaches 60 dB" in str(nothing)
    count = len(answer(Asked(psnr=40.0), 50).schedule.computed)
    known = [presets._between(points, count) for points in presets._general("mean").values()]
    assert min(known) >= 40.0, "without a calibration, on every embedded model"
    budget = len(answer(Asked(speedup=2.0), 50, OWN, SIGMAS).schedule.computed)
    assert budget < 25, "as measured, 25 of 50 steps are not twice as fast"
    assert len(answer(Asked(speedup=2.0), 50).schedule.computed) == 25
    with pytest.raises(ValueError, match="speedup 30 is more than skipping steps gives"):
        answer(Asked(speedup=30.0), 50, OWN)


def test_times_that_cannot_be_are_not_believed(tmp_path: Any) -> None:
    """Of a calibration that a busy machine has written: 25 of 50 steps five times as fast."""
    row = {"steps": 50, "sigmas": SIGMAS, "computed": list(schedules.even(50, 25).computed), "psnr": {"mean": 50.0}}
    found = {}
    for speedup in (5.17, 1.9, None):
        document = {
            "method": "velocity_cache", "version": 1, "calibrated_for": {}, "schedules": [{**row, "speedup": speedup}],
        }  # fmt: skip
        path = tmp_path / "velocity_cache.json"
        path.write_text(json.dumps(document))
        found[speedup] = schedules.calibrated(calibration.read(path, "velocity_cache"))[0].speedup
    assert found == {5.17: None, 1.9: 1.9, None: None}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quality": "hihg"}, "did you mean 'high'"),
        ({"quality": "fast", "psnr": 40}, "quality and psnr cannot be combined"),
        ({"speedup": 1.0}, "speedup must be None or a finite number > 1"),
        ({"psnr": -3}, "psnr must be None or a finite number > 0"),
        ({"budget": 3}, "auto has no key 'budget'"),
    ],
)
def test_wrong_wishes_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        METHODS["auto"].check(config)


def latents(pipe: Any, steps: int = 16) -> torch.Tensor:
    return tiny.generate(pipe, output_type="latent", num_inference_steps=steps)


def test_it_skips_as_the_velocity_cache_does(qwen_pipe: Any) -> None:
    with omni_kernels.patched(qwen_pipe, "velocity_cache", {"schedule": list(schedules.early(16, 6).computed)}):
        expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "auto") as handle:
        assert torch.equal(latents(qwen_pipe), expected)
    assert handle.report.backend == "auto"
    assert [branch.computed for branch in handle.report.branches.values()] == [[0, 3, 6, 9, 12, 15]] * 2
    (note,) = [note for note in handle.report.notes if note.startswith("balanced: 6 of 16 steps computed")]
    assert "expect 2.7 times the speed (by counting steps" in note


def test_exact_gives_the_same_bits(qwen_pipe: Any) -> None:
    expected = latents(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, "auto", {"quality": "exact"}) as handle:
        assert torch.equal(latents(qwen_pipe), expected)
        assert handle.report.skipped == []


def test_each_request_is_answered_for_its_own_steps(qwen_pipe: Any) -> None:
    with omni_kernels.patched(qwen_pipe, "auto", {"quality": "high"}) as handle:
        skipped = []
        for steps in (16, 8, 24):
            latents(qwen_pipe, steps)
            skipped.append(len(handle.report.skipped))
    assert skipped == [8, 0, 12]


def test_a_calibrations_forecast_is_used_unless_another_is_given(qwen_pipe: Any, monkeypatch: Any) -> None:
    seen: list[Chosen] = []
    original = OutputSteps.__init__

    def spy(self: Any, site: Any, request: Any, chosen: Chosen, scheduler: Any) -> None:
        seen.append(chosen)
        original(self, site, request, chosen, scheduler)

    monkeypatch.setattr(OutputSteps, "__init__", spy)
    computed = list(schedules.early(16, 6).computed)
    sigmas = [1 - i / 16 for i in range(16)]
    row = {"steps": 16, "sigmas": sigmas, "computed": computed, "psnr": {"mean": 40.0}, "reach": 0.7}
    found = {"method": "velocity_cache", "version": 1, "calibrated_for": {}}
    with_both = found | {"schedules": [row | {"corrector_order": 3}]}
    for backend, config, expected in (
        ("auto", {"calibration": with_both}, (0.7, 3)),
        ("velocity_cache", {"calibration": with_both, "budget": 6}, (0.7, 3)),
        ("velocity_cache", {"calibration": with_both, "budget": 6, "reach": 2.0, "corrector_order": 1}, (2.0, 1)),
        ("auto", {"calibration": found | {"schedules": [row]}}, (0.7, 2)),
        ("auto", {}, (schedules.usual_reach(6), 2)),
    ):
        with omni_kernels.patched(qwen_pipe, backend, config):
            latents(qwen_pipe)
        assert seen.pop()[1:] == expected, (backend, config)


def test_where_steps_cannot_be_skipped_blocks_are(qwen_pipe: Any) -> None:
    """With a scheduler that no cache of whole steps knows."""

    class OtherScheduler(diffusers.FlowMatchEulerDiscreteScheduler):
        pass

    qwen_pipe.scheduler = OtherScheduler.from_config(qwen_pipe.scheduler.config)
    with pytest.raises(ValueError, match="no cache of whole steps knows"):
        omni_kernels.patch(qwen_pipe, "velocity_cache")
    with omni_kernels.patched(qwen_pipe, "auto", {"quality": "fast"}) as handle:
        latents(qwen_pipe)
        assert handle.report.backend == "cache_dit"
        expected = "auto: cache_dit, because whole steps cannot be skipped with OtherScheduler"
        assert expected in handle.report.notes
    with pytest.raises(ValueError, match="psnr needs whole steps to be skipped: ask for a preset"):
        omni_kernels.patch(qwen_pipe, "auto", {"psnr": 40})
    assert omni_kernels.patch(qwen_pipe, "tea_cache").active
    omni_kernels.unpatch(qwen_pipe)


def test_where_steps_are_taken_twice_blocks_are_skipped() -> None:
    model = build("CosmosTextToWorldPipeline")
    with omni_kernels.patched(model.pipe, "auto", {"quality": "fast"}) as handle:
        model.generate(guided=True, num_inference_steps=20)
        report = handle.report
    assert report.backend == "cache_dit"
    why = "CosmosTextToWorldPipeline takes a step of its scheduler twice: whole steps cannot be skipped"
    assert f"auto: cache_dit, because {why}" in report.notes
    assert report.complete
    assert report.forwards_saved > 5


def test_omni_takes_a_preset_by_one_word() -> None:
    with Omni("emoji-qwen-image", quality="high", device="cpu") as omni:
        assert (omni.cache_backend, omni.cache_config["quality"]) == ("auto", "high")
        assert omni.cache_config["calibration"]["model"] == "emoji-qwen-image"
    with pytest.raises(ValueError, match="did you mean 'fast'"):
        Omni("emoji-qwen-image", quality="fats", device="cpu")
    with pytest.raises(ValueError, match="chooses the cache by itself"):
        Omni("emoji-qwen-image", quality="high", cache_backend="tea_cache", device="cpu")


# The command line


def test_the_command_line_knows_the_presets() -> None:
    assert tuple(PRESETS) == options.PRESETS
    assert presets.DEFAULT in PRESETS


def test_generate_asks_for_balanced_unless_told_otherwise(
    saved: dict[str, Any], tmp_path: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.delenv("DIFFUSION_CACHE_BACKEND", raising=False)
    command = ["generate", "--model", str(saved["qwen_image"]), "--prompt", "a cat", "--steps", "16", "--size", "64"]
    command += ["--out", str(tmp_path), "--json", "--quiet"]

    def used(*more: str) -> tuple[Any, Any]:
        assert cli.main([*command, *more]) == 0
        (result,) = json.loads(capsys.readouterr().out)["results"]
        return result["settings"]["cache_backend"], result["settings"]["cache_config"]

    backend, config = used()
    assert (backend, config["quality"], config["psnr"]) == ("auto", None, None)
    assert used("--quality", "high")[1]["quality"] == "high"
    assert used("--psnr", "35")[1]["psnr"] == 35.0
    assert used("--cache-backend", "none")[0] is None
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "first_block_cache")
    assert used()[0] == "first_block_cache"
    assert used("--speedup", "2")[0] == "auto"
    for wrong, named in (
        (["--quality", "high", "--cache-backend", "tea_cache"], "--quality chooses the cache by itself"),
        (["--psnr", "3", "--cache-backend", "auto", "--cache-config", "{}"], "--psnr and --cache-config cannot"),
        (["--speedup", "1"], "must be a factor above 1"),
        (["--quality", "best"], "invalid choice"),
        (["--quality", "high", "--psnr", "3"], "not allowed with"),
    ):
        assert cli.main([*command, *wrong]) == 2
        assert named in capsys.readouterr().err


def test_explain_says_what_each_preset_does_and_what_that_rests_on(saved: dict[str, Any], capsys: Any) -> None:
    assert cli.main(["explain", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert [one["asked"]["quality"] for one in about["answers"]] == list(PRESETS)
    assert about["steps"] == 50
    assert [len(one["computed"]) for one in about["answers"]] == [50, 25, 17, 13]
    assert about["answers"][1]["basis"].startswith("measured on this model, on 32 pictures")
    assert about["answers"][1]["psnr_p5"][0] < about["answers"][1]["psnr"][0]
    assert cli.main(["explain", "--model", str(saved["qwen_image"]), "--steps", "30", "--speedup", "2"]) == 0
    told = capsys.readouterr().out
    assert "speedup 2  15 of 30" in told
    assert "by counting steps" in told
    assert "embedded models" in told
    assert 'omni_kernels.patch(pipe, "auto", {"speedup": 2.0})' in told
    assert cli.main(["explain", "--steps", "8"]) == 0
    assert "nothing to gain here" in capsys.readouterr().out


def test_explain_says_where_steps_are_taken_twice(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Omni, "pipeline_class", diffusers.CosmosTextToWorldPipeline)
    assert cli.main(["explain", "--steps", "50", "--json"]) == 0
    refused = json.loads(capsys.readouterr().out)["refused"]
    assert refused.startswith("CosmosTextToWorldPipeline takes a step of its scheduler twice")
    assert "blocks are skipped instead, by cache_dit" in refused
