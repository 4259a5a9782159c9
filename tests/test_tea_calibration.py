"""The benchmark of TeaCache's coefficients: runs are matched in the steps that they compute."""

from pathlib import Path

import pytest

from benchmarks import tea_calibration as bench
from omni_runtime.calibrate.fitting import Point


def points(distances: dict[str, list[float]], requests: int = 1) -> list[Point]:
    return [
        Point(branch, step, 0, distance, 0.0)
        for _ in range(requests)
        for step, both in enumerate(zip(*distances.values(), strict=True), 1)
        for branch, distance in zip(distances, both, strict=True)
    ]


def test_a_series_is_one_branch_of_one_request() -> None:
    found = bench.series(points({"cond": [0.1, 0.2, 0.3], "uncond": [0.4, 0.5, 0.6]}, requests=2))
    assert sorted(found) == [[0.1, 0.2, 0.3]] * 2 + [[0.4, 0.5, 0.6]] * 2


def test_a_prompt_that_was_calibrated_with_is_not_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [("a cat", None), ("a dog", None), ("a bird", None)]
    monkeypatch.setattr(bench, "prompts_of", lambda model, count: listed[:: 1 if count is None else 2])
    assert bench.unknown_prompts("tiny", ["a cat", "a dog"]) == [("a bird", None)]


def test_an_instruction_is_measured_on_pictures_that_were_not_calibrated_with(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [("mirror it", Path("0.png")), ("mirror it", Path("1.png")), ("make it gray", Path("2.png"))]
    monkeypatch.setattr(bench, "prompts_of", lambda model, count: listed[:: 1 if count is None else 2])
    assert bench.unknown_prompts("tiny", ["mirror it", "make it gray"]) == [("mirror it", Path("1.png"))]


@pytest.mark.parametrize("wanted", [10, 7, 4])
def test_thresholds_compute_as_many_steps_as_wanted(wanted: int) -> None:
    distances = [[0.01 + 0.001 * (step * 7.3 % 5) for step in range(first, first + 19)] for first in range(8)]
    for coefficients, ends in ((bench.IDENTITY, bench.UNLIMITED), ((0, 0, 5.0, 0, 0.1), (0.0, 0.02))):
        threshold = bench.threshold_for(wanted, distances, coefficients, ends)
        assert wanted - 1 <= bench.computed_steps(distances, threshold, coefficients, ends) <= wanted


def test_runs_are_every_polynomial_and_plain_sampling_at_every_share() -> None:
    calibrated = {"coefficients": [0, 0, 0, 2.0, 0], "range": [0.01, 0.03]}
    recorded = points({"cond": [0.01 * (1 + step % 3) for step in range(19)]})
    runs = bench.make_runs((0, 0, 1.0, 0, 0), calibrated, recorded, 20)
    names = ["fewer steps", "identity", "calibrated", "borrowed"]
    assert [run["name"] for run in runs] == names * 3
    assert [run["steps"] for run in runs[::4]] == [10, 7, 5]
    by_name = {run["name"]: run for run in runs[:4]}
    assert by_name["calibrated"]["threshold"] == pytest.approx(2 * by_name["identity"]["threshold"], rel=1e-6)
    assert [run["name"] for run in bench.make_runs(None, calibrated, recorded, 20)[:4]][-1] == "fewer steps"


def test_the_table_pairs_each_image_with_the_identitys() -> None:
    runs = [
        {"share": 0.5, "name": name, "computed": [25, 27], "psnr": psnr}
        for name, psnr in (("identity", [20.0, 30.0]), ("calibrated", [21.0, 33.0]))
    ]
    lines = bench.table(runs).splitlines()
    assert lines[2] == "| 26.0 | identity | 25.0 ± 7.1 | 20.5 |  |"
    assert lines[3] == "| 26.0 | calibrated | 27.0 ± 8.5 | 21.6 | +2.00 ± 1.00 |"
