"""The comparison with vLLM-Omni: its settings, its verdicts, and what its results say. None needs vLLM-Omni."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.against_vllm_omni import comparison, environment
from benchmarks.against_vllm_omni.cases import MODELS, Setting, settings
from benchmarks.against_vllm_omni.ours import Ours
from benchmarks.results import RESULTS
from omni_runtime.cache.methods import METHODS

LATENTS = torch.linspace(-1.0, 1.0, 10)
PLAIN = Setting("defaults", "cache_dit")
SECOND = {"enable_taylorseer": True, "taylorseer_order": 2}


@pytest.fixture(scope="module")
def results():
    return json.loads((RESULTS / "against-vllm-omni.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_their_keys_are_ours(steps):
    for setting in settings(steps, 2):
        config = METHODS[setting.backend].check(setting.theirs if setting.ours is None else setting.ours, steps=steps)
        assert setting.ours is None or setting.theirs.keys() == setting.ours.keys()
        assert len(config) >= len(setting.theirs)


def made(computed, latents=LATENTS):
    return {"latents": latents, "computed": computed}


def pair(theirs, ours, setting=PLAIN, model="tiny Qwen-Image", guided=True, version="1.5.0", newest=None):
    found = comparison.compared(model, guided, 20, setting, version, theirs, ours)
    return dataclasses.replace(found, newest=newest)


def test_equal_are_the_same_steps_and_latents_up_to_rounding():
    assert comparison.verdict(pair(made([[0, 3]]), made([[0, 3]], LATENTS * (1 + 9e-6)))) == ("equal", "")
    for theirs in (made([[0, 3]], LATENTS * (1 + 2e-5)), made([[0, 4]]), made([[0, 3], [0, 3]]), {"error": "E: e"}):
        assert comparison.verdict(pair(theirs, made([[0, 3]])))[0] == "unexplained"


@pytest.mark.parametrize(
    ("other", "verdict", "words"),
    [
        ({"guided": False}, "theirs wrong", "every second call is the other guidance branch"),
        ({"newest": True}, "theirs wrong", "a computed step does not end a run"),
        ({"model": "tiny FLUX"}, "theirs wrong", "both share one state"),
        ({"model": "tiny FLUX", "guided": False}, "a choice", "two lists of blocks"),
        ({"setting": Setting("", "cache_dit", SECOND)}, "a choice", "order + 3 computed steps"),
        ({"setting": Setting("", "cache_dit", SECOND | {"max_warmup_steps": 5})}, "unexplained", ""),
        ({"setting": Setting("", "cache_dit", {"enable_taylorseer": True, "max_warmup_steps": 8})}, "unexplained", ""),
        ({"setting": Setting("", "mag_cache")}, "theirs wrong", "counts transformer calls, not steps"),
        ({"setting": Setting("", "mag_cache"), "guided": False}, "unexplained", ""),
        ({"setting": Setting("", "tea_cache"), "model": "emoji-z-image"}, "a choice", "Qwen-Image's polynomial"),
        ({"setting": Setting("", "tea_cache")}, "unexplained", ""),
    ],
)
def test_differences_get_their_reason(other, verdict, words):
    found, reason = comparison.verdict(pair(made([[0, 3]]), made([[0, 4]]), **other))
    assert found == verdict
    assert words in reason


def test_a_fault_of_the_pinned_cache_dit_is_one_that_the_newest_has_not():
    newest = environment.newest_cache_dit()
    assert newest != environment.requirements()["cache_dit"] == "1.5.0"
    for theirs, verdict in ((made([[0, 4]]), "theirs wrong"), (made([[0, 5]]), "unexplained")):
        pairs = comparison.judged([pair(made([[0, 3]]), made([[0, 4]])), pair(theirs, made([[0, 4]]), version=newest)])
        assert comparison.verdict(pairs[0])[0] == verdict


def test_the_results_leave_nothing_unexplained_and_name_the_reasons_of_today(results):
    found = {row["verdict"] for row in results["requests"]}
    assert found == {"equal", "theirs wrong", "a choice", "not there", "rounding"}
    assert {row["model"] for row in results["requests"]} == set(MODELS)
    assert [row[1:3] for row in results["reasons"]["rows"]] == [[one.verdict, one.text] for one in comparison.REASONS]
    assert all(int(row[3]) > 0 for row in results["reasons"]["rows"])
    assert all(row["verdict"] == "equal" for row in results["requests"] if row["backend"] is None)


def test_the_results_are_as_their_requests_are_judged_today(results):
    pairs = comparison.read(results["requests"])
    assert [comparison.row(one) for one in pairs] == results["requests"]
    assert comparison.summary(pairs)["rows"] == results["rows"]
    assert comparison.reasons(pairs) == results["reasons"]


def test_our_side_of_the_results_can_be_made_again(results, tmp_path):
    ours = Ours("tiny Qwen-Image", tmp_path)
    again = [one for one in settings(20, 2) if one.name in ("0.15, poly(r) = r", "F2B1", "SCM fast, dynamic")]
    for setting in again:
        side = ours.run(setting, 20, True)
        found = comparison.row(pair(side, side, setting))
        rows = [
            row
            for row in results["requests"]
            if (row["model"], row["guided"], row["steps"]) == ("tiny Qwen-Image", True, 20)
            and (row["backend"], row["setting"]) == (setting.backend, setting.name)
        ]
        assert rows
        assert all(row["computed"] == found["computed"] for row in rows)
    assert len(again) == 3


@pytest.mark.long
def test_their_side_runs(tmp_path):
    directory = Path("out/vllm-omni")
    if not (directory / "bin" / "python").exists():
        pytest.skip(f"there is no {directory}: python -m benchmarks.against_vllm_omni makes it")
    command = [sys.executable, "-m", "benchmarks.against_vllm_omni", "--environment", str(directory)]
    subprocess.run([*command, "--model", "tiny Qwen-Image", "--out", str(tmp_path / "results.json")], check=True)
