"""A soak: random requests against a real server, some of them bad, with faults in blocks, scheduler and VAE.

    python -m benchmarks.soak [--requests 1000] [--minutes 30]   # writes benchmarks/results/soak.json

The server is that of `omni serve` (uvicorn on 127.0.0.1), in this process, so that faults can be injected: at random, a
block, a step of the scheduler or the VAE raises an error. Clients are threads. They ask for pictures of random prompts,
sizes, steps, guidance, caches and numbers, as a whole or as a stream; they cancel by leaving; and they send malformed,
oversized and senseless bodies.

Checked of every request: it is answered within `PATIENCE` seconds; the status is one that its kind may get; a picture
is that of the same request made alone before, without faults, up to one of 256 levels (PNG rounds). No more requests
fail than faults were injected. At the end nothing runs, nothing is held, all threads
are gone, and the memory that the process uses has not grown since the first tenth.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import functools
import gc
import http.client
import io
import json
import logging
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.serving.http.app import build_app
from omni_runtime.serving.http.server import Server, listening
from omni_runtime.serving.http.settings import Settings

MODEL = "emoji-qwen-image"
CLIENTS = 6
PATIENCE = 120.0  # seconds until an answer
FAULTS = 0.06  # injected faults per request, about
GROWTH = 0.05  # the process's memory may grow by this share
PROMPTS = ("red apple on blue", "a wolf and a castle on a very green hill", "x")
CACHES: tuple[tuple[str | None, dict[str, Any]], ...] = (
    (None, {}),
    ("velocity_cache", {"budget": 4}),
    ("first_block_cache", {"threshold": 0.15}),
    ("cache_dit", {"residual_diff_threshold": 0.2, "max_warmup_steps": 2, "Fn_compute_blocks": 1}),
    ("easy_cache", {"thresh": 0.2, "ret_steps": 2}),
)
#: A kind of bad request → its body, and the statuses that it may get.
BAD: dict[str, tuple[Callable[[random.Random], bytes], set[int]]] = {
    "not JSON": (lambda draws: b'{"prompt": "a' + bytes([draws.randrange(256)]), {400}),
    "deep": (lambda draws: b"[" * 100_000, {400}),
    "no prompt": (lambda draws: b"{}", {400}),
    "huge number": (lambda draws: b'{"prompt": "a", "n": 1000000000}', {400}),
    "huge picture": (lambda draws: b'{"prompt": "a", "size": "1000000000000x64"}', {400}),
    "long prompt": (lambda draws: json.dumps({"prompt": "a" * 1_000_000}).encode(), {400, 413}),
    "oversized": (lambda draws: b" " * (2 << 20) + b"{}", {413}),
    "unknown field": (lambda draws: b'{"prompt": "a", "stepz": 3}', {400}),
    "wrong type": (lambda draws: b'{"prompt": ["a"], "steps": "many"}', {400}),
    "unknown cache": (lambda draws: b'{"prompt": "a", "cache_backend": "tee_cache"}', {400}),
    "number": (lambda draws: b"1e999", {400}),
}


class InjectedError(RuntimeError):
    """A fault that this program has put in."""


class Faults:
    """Raises in a block, in a step of the scheduler or in the VAE, once for each time that it is armed."""

    def __init__(self, pipe: Any) -> None:
        self._armed: str | None = None
        self._lock = threading.Lock()
        self.raised: collections.Counter[str] = collections.Counter()
        self._hooks = [
            pipe.transformer.transformer_blocks[2].register_forward_pre_hook(lambda *_: self._may_raise("block"))
        ]
        kind = type(pipe.scheduler)
        self._class = type(kind.__name__, (kind,), {"step": self._around(kind.step, "scheduler")})
        self._class.__module__, self._plain, self._pipe = kind.__module__, kind, pipe
        pipe.scheduler.__class__ = self._class
        self._decode = pipe.vae.decode
        pipe.vae.decode = self._around(self._decode, "vae")

    def arm(self, where: str) -> None:
        """Let the next call there fail."""
        with self._lock:
            self._armed = where

    def remove(self) -> None:
        """Take the faults out again."""
        for hook in self._hooks:
            hook.remove()
        self._pipe.scheduler.__class__ = self._plain
        del self._pipe.vae.decode

    def _may_raise(self, where: str) -> None:
        with self._lock:
            if self._armed != where:
                return
            self._armed = None
            self.raised[where] += 1
        raise InjectedError(where)

    def _around(self, function: Callable[..., Any], where: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._may_raise(where)
            return function(*args, **kwargs)

        return call


@dataclass
class Outcome:
    """What came of all requests."""

    answered: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    furthest: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, seconds: float) -> None:
        """A request of this kind was answered."""
        with self.lock:
            self.answered[kind] += 1
            self.seconds.append(seconds)

    def say(self, words: str) -> None:
        """Something was wrong."""
        with self.lock:
            self.wrong.append(words)


def body_of(draws: random.Random) -> dict[str, Any]:
    """A good request, out of a few hundred."""
    backend, config = draws.choice(CACHES)
    body = {
        "prompt": draws.choice(PROMPTS),
        "seed": draws.randrange(2),
        "steps": 8 if draws.random() < 0.8 else 6,
        "size": draws.choice(("64x64", "64x64", "96x64")),
        "cache_backend": backend or "none",
        "cache_config": config,
        "response_format": "b64_json",
    }
    if draws.random() < 0.3:
        body["guidance"] = 1.0
    return body if backend else {**body, "cache_config": None}


def pictures_of(answer: Any) -> list[np.ndarray]:
    """The pictures of an answer."""
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))).astype(int) for one in answer["data"]]


class Client:
    """Sends requests to one server, and judges the answers.

    Args:
        address: host and port.
        alone: request → its picture made alone.
    """

    def __init__(self, address: tuple[str, int], alone: dict[str, np.ndarray], outcome: Outcome) -> None:
        self._address = address
        self._alone = alone
        self._outcome = outcome

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Send a body; the status and the whole answer."""
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
        try:
            connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def leave(self, body: dict[str, Any], after: float) -> None:
        """Send a request, and go away."""
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
        connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(after)
        connection.close()

    def one(self, number: int, seed: int) -> None:
        """Send one random request."""
        draws, begun = random.Random(f"{seed} {number}"), time.monotonic()
        kind = draws.choices(("good", "stream", "bad", "leaves"), (0.6, 0.12, 0.18, 0.1))[0]
        try:
            if kind == "bad":
                kind = self._bad(draws)
            elif kind == "leaves":
                self.leave(body_of(draws), draws.random() * 0.5)
            elif kind == "stream":
                self._stream(body_of(draws))
            else:
                self._good(body_of(draws))
        except Exception as error:
            self._outcome.say(f"request {number} ({kind}): {type(error).__name__}: {error}")
        self._outcome.note(kind, time.monotonic() - begun)

    def _bad(self, draws: random.Random) -> str:
        name = draws.choice([*BAD])
        made, statuses = BAD[name]
        status, answer = self.post(made(draws))
        if status not in statuses or "error" not in json.loads(answer):
            self._outcome.say(f"{name}: status {status}: {answer[:200]!r}")
        return f"bad: {name}"

    def _good(self, body: dict[str, Any]) -> None:
        status, answer = self.post(json.dumps(body).encode())
        if status == 200:
            self._compare(body, pictures_of(json.loads(answer))[0])
        elif status == 500:
            with self._outcome.lock:
                self._outcome.failed += 1
        elif status != 429:
            self._outcome.say(f"status {status}: {answer[:200]!r}")

    def _stream(self, body: dict[str, Any]) -> None:
        status, answer = self.post(json.dumps({**body, "stream": True, "partial_images": 1}).encode())
        events = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
        last = events[-1] if events else {}
        if status == 429:
            return
        if "error" in json.dumps(last)[:40] or last.get("type") == "error":
            with self._outcome.lock:
                self._outcome.failed += 1
        elif last.get("type") == "image_generation.completed":
            self._compare(body, pictures_of({"data": [last]})[0])
        else:
            self._outcome.say(f"a stream with status {status} ended with {str(last)[:200]}")

    def _compare(self, body: dict[str, Any], picture: np.ndarray) -> None:
        expected = self._alone[json.dumps(body)]
        off = int(np.abs(picture - expected).max()) if picture.shape == expected.shape else 255
        with self._outcome.lock:
            self._outcome.furthest = max(self._outcome.furthest, off)
        if off > 1:
            self._outcome.say(f"a picture is off by {off} of 255: {body}")


@contextlib.contextmanager
def serving(omni: Omni) -> Iterator[Server]:
    """A server in a thread."""
    server = Server(build_app(omni, Settings(queue=64, in_flight=8)), listening("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    try:
        while not (server.started and server.service.loaded.is_set()):
            time.sleep(0.05)
        yield server
    finally:
        server.stop()
        thread.join(PATIENCE)


def resident_mb() -> float:
    """The memory that this process uses, in MB."""
    with open("/proc/self/status", encoding="ascii") as status:
        (line,) = [one for one in status if one.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def soak(requests: int, minutes: float, seed: int) -> dict[str, Any]:
    """Run it. Returns the report; `wrong` is empty if all went well."""
    omni, outcome = Omni(MODEL, cache_backend=None), Outcome()
    omni.pipe.set_progress_bar_config(disable=True)
    threads_before = threading.active_count()
    end, memory = time.monotonic() + 60 * minutes, []
    with serving(omni) as server:
        host, port = server.address.removeprefix("http://").split(":")
        client = Client((host, int(port)), {}, outcome)
        bodies = {json.dumps(body): body for body in _good_bodies(requests, seed)}
        for text in bodies:
            status, answer = client.post(text.encode())
            if status != 200:
                raise RuntimeError(f"a request without faults got {status}: {answer[:300]!r}")
            client._alone[text] = pictures_of(json.loads(answer))[0]
        print(f"{len(bodies)} different requests were made alone", flush=True)
        faults, draws = Faults(omni.pipe), random.Random(seed)
        engine: Any = server.service.engine
        done = 0
        with ThreadPoolExecutor(CLIENTS) as pool:
            for first in range(0, requests, requests // 20 or 1):
                numbers = range(first, min(first + (requests // 20 or 1), requests))
                waiting = [pool.submit(client.one, number, seed) for number in numbers]
                for _ in range(math.ceil(FAULTS * len(numbers))):
                    faults.arm(draws.choice(("block", "scheduler", "vae")))
                    time.sleep(0.2)
                for one in waiting:
                    one.result()
                done = numbers[-1] + 1
                gc.collect()
                memory.append(round(resident_mb(), 1))
                print(f"{done} requests, {memory[-1]} MB, {sum(faults.raised.values())} faults, "
                      f"{len(outcome.wrong)} wrong", flush=True)  # fmt: skip
                if time.monotonic() > end:
                    break
        faults.remove()
        left = time.monotonic() + PATIENCE
        while (engine.running or engine.queued) and time.monotonic() < left:
            time.sleep(0.05)
        if engine.running or engine.queued or engine.held_bytes():
            outcome.say(
                f"left at the end: {engine.running} running, {engine.queued} queued, {engine.held_bytes()} bytes"
            )
        forwards = {"forwards": engine.forwards.made, "samples": engine.forwards.samples}
    raised = dict(faults.raised)
    if outcome.failed > sum(raised.values()):
        outcome.say(f"{outcome.failed} requests failed, and only {sum(raised.values())} faults were injected")
    first, last = max(memory[: max(2, len(memory) // 10)]), memory[-1]
    if last > first * (1 + GROWTH):
        outcome.say(f"memory has grown from {first} to {last} MB")
    if threading.active_count() > threads_before + 1:
        outcome.say(f"{threading.active_count() - threads_before} threads are left")
    return {
        "requests": done,
        "different": len(bodies),
        "answered": dict(sorted(outcome.answered.items())),
        "faults": raised,
        "failed": outcome.failed,
        "levels_off": outcome.furthest,
        "memory_mb": memory,
        "longest_answer_seconds": round(max(outcome.seconds), 1),
        **forwards,
        "wrong": outcome.wrong,
    }


def _good_bodies(requests: int, seed: int) -> Iterator[dict[str, Any]]:
    """The bodies of all good requests and streams that `Client.one` will send."""
    for number in range(requests):
        draws = random.Random(f"{seed} {number}")
        kind = draws.choices(("good", "stream", "bad", "leaves"), (0.6, 0.12, 0.18, 0.1))[0]
        if kind in ("good", "stream"):
            yield body_of(draws)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    report = soak(options.requests, options.minutes, options.seed)
    for words in report["wrong"][:20]:
        print(f"WRONG  {words}")
    command = f"python -m benchmarks.soak --requests {options.requests}"
    write(
        RESULTS / "soak.json", {"command": command, "machine": machine(torch.device("cpu")), "model": MODEL, **report}
    )
    return int(bool(report["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
