"""What `/metrics` tells Prometheus. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from omni_runtime.generation.result import OmniResult
from omni_runtime.serving.jobs import Job

if TYPE_CHECKING:
    from omni_runtime.serving.http.service import Service

#: Upper ends of the histogram of seconds.
SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
#: Upper ends of the histogram of batch sizes.
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts the requests and the work of one server.

    Args:
        service: the server's model.
    """

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "omni_request_seconds", "Seconds from a request to its answer", ["route", "outcome"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._forwards = self._counter("omni_request_forwards", "Transformer forwards of finished requests")
        self._blocks = self._counter("omni_request_blocks", "Transformer blocks of finished requests, under caches")
        self._steps = self._counter("omni_request_steps", "Denoising steps of finished requests")
        ProcessCollector(registry=self.registry)
        self.registry.register(_OfEngine(service))

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, ["method", "kind"], registry=self.registry)

    def answered(self, route: str, outcome: str, seconds: float) -> None:
        """Count an answer."""
        self._seconds.labels(route, outcome).observe(seconds)

    def count(self, job: Job, result: OmniResult) -> None:
        """Count what was computed and skipped for a request."""
        method, report = job.backend or "none", result.cache
        steps = len(result.timings.steps)
        skipped = 0 if report is None else len(report.skipped)
        for counter, computed, saved in (
            (self._steps, steps - skipped, skipped),
            (self._forwards, *((job.forwards, 0) if report is None else (report.forwards, report.forwards_saved))),
            (self._blocks, *((0, 0) if report is None else (report.blocks_run, report.blocks_total - report.blocks_run))),
        ):
            counter.labels(method, "computed").inc(max(0, computed))
            counter.labels(method, "skipped").inc(max(0, saved))

    def text(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """What the engine itself counts, read when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        service, engine = self._service, self._service.engine
        yield GaugeMetricFamily("omni_ready", "1 if requests are taken", float(service.state.value == "ready"))
        yield GaugeMetricFamily("omni_kept_bytes", "Bytes of kept pictures and videos", service.files.bytes)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None:
            held = torch.accelerator.memory_allocated()
            yield GaugeMetricFamily("omni_device_bytes", "Bytes of tensors on the device", held)
        if engine is None:
            return
        yield GaugeMetricFamily("omni_queued", "Pictures that wait", engine.queued)
        yield GaugeMetricFamily("omni_in_flight", "Pictures that are being computed", engine.running)
        yield GaugeMetricFamily("omni_cache_bytes", "Bytes that the caches of requests hold", _held(engine))
        forwards = engine.forwards
        checks = CounterMetricFamily("omni_check_forwards", "Forwards made to check whether calls can be batched")
        checks.add_metric([], forwards.checks)
        yield checks
        sizes = dict(forwards.sizes)
        buckets = [(f"{top}.0", sum(made for size, made in sizes.items() if size <= top)) for top in SIZES]
        batch = HistogramMetricFamily("omni_batch_size", "Samples in each forward that was made")
        batch.add_metric(
            [],
            [*buckets, ("+Inf", sum(sizes.values()))],
            sum(size * made for size, made in sizes.items()),
        )
        yield batch


def _held(engine: object) -> int:
    """The bytes that caches hold. They change while they are counted, so a count can fail: then it is made again."""
    for _ in range(3):
        try:
            return engine.held_bytes()  # type: ignore[attr-defined, no-any-return]
        except RuntimeError:
            continue
    return 0
