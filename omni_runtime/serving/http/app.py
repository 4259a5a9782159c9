"""The application: a model behind OpenAI's API of images and videos, and a page.

    app = build_app(Omni("Qwen/Qwen-Image", cache_backend="velocity_cache"), Settings(in_flight=8))

Any ASGI server can run it. The model is loaded when the server starts; until then, requests are answered with 503.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from omni_runtime.generation.omni import Omni
from omni_runtime.serving.http import images, logs, page, videos
from omni_runtime.serving.http.errors import ApiError
from omni_runtime.serving.http.gate import Gate
from omni_runtime.serving.http.service import Service, State
from omni_runtime.serving.http.settings import Settings


def build_app(omni: Omni, settings: Settings | None = None, failed: Callable[[], None] = lambda: None) -> FastAPI:
    """The application. It opens an engine of the model when it starts, and closes it when it stops.

    Args:
        omni: the model, and the cache that requests have by default. It stays open.
        settings: the limits; by default those of `Settings()`.
        failed: called, in another thread, if the model cannot be loaded.

    Returns:
        A FastAPI application. `app.state.service` is its `Service`.
    """
    service = Service(omni, settings or Settings())

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start(failed)
        try:
            yield
        finally:
            finished = await service.close()
            logs.event("stopped", finished=finished)

    app = FastAPI(title="omni serve", docs_url=None, redoc_url=None, lifespan=life, redirect_slashes=False)
    app.state.service = service
    app.include_router(images.router(service))
    app.include_router(videos.router(service))
    _add_others(app, service)
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    return app


def _refused(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


def _not_found(_: Request, error: Any) -> Response:
    """What the router itself refuses: an address that does not exist, or a method that it does not have."""
    words = {404: "there is nothing at this address", 405: "this address takes no such method"}
    answer = ApiError(error.status_code, words.get(error.status_code, "the request cannot be answered"))
    return JSONResponse(answer.body(), answer.status, error.headers)


def _add_others(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The model that is served, and what it can do."""
        return {"object": "list", "data": [service.about()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """One model."""
        if name != service.name:
            raise ApiError(404, f"there is no such model here, only {service.name!r}", param="model", code="not_found")
        return service.about()

    @app.get("/health")
    async def health() -> Response:
        """Whether the server works."""
        status = 503 if service.state is State.FAILED else 200
        return JSONResponse({"status": "failed" if status == 503 else "ok"}, status)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether it takes requests."""
        status = 200 if service.state is State.READY else 503
        return JSONResponse({"status": service.state.value}, status)

    @app.get("/metrics")
    def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/files/{name}")
    async def file(name: str) -> Response:
        """A picture that an answer has named by its address."""
        kept = service.files.get(name)
        if kept is None:
            raise ApiError(404, "there is no such file, or it has expired", code="not_found")
        return Response(kept.data, media_type=kept.media_type, headers={"Cache-Control": "private, max-age=3600"})

    if service.settings.page:

        @app.get("/", include_in_schema=False)
        async def index() -> Response:
            """The page."""
            text, policy = page.rendered(service.name)
            return HTMLResponse(text, headers={"Content-Security-Policy": policy})
