"""The soak of the server, short: what it checks, and that it sees what is wrong."""

import random

import numpy as np
import pytest

from benchmarks import soak


def test_a_short_soak_is_clean():
    report = soak.soak(24, minutes=5, seed=3)
    assert report["wrong"] == []
    assert report["requests"] == 24
    assert sum(report["faults"].values()) > 0
    assert report["levels_off"] <= 1


def test_it_sees_a_wrong_picture_and_a_wrong_status():
    outcome = soak.Outcome()
    body = soak.body_of(random.Random(1))
    client = soak.Client({"pictures": ("127.0.0.1", 1)}, {soak.json.dumps(body): np.zeros((2, 2, 3))}, outcome)
    client._compare(body, np.full((2, 2, 3), 2))
    assert outcome.furthest == 2
    client.post = lambda made: (200, b"{}")
    client._bad(random.Random(1))
    client.one(0, 0)
    assert len(outcome.wrong) >= 2
    assert any("off by 2 of 255" in words for words in outcome.wrong)
    assert any("status 200" in words for words in outcome.wrong)


@pytest.mark.parametrize("argument", [["--requests", "x"], ["--minutes"]])
def test_wrong_arguments_are_named(argument, capsys):
    with pytest.raises(SystemExit):
        soak.main(argument)
    assert argument[0] in capsys.readouterr().err
