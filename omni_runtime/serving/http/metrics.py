"""The metrics of `/metrics`, for Prometheus. Each server has a registry of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from omni_runtime.generation.result import OmniResult
from omni_runtime.serving.engine import Engine
from omni_runtime.serving.http.store import Store
from omni_runtime.serving.jobs import Job

#: Upper ends of the histogram of seconds.
SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
#: Upper ends of the histogram of batch sizes.
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Served(Protocol):
    """What is measured: the service."""

    engine: Engine | None
    files: Store

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""

    @property
    def reason(self) -> str | None:
        """Why it can do nothing more: the class of an error."""


class Metrics:
    """Counts the requests and the work of one server.

    Args:
        service: the server's model.
    """

    def __init__(self, service: Served) -> None:
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
        method, report, steps = job.backend or "none", result.cache, len(result.timings.steps)
        if report is None:
            self._add(method, steps=(steps, 0), forwards=(job.forwards, 0), blocks=(0, 0))
            return
        self._add(
            method,
            steps=(steps - len(report.skipped), len(report.skipped)),
            forwards=(report.forwards, report.forwards_saved),
            blocks=(report.blocks_run, report.blocks_total - report.blocks_run),
        )

    def _add(self, method: str, **work: tuple[int, int]) -> None:
        counters = {"steps": self._steps, "forwards": self._forwards, "blocks": self._blocks}
        for name, numbers in work.items():
            for kind, number in zip(("computed", "skipped"), numbers, strict=True):
                counters[name].labels(method, kind).inc(max(0, number))

    def text(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """What the engine itself counts, read when it is asked for."""

    def __init__(self, service: Served) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        service, engine = self._service, self._service.engine
        yield GaugeMetricFamily("omni_ready", "1 if requests are taken", float(service.ready))
        failed = GaugeMetricFamily("omni_failed", "1 if the server can do nothing more", labels=["reason"])
        if service.reason is not None:
            failed.add_metric([service.reason], 1.0)
        yield failed
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


def _held(engine: Engine) -> int:
    """The bytes that caches hold. They change while they are counted, so that counting can fail."""
    with contextlib.suppress(RuntimeError):
        return engine.held_bytes()
    return 0
