"""Replicas on a real Ray Serve: no accepted request is lost when they are killed."""

import json
import sys
from pathlib import Path
from typing import Any

import loopback
import pytest
import stand_in
from http_server import furthest, picture

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="network namespaces"),
    pytest.mark.skipif(bool(loopback.missing()), reason=loopback.missing() or "-"),
]
pytest.importorskip("ray")

SECONDS = 400


def outcome(name: str, folder: Path, model: str = "") -> Any:
    """What a scenario has led to; see `scenarios`."""
    process = loopback.start(["-m", "scenarios", name, model], folder, cwd=folder)
    try:
        assert process.wait(SECONDS) == 0, "".join(one.read_text() for one in folder.glob("*.txt"))
    finally:
        loopback.end(process)
    return json.loads((folder / "out.txt").read_text())


@pytest.mark.long
def test_a_replica_that_is_killed_loses_no_request(saved: dict[str, Path], tmp_path: Path) -> None:
    found = outcome("killed", tmp_path, str(saved["qwen_image"]))
    answers = [json.loads(text) for status, text in found["results"] if status == 200]
    assert len(answers) == 16, found["results"]
    assert found["stream"][0] == 200
    assert found["stream"][1].count("image_generation.completed") == 2, "one event of it: its name and its type"
    assert found["again"] >= 1, "some requests were with the replica that was killed"
    assert [answer["data"][0]["omni"]["seed"] for answer in answers] == list(range(16))
    assert furthest(*(picture(answer["data"][0]) for answer in (answers[0], json.loads(found["before"][1])))) <= 1
    assert found["file"] == 200, "whichever replica has made it"
    assert 'omni_again_total{replica="front"}' in found["metrics"]
    assert found["exit"] == 0


@pytest.mark.long
def test_streams_and_requests_without_a_seed_survive_every_replica(tmp_path: Path) -> None:
    found = outcome("streams", tmp_path)
    assert found["again"] >= 2
    for seed, (status, text) in enumerate(found["results"][:6]):
        assert status == 200
        events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
        assert [event.get("step") for event in events] == [*range(stand_in.STEPS), None], "each event once"
        assert events[-1]["picture"] == stand_in.picture(seed)
    for status, text in found["results"][6:]:
        assert status == 200
        answer = json.loads(text)
        assert answer["picture"] == stand_in.picture(answer["seed"])
    assert found["exit"] == 0


@pytest.mark.long
def test_a_request_that_kills_each_replica_fails_and_takes_no_other_along(tmp_path: Path) -> None:
    found = outcome("deadly", tmp_path)
    status, text = found["deadly"]
    assert status == 503
    assert json.loads(text)["error"]["code"] == "replica_lost"
    assert [status for status, _ in found["results"]] == [200] * 12
    assert found["after"][0] == 200
    assert found["exit"] == 0


@pytest.mark.long
def test_load_adds_a_replica_and_a_server_that_stops_finishes_what_it_has(tmp_path: Path) -> None:
    found = outcome("scaled", tmp_path)
    assert found["before"] == 1
    assert found["answers"] == [200]
    assert [status for status, _ in found["last"]] == [200] * 6
    assert found["exit"] == 0


@pytest.mark.long
def test_ray_asks_for_a_token(tmp_path: Path) -> None:
    found = outcome("token", tmp_path)
    assert found["right"] == 0
    assert found["without"] != 0
    assert found["wrong"] != 0
