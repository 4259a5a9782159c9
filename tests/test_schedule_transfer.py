"""The benchmark of what a schedule that was calibrated on few images loses on others."""

from __future__ import annotations

import json

import pytest

from benchmarks import schedule_transfer as bench
from omni_runtime.compare.comparison import prompts_of
from omni_runtime.generation.loading import embedded_models

MODEL = "emoji-qwen-image"
QUICK = [
    "--model",
    MODEL,
    "--steps",
    "5",
    "--budgets",
    "4,3",
    "--tries",
    "3",
    "--many-tries",
    "4",
    "--prompts",
    "2",
    "--batch",
    "8",
]


@pytest.mark.parametrize("model", sorted(embedded_models()))
def test_no_prompt_is_in_both_searches(model: str) -> None:
    few, many = bench.prompts(model, 4, 32)
    assert (len(few), len(many)) == (4, 32)
    assert len(set(few + many)) == 36
    assert many == prompts_of(model, 32)


def test_too_few_prompts_are_named() -> None:
    with pytest.raises(ValueError, match=r"has 64 prompts, but 4 and 65 others are needed"):
        bench.prompts(MODEL, 4, 65)


def test_both_schedules_are_measured_on_the_many_images(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "SCHEDULE_PROMPTS", 1)
    monkeypatch.setattr(bench, "MANY_SEEDS", bench.MANY_SEEDS[:2])
    arguments = [*QUICK, "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    made = json.loads((tmp_path / f"schedule-transfer-{MODEL}.json").read_text())
    assert [row["budget"] for row in made["rows"]] == [4, 3]
    for row in made["rows"]:
        assert [row["psnr"][name]["images"] for name in ("few", "many", "even", "plain")] == [4] * 4
        assert row["searches"]["few"]["searched"]["images"] == 2
        assert row["searches"]["many"]["searched"] == row["psnr"]["many"], "measured where it was searched"
        assert row["loss"] == pytest.approx(row["psnr"]["many"]["mean"] - row["psnr"]["few"]["mean"], abs=0.02)
        assert 1 < row["searches"]["many"]["tries"] <= 4
    assert f"| 4 | {made['rows'][0]['psnr']['few']['mean']:.1f} ±" in capsys.readouterr().out

    kept = {path: path.read_text() for path in (tmp_path / "work").iterdir()}
    assert len(kept) == 2
    assert bench.main(arguments) == 0
    assert {path: path.read_text() for path in kept} == kept, "what was sampled is not sampled again"
    again = json.loads((tmp_path / f"schedule-transfer-{MODEL}.json").read_text())
    assert [row["psnr"] for row in again["rows"]] == [row["psnr"] for row in made["rows"]]


def test_check_fails_where_too_much_is_lost(tmp_path, monkeypatch, capsys) -> None:
    row = {"budget": 3, "loss": 1.0, "loss_error": 0.1, "psnr": {}}
    row["psnr"] = {name: {"mean": 40.0, "std": 1.0, "p5": 38.0} for name in ("few", "many", "even", "plain")}
    monkeypatch.setattr(bench, "compare", lambda *given: row)
    monkeypatch.setattr(bench, "Calibration", lambda *given: None)
    arguments = [*QUICK, "--work", str(tmp_path), "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    assert bench.main([*arguments, "--check"]) == 1
    assert "1 dB or more are lost at 3, 3 computed steps" in capsys.readouterr().err
    row["loss"] = 0.99
    assert bench.main([*arguments, "--check"]) == 0
