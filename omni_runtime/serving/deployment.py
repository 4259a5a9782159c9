"""`omni serve --replicas`: the application on Ray Serve, a GPU for each replica if there are any.

The front is in the process of the command: it has the socket, so nothing of Ray listens for clients, and it passes
requests on through a handle of Ray Serve (`omni_runtime.serving.replicas.router`). Ray Serve starts the replicas, more
of them when requests wait, checks their health, starts a dead one again, and lets one that is not needed finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from omni_runtime.generation.omni import Omni
from omni_runtime.serving import local_ray
from omni_runtime.serving.http.settings import Settings
from omni_runtime.serving.http.store import Kept, Store
from omni_runtime.serving.replicas.application import Application, Ask, LostError, followed
from omni_runtime.serving.replicas.router import FullError

__all__ = ["RayServe", "Replica", "Scale", "application_of"]

#: Seconds between two health checks, and that one may take. A replica that computes on a busy machine answers late.
CHECKED, PATIENCE = 10.0, 60.0
#: Seconds of load before a replica is added, and of idleness before one is stopped.
UP, DOWN = 10.0, 300.0
#: So often a model is loaded before the replicas are given up.
LOADS = 3
#: Seconds after which a replica sends its counts again.
TOLD = 5.0


@dataclass(frozen=True)
class Scale:
    """How many replicas there are.

    Attributes:
        least: the fewest.
        most: the most; None: as many as there are GPUs, or `least` if that is more.
    """

    least: int = 1
    most: int | None = None


class RayServe:
    """Replicas on Ray Serve; see `replicas.fleet.Cluster`.

    Args:
        make: (board) → the ASGI application of a replica, which is made there. It must be possible to pickle it.
        settings: the limits.
        scale: how many replicas.
        gpus: whether each has a GPU; None: if the cluster has any.
        quiet: hide Ray's own messages.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        settings: Settings,
        scale: Scale,
        gpus: bool | None = None,
        quiet: bool = True,
    ) -> None:
        self._make, self._settings, self._scale = make, settings, scale
        self._gpus, self._quiet = gpus, quiet
        self._name = f"omni-{secrets.token_hex(4)}"
        self._handle: Any = None
        self._board: Any = None
        self._thread = threading.Thread(target=self._run, name="omni-ray", daemon=True)
        self._begun: Future[None] = Future()
        self._end = threading.Event()

    def start(self) -> None:
        """Start the replicas, and return when they are ready.

        Raises:
            TooFewError: there are fewer GPUs than replicas.
            WorkersFailedError: Ray or the replicas cannot be started.
        """
        self._thread.start()
        self._begun.result()

    def stop(self) -> None:
        """Stop the replicas, and Ray if it was started here."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        """What the thread does that Ray ends with."""
        most = self._scale.most or self._scale.least
        try:
            with local_ray.ray_runs(most + 1, self._quiet) as ray:
                try:
                    self._deploy(ray)
                    self._begun.set_result(None)
                    self._end.wait()
                finally:
                    with contextlib.suppress(Exception):
                        _serve().delete(self._name, _blocking=False)
        except BaseException as error:
            if self._begun.done():
                raise
            self._begun.set_exception(error)

    def _deploy(self, ray: Any) -> None:
        serve = _serve()
        if self._quiet:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        gpus, cpus = local_ray.resources(ray)
        with_gpus = gpus > 0 if self._gpus is None else self._gpus
        there, kind = (gpus, "GPU") if with_gpus else (cpus, "CPU")
        most = self._scale.most or max(self._scale.least, gpus if with_gpus else 1)
        if there < self._scale.least:
            raise local_ray.TooFewError(f"{self._scale.least} replicas need a {kind} each, and Ray has {there}")
        serve.start(proxy_location="Disabled")
        settings = self._settings
        self._board = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=16)(Board).remote(
            settings.keep_files * most, settings.keep_bytes, settings.keep_seconds
        )
        options: dict[str, Any] = {"num_replicas": self._scale.least}
        if most > self._scale.least:
            options = {
                "autoscaling_config": {
                    "min_replicas": self._scale.least,
                    "max_replicas": most,
                    "target_ongoing_requests": settings.in_flight,
                    "upscale_delay_s": UP,
                    "downscale_delay_s": DOWN,
                }
            }
        deployment = serve.deployment(Replica).options(
            name="replica",
            **options,
            ray_actor_options={"num_cpus": 1, "num_gpus": 1 if with_gpus else 0},
            max_ongoing_requests=settings.in_flight + 2,
            max_queued_requests=settings.queue,
            graceful_shutdown_wait_loop_s=1.0,
            graceful_shutdown_timeout_s=settings.deadline + settings.drain_seconds,
            health_check_period_s=CHECKED,
            health_check_timeout_s=PATIENCE,
            max_constructor_retry_count=LOADS,
        )
        try:
            serve.run(deployment.bind(self._make, self._board), name=self._name, route_prefix=None)
        except RuntimeError as error:
            raise local_ray.WorkersFailedError(f"the replicas cannot be started: {self._why() or error}") from error
        self._handle = serve.get_deployment_handle("replica", self._name)

    def _why(self) -> str:
        import ray

        with contextlib.suppress(Exception):
            return str(ray.get(self._board.why.remote()))
        return ""

    async def ask(self, ask: Ask, follow: bool = False) -> AsyncGenerator[Any, None]:
        """The answer of a replica."""
        from ray import exceptions as lost
        from ray.serve import exceptions as serving

        method = self._handle.follow if follow else self._handle.answer
        response = method.options(stream=True).remote(ask)
        over = False
        try:
            async for part in response:
                yield part
            over = True
        except serving.BackPressureError:
            over = True
            raise FullError from None
        except lost.RayTaskError as error:
            over = True
            if isinstance(error.cause, (lost.RayActorError, lost.ObjectLostError)):
                raise LostError(str(error.cause)) from error
            raise
        except (
            lost.RayActorError, lost.WorkerCrashedError, lost.ObjectLostError, lost.NodeDiedError,
            serving.ReplicaUnavailableError,
        ) as error:  # fmt: skip
            over = True
            raise LostError(str(error)) from error
        finally:
            if not over:
                response.cancel()

    async def kept(self, name: str) -> Kept | None:
        """A picture that a replica has kept."""
        return None if self._board is None else await self._board.get.remote(name)

    async def texts(self) -> Mapping[str, str]:
        """What each replica has counted."""
        return {} if self._board is None else await self._board.texts.remote()

    def running(self) -> int:
        """The number of replicas that run."""
        deployment = _serve().status().applications[self._name].deployments["replica"]
        return int(deployment.replica_states.get("RUNNING", 0))


def _serve() -> Any:
    from ray import serve

    return serve


class Board:
    """What replicas share: the files that they keep, and what they have counted. An actor.

    Args:
        most_files, most_bytes, seconds: as for `Store`.
    """

    def __init__(self, most_files: int, most_bytes: int, seconds: float) -> None:
        self._files = Store(most_files, most_bytes, seconds)
        self._texts: dict[str, tuple[float, str]] = {}
        self._why = ""

    def keep(self, data: bytes, media_type: str) -> str:
        """Keep a file, and return its name."""
        return self._files.keep(data, media_type)

    def get(self, name: str) -> Kept | None:
        """The file of that name."""
        return self._files.get(name)

    def remove(self, name: str) -> None:
        """Forget a file."""
        self._files.remove(name)

    def tell(self, replica: str, text: str) -> None:
        """Note what a replica has counted."""
        self._texts[replica] = time.monotonic(), text

    def texts(self) -> dict[str, str]:
        """What replicas have counted, of those that have told it lately."""
        now = time.monotonic()
        self._texts = {name: one for name, one in self._texts.items() if now - one[0] < 10 * TOLD}
        return {name: text for name, (_, text) in self._texts.items()}

    def failed(self, why: str) -> None:
        """Note why a replica could not start."""
        self._why = why

    def why(self) -> str:
        """Why a replica could not start."""
        return self._why


class Shared(Store):
    """A store whose files are on the board, so that every replica, and the front, has them."""

    def __init__(self, board: Any) -> None:
        super().__init__(1, 1, 1.0)
        self._board = board

    def keep(self, data: bytes, media_type: str) -> str:
        """Keep a file, and return its name."""
        import ray

        return str(ray.get(self._board.keep.remote(data, media_type)))

    def get(self, name: str) -> Kept | None:
        """The file of that name."""
        import ray

        return ray.get(self._board.get.remote(name))

    def remove(self, name: str) -> None:
        """Forget a file."""
        import ray

        ray.get(self._board.remove.remote(name))


def application_of(omni: Omni, settings: Settings, threads: int | None) -> Callable[[Any], Any]:
    """What makes the application of a replica, from the board: `build_app` for a model that is loaded there.

    Args:
        omni: the model.
        settings: the limits.
        threads: CPU threads of a replica; None for torch's own number.
    """
    return functools.partial(_application, omni, settings, threads)


def _application(omni: Omni, settings: Settings, threads: int | None, board: Any) -> Any:
    import torch

    from omni_runtime.serving.http.app import build_app

    if threads is not None:
        torch.set_num_threads(threads)
    app = build_app(omni, settings)
    if not omni.makes_video:  # the front takes videos from where they are made
        app.state.service.files = Shared(board)
    return app


class Replica:
    """One replica: an actor of Ray Serve that runs the application. It is ready when the application is.

    Args:
        make: (board) → the application.
        board: the actor that replicas share.
    """

    async def __init__(self, make: Callable[[Any], Any], board: Any) -> None:  # type: ignore[misc]
        warnings.simplefilter("ignore")
        self._board = board
        app = make(board)
        self._service = getattr(app.state, "service", None)
        self._app = Application(app)
        await self._app.start()
        while await self._status("/ready") != 200:
            if await self._status("/health") != 200:
                error = getattr(self._service, "error", None)
                why = f"{type(error).__name__}: {error}" if error is not None else "the application is not healthy"
                await board.failed.remote(why)
                raise RuntimeError(why)
            await asyncio.sleep(0.1)
        self._tells = asyncio.create_task(self._tell())

    async def _status(self, path: str) -> int:
        head, _ = await self._app.whole(Ask("", "GET", path))
        return head.status

    async def _tell(self) -> None:
        """Tell the board again and again what this replica has counted."""
        name = secrets.token_hex(4)
        while self._service is not None:
            with contextlib.suppress(Exception):
                await self._board.tell.remote(name, self._service.metrics.text().decode())
            await asyncio.sleep(TOLD)

    async def check_health(self) -> None:
        """Raise an error if the application no longer works: Ray Serve then starts another replica."""
        status = await self._status("/ready")
        if status != 200:
            raise RuntimeError(f"the application is not ready: {status}")

    async def answer(self, ask: Ask) -> AsyncGenerator[Any, None]:
        """Answer a request."""
        async with contextlib.aclosing(self._app.ask(ask)) as parts:
            async for part in parts:
                yield part

    async def follow(self, ask: Ask) -> AsyncGenerator[Any, None]:
        """Begin a video, and follow it to its end."""
        async with contextlib.aclosing(followed(self._app, ask)) as parts:
            async for part in parts:
                yield part

    async def __del__(self) -> None:
        """Ray Serve calls this when the replica has finished its requests."""
        await self._app.stop()
