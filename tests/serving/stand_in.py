"""A small application in place of a model: its pictures are numbers that follow from the seed.

`python -m stand_in LEAST MOST` serves it on Ray Serve, and prints its address. The variable STAND_IN_SECONDS says how
long a request takes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

STEPS = 5


def picture(seed: int) -> str:
    """The picture of a seed."""
    return hashlib.sha256(str(seed).encode()).hexdigest()[:16]


def build(seconds: float = 0.0, deadly: str = "") -> FastAPI:
    """The application.

    Args:
        seconds: how long a request takes.
        deadly: a prompt that ends the process.
    """
    app = FastAPI()
    app.state.left = []  # the seeds of requests whose client has left
    videos: dict[str, dict[str, Any]] = {}

    @app.get("/ready")
    @app.get("/health")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"object": "list"}

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        body = await request.json()
        if body["prompt"] == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if body.get("stream"):
            return StreamingResponse(events(body["seed"]), media_type="text/event-stream")
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            if await request.is_disconnected():
                app.state.left.append(body["seed"])
                break
            await asyncio.sleep(0.01)
        return JSONResponse({"seed": body["seed"], "picture": picture(body["seed"]), "process": os.getpid()})

    async def events(seed: int) -> AsyncIterator[bytes]:
        yield b": waiting\n\n"
        for step in range(STEPS):
            await asyncio.sleep(seconds / STEPS)
            yield event({"type": "omni.step", "index": 0, "step": step, "process": os.getpid()})
        yield event({"type": "image_generation.completed", "index": 0, "seed": seed, "picture": picture(seed)})

    @app.post("/v1/videos")
    async def begin(request: Request) -> Response:
        body = await request.json()
        if not body["prompt"]:
            return JSONResponse({"error": {"message": "no prompt"}}, 400)
        name = f"video_{len(videos)}_{os.getpid()}"
        videos[name] = {"id": name, "status": "in_progress", "created_at": 1, "progress": 0, "seed": body["seed"]}
        return JSONResponse(videos[name])

    @app.get("/v1/videos/{name}")
    async def follow(name: str) -> Response:
        video = videos[name]
        video["progress"] += 50
        if video["progress"] >= 100:
            video["status"] = "completed"
        return JSONResponse(video)

    @app.get("/v1/videos/{name}/content")
    async def content(name: str, variant: str) -> Response:
        return Response(f"{variant} {picture(videos[name]['seed'])}", media_type="video/webm")

    @app.delete("/v1/videos/{name}")
    async def delete(name: str) -> Response:
        app.state.left.append(videos.pop(name)["seed"])
        return JSONResponse({})

    return app


def event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


def of_board(board: Any) -> FastAPI:
    """For Ray's replicas."""
    return build(float(os.environ.get("STAND_IN_SECONDS", "0.5")), "deadly")


def serve(least: int, most: int) -> None:
    from stand_in import of_board as make  # not of __main__, which replicas do not have

    from omni_runtime.serving.deployment import RayServe, Scale
    from omni_runtime.serving.http import logs
    from omni_runtime.serving.http.server import Server, listening
    from omni_runtime.serving.http.settings import Settings
    from omni_runtime.serving.replicas.fleet import Fleet, Front

    logs.to_stderr()
    settings = Settings(in_flight=4, drain_seconds=60.0)
    front: Any = Front(Fleet(RayServe(make, settings, Scale(least, most)), settings, "stand-in"))
    server = Server(front, listening("127.0.0.1", 0))
    print(server.address, flush=True)
    sys.exit(0 if server.serve_until_stopped() else 1)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
