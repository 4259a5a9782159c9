"""The progress bar, on a terminal and off it."""

import contextlib
import io

import pytest
from tqdm.utils import disp_len

from omni_runtime.cache.report import StepEvent
from omni_runtime.progress import Line, Progress, StepBar, duration, seconds_left


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class File(io.StringIO):
    encoding = "ascii"


def follow(bar: StepBar, computed: str, steps: int) -> None:
    for step, character in enumerate(computed):
        bar(StepEvent(step, steps, character == "1", {}))


def drawn(stream: io.StringIO) -> list[str]:
    """What the line was, one after the other."""
    return [line.rstrip("\n") for line in stream.getvalue().split("\r") if line.strip()]


def test_a_terminal_sees_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with StepBar("a cat", stream, steps=4) as bar:
        follow(bar, "1101", steps=4)
    assert [line[line.index("[") : line.index("]") + 1] for line in drawn(stream)] == [
        "[····]", "[█···]", "[██··]", "[██░·]", "[██░█]", "[██░█]",
    ]  # fmt: skip
    assert "4/4  3 computed, 1 skipped" in drawn(stream)[-1]
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("columns", [24, 50, 51, 67, 80, 200])
@pytest.mark.parametrize(
    "label",
    ["a cat", "a very long prompt about a cat on a windowsill", "一只非常可爱的猫坐在窗台上看着外面的风景和小鸟"],
)
def test_no_line_is_wider_than_the_terminal(columns: int, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with StepBar(label, stream, 50, str(Progress(3, 96, 125.0))) as bar:
        follow(bar, "1" * 20 + "0" * 30, steps=50)
    assert len(drawn(stream)) == 52
    assert max(map(disp_len, drawn(stream))) < columns
    assert all("[" in line and "/50" in line for line in drawn(stream))


def test_a_narrow_terminal_still_says_how_many_steps_were_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    stream = Terminal()
    with StepBar("a cat", stream, 50) as bar:
        follow(bar, "1" * 20 + "0" * 30, steps=50)
    assert "50/50  20 computed, 30 skipped" in drawn(stream)[-1]


def test_a_dumb_terminal_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with StepBar("a cat", stream, 4) as bar:
        follow(bar, "1101", steps=4)
    line = Line(stream)
    line.tell("3 of 30 schedules")
    line.close()
    assert stream.getvalue().count("\n") == 1
    assert not {"\r", "\x1b"} & set(stream.getvalue())


def test_a_line_is_cut_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    line = Line(stream)
    line.tell("3 of 30 schedules, best 30.2 dB")
    line.close()
    assert drawn(stream) == ["3 of 30 schedules, "]
    assert stream.getvalue().endswith(f"\r{' ' * 19}\r")
    quiet = Terminal()
    Line(quiet, quiet=True).tell("3 of 30 schedules")
    assert quiet.getvalue() == ""


def test_elsewhere_there_is_one_line_in_characters_that_the_stream_has() -> None:
    stream = File()
    with StepBar("a ñandú", stream) as bar:
        follow(bar, "1001", steps=4)
    (line,) = stream.getvalue().splitlines()
    assert line.isascii()
    assert "[#--#]" in line


def test_an_interrupted_request_shows_how_far_it_came() -> None:
    stream = File()
    with contextlib.suppress(KeyboardInterrupt), StepBar("a cat", stream, 4) as bar:
        follow(bar, "10", steps=4)
        raise KeyboardInterrupt
    assert "[#-..]   2/4" in stream.getvalue()


def test_many_steps_share_cells_and_the_line_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with StepBar("a very long prompt about a cat on a windowsill", stream) as bar:
        follow(bar, "1" + "0" * 199, steps=200)
    last = drawn(stream)[-1]
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
    assert "0 skipped  3 of 96, 2 min left" in stream.getvalue()
    assert str(Progress(1, 96, None)) == "1 of 96"
