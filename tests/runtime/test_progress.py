"""The progress bar, on a terminal and off it."""

import contextlib
import io

import pytest

from omni_runtime.cache.report import StepEvent
from omni_runtime.progress import Progress, StepBar, duration, seconds_left


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class File(io.StringIO):
    encoding = "ascii"


def follow(bar: StepBar, computed: str, steps: int) -> None:
    for step, character in enumerate(computed):
        bar(StepEvent(step, steps, character == "1", {}))


def test_a_terminal_sees_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with StepBar("a cat", stream, steps=4) as bar:
        follow(bar, "1101", steps=4)
    drawn = [line.rstrip("\n") for line in stream.getvalue().split("\r\x1b[2K")[1:]]
    assert [line[line.index("[") : line.index("]") + 1] for line in drawn] == [
        "[····]", "[█···]", "[██··]", "[██░·]", "[██░█]", "[██░█]",
    ]  # fmt: skip
    assert "4/4  3 computed, 1 reused" in drawn[-1]
    assert stream.getvalue().count("\n") == 1


def test_elsewhere_there_is_one_line_in_characters_that_the_stream_has() -> None:
    stream = File()
    with StepBar("a cat", stream) as bar:
        follow(bar, "1001", steps=4)
    (line,) = stream.getvalue().splitlines()
    assert "[#--#]" in line


def test_an_interrupted_request_shows_how_far_it_came() -> None:
    stream = File()
    with contextlib.suppress(KeyboardInterrupt), StepBar("a cat", stream, 4) as bar:
        follow(bar, "10", steps=4)
        raise KeyboardInterrupt
    assert "[#-..]    2/4" in stream.getvalue()


def test_many_steps_share_cells_and_the_line_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with StepBar("a very long prompt about a cat on a windowsill", stream) as bar:
        follow(bar, "1" + "0" * 199, steps=200)
    last = stream.getvalue().split("\r\x1b[2K")[-1].rstrip("\n")
    assert len(last) <= 100
    assert last[last.index("[") : last.index("]")].count("█") == 1
    assert "..." in last


def test_the_time_left_is_that_of_runs_of_the_same_kind() -> None:
    assert seconds_left(["slow"], {}) is None
    taken = {"slow": [3.0, 5.0], "fast": [1.0]}
    assert seconds_left(["slow", "fast", "fast"], taken) == 6.0
    assert seconds_left(["new"], taken) == 2.5, "the mean of the kinds that are known"
    assert seconds_left([], taken) == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "under a minute"), (29, "under a minute"), (31, "1 min"), (3570, "1 h 00 min"), (11100, "3 h 05 min")],
)
def test_durations_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_line_of_one_of_many_requests_says_which_and_how_long() -> None:
    stream = File()
    with StepBar("a cat", stream, 2, str(Progress(3, 96, 125.0))) as bar:
        follow(bar, "11", steps=2)
    assert "0 reused  3 of 96, 2 min left" in stream.getvalue()
    assert str(Progress(1, 96, None)) == "1 of 96"
