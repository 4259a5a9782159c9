"""Times calls: with device events on a device, with the host's clock on the CPU. The result is the median.

On a GPU, the calls are captured in a graph, and the graph is replayed. So the times exclude the host's launch overhead,
which can exceed the kernel's time at these sizes. Each call has its own inputs and outputs; together these exceed the
device's cache, so inputs are read from memory.

On other devices, the events are recorded around the launches themselves. If launching takes longer than the kernels,
that is what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from omni_kernels.device import Timer

Call = Callable[[], object]

# Larger than the last-level cache of all GPUs considered here (H200: 50 MB; MI300X: 256 MB).
COLD_BYTES = 512 << 20
MOST_SETS = 32
# On the host, measuring ends after this many seconds, but not before three rounds. Slow calls need fewer rounds.
HOST_SECONDS = 2.0


def sets_for(device: torch.device, nbytes: int) -> int:
    """The number of input sets to cycle through, for calls that move `nbytes`."""
    if device.type == "cpu":
        return 1
    return max(2, min(MOST_SETS, -(-COLD_BYTES // nbytes)))


def median_seconds(calls: Sequence[Call], device: torch.device, rounds: int = 20) -> float:
    """Seconds per call of `calls`, which do the same on different data: the median over `rounds` of their mean."""
    if device.type == "cpu":
        times = _on_host(calls, rounds)
    elif device.type == "cuda":
        times = _in_graph(calls, device, rounds)
    else:
        times = _on_stream(calls, device, rounds)
    return statistics.median(times) / len(calls)


def _on_host(calls: Sequence[Call], rounds: int) -> list[float]:
    for call in calls:
        call()
    times: list[float] = []
    while len(times) < rounds and (len(times) < 3 or sum(times) < HOST_SECONDS):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - start)
    return times


def _in_graph(calls: Sequence[Call], device: torch.device, rounds: int) -> list[float]:
    graph, outputs = _captured(calls)
    times = _between_events(graph.replay, device, rounds)
    del outputs
    return times


def _on_stream(calls: Sequence[Call], device: torch.device, rounds: int) -> list[float]:
    def run() -> None:
        for call in calls:
            call()

    return _between_events(run, device, rounds)


def _between_events(run: Call, device: torch.device, rounds: int) -> list[float]:
    """The seconds of each round of `run`."""
    for _ in range(3):
        run()
    timer = Timer(device)
    spans = []
    for _ in range(rounds):
        start = timer.mark()
        run()
        spans.append((start, timer.mark()))
    timer.wait(spans[-1][1])
    return [timer.seconds(start, end) for start, end in spans]


def _captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """The calls as a CUDA graph, and their outputs, which are kept so that no two share memory."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compile and allocate before the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return graph, outputs
