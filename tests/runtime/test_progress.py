"""The progress bar, on a terminal and off it."""

import contextlib
import io

import pytest

from omni_runtime.cache.report import StepEvent
from omni_runtime.progress import StepBar


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
