"""benchmarks/few_steps.py and benchmarks/hard_pictures.py: their parts on known numbers, and what is recorded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import few_steps, hard_pictures
from benchmarks.results import RESULTS
from omni_runtime.cache.presets import PRESETS, Asked, answer
from omni_runtime.generation.loading import embedded_models


def test_no_preset_is_recorded_to_cost_more_than_fewer_steps() -> None:
    """And the recorded presets are those of today."""
    found = json.loads((RESULTS / "few-steps.json").read_text(encoding="utf-8"))
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    told = {}
    for row in rows:
        for name in row["presets"].split(", "):
            told[row["model"], int(row["steps"]), name] = int(row["computed"])
        if int(row["computed"]) < int(row["steps"]):
            assert float(row["with the preset, dB"]) >= float(row["plain sampling with as many, dB"]) + 1, row
    expected = {
        (model, steps, name): len(answer(Asked(quality=name), steps).schedule.computed)
        for model in embedded_models()
        for steps in few_steps.STEPS
        for name in PRESETS
    }
    assert told == expected


def test_variance_is_parted_between_prompt_and_seed() -> None:
    prompts, seeds = np.array([[0.0], [2.0]]), np.array([[0.0, 4.0]])
    found = hard_pictures.shares(prompts + seeds)
    assert found == {"prompt": 0.2, "seed": 0.8, "both": 0.0}
    assert hard_pictures.shares(np.array([[1.0, 0.0], [0.0, 1.0]]))["both"] == 1.0


def test_the_hardest_images_get_the_other_schedule() -> None:
    hardness, easy, hard = np.array([1.0, 4.0, 2.0, 3.0]), np.full(4, 10.0), np.arange(4.0)
    assert hard_pictures.picked(hardness, easy, hard, 0.5).tolist() == [10.0, 1.0, 10.0, 3.0]
    assert hard_pictures.picked(hardness, easy, hard, 0.0).tolist() == [10.0] * 4
    assert hard_pictures.rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)


def test_a_study_measures_every_part(monkeypatch: Any, tmp_path: Any, capsys: Any) -> None:
    monkeypatch.setattr(hard_pictures, "STEPS", 16)
    monkeypatch.setattr(hard_pictures, "SEEDS", (0, 1))
    monkeypatch.setattr(hard_pictures, "BUDGET", 6)
    monkeypatch.setattr(hard_pictures, "CHOICES", ((("even", 6), ("even", 8), 7), (("even", 6), ("early", 6), 6)))
    threads = torch.get_num_threads()
    try:
        arguments = ["--model", "emoji-qwen-image", "--prompts", "2", "--out", str(tmp_path)]
        assert hard_pictures.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "hard-pictures-emoji-qwen-image.json").read_text(encoding="utf-8"))
    assert [row["steps"] for row in found["stretches"]] == [[0, 7], [7, 14], [14, 15]]
    assert found["stretches"][2]["hard"] == found["stretches"][2]["easy"] == 100.0, "nothing is skipped there"
    assert sum(found["variance"].values()) == pytest.approx(1.0, abs=0.01)
    for row in found["rules"]:
        low, high = (found["psnr"][f"{kind} {count}"]["mean"] for kind, count in (row["easy"], row["hard"]))
        for rule in ("turn", "bend", "oracle"):
            assert row[rule]["mean"] >= min(low, high) - 15
        assert row["oracle"]["mean"] >= max(row["turn"]["mean"], row["bend"]["mean"])
    assert (tmp_path / "hard-pictures-emoji-qwen-image.svg").read_text(encoding="utf-8").startswith("<svg")


def test_the_recorded_plots_are_those_of_the_figures() -> None:
    recorded = sorted(RESULTS.glob("hard-pictures-*.json"))
    assert recorded
    for path in recorded:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert hard_pictures.plot(found) == path.with_suffix(".svg").read_text(encoding="utf-8"), path.name


def test_the_site_has_the_study(monkeypatch: Any) -> None:
    pytest.importorskip("mkdocs")
    import runpy

    hooks = runpy.run_path(str(RESULTS.parents[1] / "docs" / "_hooks.py"))
    recorded = sorted(RESULTS.glob("hard-pictures-*.json"))
    assert recorded
    document = json.loads(recorded[0].read_text(encoding="utf-8"))
    text = hooks["hard_pictures"]("rules")
    assert f"`{document['command']}`" in text
    row = document["rules"][0]
    assert f"{row['oracle']['mean']:.1f}, {row['oracle']['p5']:.1f}" in text
    assert "even 10 / even 17" in text
    schedules = hooks["schedules"]()
    assert schedules.count("emoji-qwen-image |") == 6
