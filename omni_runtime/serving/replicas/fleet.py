"""A fleet of replicas in place of one model: its life, what it counts, and the ASGI application that uvicorn runs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from omni_runtime.serving.http import logs
from omni_runtime.serving.http.gate import Gate
from omni_runtime.serving.http.metrics import Metrics
from omni_runtime.serving.http.service import State
from omni_runtime.serving.http.settings import Settings
from omni_runtime.serving.http.store import Kept, Store
from omni_runtime.serving.replicas.application import Ask
from omni_runtime.serving.replicas.router import Router

__all__ = ["Cluster", "Fleet", "Front", "merged"]

#: Seconds between two looks at how many replicas run.
PAUSE = 2.0


class Cluster(Protocol):
    """What runs the replicas."""

    def start(self) -> None:
        """Start them. Returns when they are ready."""

    def stop(self) -> None:
        """Stop them. It may be called at any time, and twice."""

    def ask(self, ask: Ask, follow: bool) -> AsyncGenerator[Any, None]:
        """As `router.Replicas.ask`."""

    async def kept(self, name: str) -> Kept | None:
        """A file that a replica has kept."""

    async def texts(self) -> Mapping[str, str]:
        """What each replica has counted, in Prometheus's text format."""

    def running(self) -> int:
        """The number of replicas that run."""


class Fleet:
    """Several replicas. It has what `Gate`, `Metrics` and `Server` use of the `Service` of one model.

    Args:
        cluster: what runs the replicas.
        settings: the limits.
        name: what clients call the model.

    Attributes:
        state: what it is doing.
        error: why the replicas could not be started.
        loaded: set when they are ready, or could not be started.
        finished: False if requests were cancelled when it was closed.
        stuck: whether something that was cancelled did not stop.
        running: the number of replicas that run, as last seen.
        asked: the number of requests that replicas are answering, or that wait for one.
    """

    def __init__(self, cluster: Cluster, settings: Settings, name: str) -> None:
        self.settings, self.name = settings, name
        self.state = State.LOADING
        self.error: BaseException | None = None
        self.loaded = threading.Event()
        self.finished, self.stuck = True, False
        self.running = self.asked = 0
        self.engine: Any = None
        self.files = Store(1, 1, 1.0)  # of the front itself: none
        self.metrics = Metrics(self)
        self.metrics.registry.register(_OfFleet(self))
        self.router = Router(self, settings)
        self._cluster = cluster
        self._seconds = 1.0  # of an answer, lately
        self._stopping_since: float | None = None
        self._looks: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are taken, and a replica is there to answer them."""
        return self.state is State.READY and self.running > 0

    @property
    def reason(self) -> str | None:
        """The class of the error for which no replica could be started; None if there is none."""
        return None if self.error is None else type(self.error).__name__

    # Its life

    def start(self, failed: Callable[[], None]) -> None:
        """Start the replicas in a thread of its own. `failed` is called there if that cannot be done."""
        self._looks = asyncio.create_task(self._look())
        threading.Thread(target=self._start, args=[failed], name="omni-replicas", daemon=True).start()

    def _start(self, failed: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            self._cluster.start()
            self.running = self._cluster.running()
        except BaseException as error:
            self.error, self.state = error, State.FAILED
            logs.failure(error, "replicas", self.settings.debug)
            failed()
            return
        finally:
            self.loaded.set()
        if self.state is State.LOADING:
            self.state = State.READY
            logs.event("ready", model=self.name, replicas=self.running, seconds=round(time.monotonic() - began, 3))

    async def _look(self) -> None:
        await asyncio.to_thread(self.loaded.wait)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put its own handlers before those of Python
                signal.signal(number, signal.getsignal(number))
        while True:
            await asyncio.sleep(PAUSE)
            if self.state is State.READY:
                with contextlib.suppress(Exception):  # the cluster is busy: the next look will tell
                    running = await asyncio.to_thread(self._cluster.running)
                    if running != self.running:
                        logs.event("replicas", running=running, before=self.running)
                    self.running = running

    def stop_taking(self) -> None:
        """Take no more requests; those that were taken are answered."""
        if self.state is not State.STOPPING:
            self._stopping_since = time.monotonic()
            self.state = State.STOPPING

    async def close(self) -> None:
        """Let what was taken finish, for `drain_seconds` from `stop_taking`; then stop the replicas."""
        self.stop_taking()
        assert self._stopping_since is not None
        end = self._stopping_since + self.settings.drain_seconds
        while (busy := self.asked) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.finished = self.finished and not busy
        if self._looks is not None:
            self._looks.cancel()
        await asyncio.to_thread(self._cluster.stop)

    def cancel(self) -> threading.Thread:
        """Stop the replicas with what they are doing, in the thread that is returned."""
        closing = threading.Thread(target=self._cluster.stop, daemon=True)
        closing.start()
        return closing

    # For the router

    async def ask(self, ask: Ask, follow: bool = False) -> AsyncGenerator[Any, None]:
        """The answer of a replica; see `router.Replicas`."""
        began = time.monotonic()
        self.asked += 1
        try:
            async with contextlib.aclosing(self._cluster.ask(ask, follow)) as parts:
                async for part in parts:
                    yield part
            self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        finally:
            self.asked -= 1

    async def kept(self, name: str) -> Kept | None:
        """A file that a replica has kept."""
        return await self._cluster.kept(name)

    async def measured(self) -> str:
        """What the replicas and the front have counted."""
        texts: Mapping[str, str] = {}
        if self.state is State.READY:
            texts = await self._cluster.texts()
        return merged({"front": self.metrics.text().decode(), **texts})

    def retry_after(self) -> int:
        """Seconds after which there is probably room."""
        rounds = self.asked / (self.settings.in_flight * max(1, self.running))
        return max(1, min(60, math.ceil(rounds * self._seconds)))


class Front:
    """The ASGI application in front of a fleet.

    Args:
        fleet: the fleet.
        failed: called, in another thread, if the replicas cannot be started.

    Attributes:
        state: its `service` is the fleet.
    """

    def __init__(self, fleet: Fleet, failed: Callable[[], None] = lambda: None) -> None:
        self.state = SimpleNamespace(service=fleet)
        self._fleet, self._failed = fleet, failed
        gate: Any = Gate
        self._gate = gate(fleet.router, fleet)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """A request, or the life of the server."""
        if scope["type"] == "http":
            await self._gate(scope, receive, send)
        elif scope["type"] == "lifespan":
            await receive()
            self._fleet.start(self._failed)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._fleet.close()
            logs.event("stopped", finished=self._fleet.finished)
            await send({"type": "lifespan.shutdown.complete"})


class _OfFleet(Collector):
    """What a fleet itself counts."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        yield GaugeMetricFamily("omni_replicas", "Replicas that run", self._fleet.running)
        yield GaugeMetricFamily("omni_asked", "Requests that replicas answer, or that wait for one", self._fleet.asked)
        again = self._fleet.router.again
        yield CounterMetricFamily("omni_again", "Requests that were sent to a replica again", again)


def merged(texts: Mapping[str, str]) -> str:
    """One text of metrics, from those of several processes; the label `replica` tells them apart."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            one = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            one.samples += [sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples]
    registry = CollectorRegistry()
    registry.register(_Gathered([*families.values()]))
    return generate_latest(registry).decode()


class _Gathered(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
