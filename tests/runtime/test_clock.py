"""The loop's clock: on the host, and with the events of an accelerator that is played here."""

import types
from typing import Any

import pytest
import torch

from omni_runtime.generation.clock import LoopClock


class Pipe:
    """A pipeline that is nothing but its loop: the time before, the steps, and the time after are as given."""

    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        from tqdm import tqdm

        return tqdm(iterable, total=total, disable=True)

    def with_updates(self) -> None:
        self.advance(2.0)
        with self.progress_bar(total=3) as bar:
            for seconds in (1.0, 3.0, 0.5):
                self.advance(seconds)
                bar.update()
        self.advance(4.0)

    def over_an_iterable(self) -> None:
        self.advance(2.0)
        for seconds in self.progress_bar([1.0, 3.0, 0.5]):
            self.advance(seconds)
        self.advance(4.0)

    def without_progress(self) -> None:
        self.advance(10.5)


class Host:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("omni_kernels.device.time.perf_counter", lambda: self.now)

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Accelerator(Host):
    """Its events note the device's time, on the stream of the pipeline's device, and are read after synchronising."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waited = 100.0, False
        played = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: str) -> None:
                assert stream == "stream of cuda:1"
                self.time = played.now

            def synchronize(self) -> None:
                played.waited = True

            def elapsed_time(self, end: Any) -> float:
                assert played.waited
                return (end.time - self.time) * 1000

        module = types.SimpleNamespace(Event=Event, current_stream=lambda device: f"stream of {device}")
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)


@pytest.mark.parametrize(("machine", "device"), [(Host, "cpu"), (Accelerator, "cuda:1")])
@pytest.mark.parametrize("loop", ["with_updates", "over_an_iterable"])
def test_before_steps_and_after(machine: type, device: str, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe(machine(monkeypatch).advance)
    told: list[tuple[int, int]] = []
    clock = LoopClock(torch.device(device), lambda step, steps: told.append((step, steps)))
    with clock.following(pipe):
        getattr(pipe, loop)()
    timings = clock.timings()
    assert (timings.before, timings.steps, timings.after) == (2.0, [1.0, 3.0, 0.5], 4.0)
    assert timings.total == 10.5
    assert told == [(0, 3), (1, 3), (2, 3)]
    assert "progress_bar" not in vars(pipe)


def test_a_pipeline_without_progress_has_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe(Host(monkeypatch).advance)
    clock = LoopClock(torch.device("cpu"))
    with clock.following(pipe):
        pipe.without_progress()
    timings = clock.timings()
    assert (timings.total, timings.steps) == (10.5, [])


def test_a_bar_that_the_caller_had_put_on_the_instance_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe(Host(monkeypatch).advance)
    own = pipe.progress_bar
    pipe.progress_bar = own
    with LoopClock(torch.device("cpu")).following(pipe):
        assert pipe.progress_bar is not own
    assert pipe.progress_bar is own
