"""A soak: random requests against real servers, some of them bad, with faults in blocks, scheduler and VAE.

    python -m benchmarks.soak [--requests 1000] [--minutes 30]   # writes benchmarks/results/soak.json

There are three servers, for pictures, edits and videos, each with an embedded model. They are those of `omni serve`
(uvicorn on 127.0.0.1), in this process, so that faults can be injected: at random, a block, a step of the scheduler or
the VAE raises an error. Clients are threads. They ask for pictures of random prompts, sizes, steps, guidance and
caches, as a whole or as a stream, for edits of references, and for videos; they cancel by leaving, or by deleting a
video; and they send malformed, oversized and senseless bodies. Sizes and references are also transposed: as many
tokens, in another shape.

Checked of every request: it is answered within `PATIENCE` seconds; the status is one that its kind may get; a picture
is that of the same request made alone before, without faults, up to one of 256 levels (PNG rounds). No more requests
fail than faults were injected. At the end nothing runs, nothing is held, no result and no reference is left in memory,
all threads are gone, and the memory that the process uses was not larger in the last third of the requests than in the
second one: the mean, by at most `GROWTH`. In the first third, three models and their caches still take their places.
With fewer than `WARM` requests, memory is not judged.
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
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageSequence

from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write
from omni_runtime import Omni
from omni_runtime.generation.request import GenerationRequest
from omni_runtime.generation.result import OmniResult
from omni_runtime.serving.http.app import build_app
from omni_runtime.serving.http.server import Server, listening
from omni_runtime.serving.http.settings import Settings

CLIENTS = 6
PATIENCE = 120.0  # seconds until an answer
FAULTS = 0.06  # injected faults per request, about
GROWTH = 0.02  # the process's memory may grow by this share
WARM = 900  # memory is judged from so many requests on
PROMPTS = ("red apple on blue", "a wolf and a castle on a very green hill", "x")
CACHES: tuple[tuple[str | None, dict[str, Any]], ...] = (
    (None, {}),
    ("velocity_cache", {"budget": 4}),
    ("first_block_cache", {"threshold": 0.15}),
    ("cache_dit", {"residual_diff_threshold": 0.2, "max_warmup_steps": 2, "Fn_compute_blocks": 1}),
    ("easy_cache", {"thresh": 0.2, "ret_steps": 2}),
)
#: As many tokens in each pair of them, in other shapes.
SIZES = ("64x64", "96x64", "64x96")
REFERENCES = ((64, 64), (64, 128), (128, 64))


@dataclass(frozen=True)
class Part:
    """What one of the servers makes.

    Attributes:
        model: an embedded model.
        path: where requests are sent.
        share: of all requests.
        caches: the cache methods of its requests, by their place in `CACHES`.
    """

    model: str
    path: str
    share: float
    caches: tuple[int, ...]


PARTS = {
    "pictures": Part("emoji-qwen-image", "/v1/images/generations", 0.65, (0, 1, 2, 3, 4)),
    "edits": Part("emoji-qwen-image-edit", "/v1/images/edits", 0.25, (0, 1, 2)),
    "videos": Part("emoji-wan", "/v1/videos", 0.1, (0, 1)),
}
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
        self._hooks = [_block_of(pipe.transformer).register_forward_pre_hook(lambda *_: self._may_raise("block"))]
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


def _block_of(transformer: Any) -> torch.nn.Module:
    blocks = getattr(transformer, "transformer_blocks", None) or transformer.blocks
    return cast(torch.nn.Module, blocks[1])


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
    """A good request, out of a few hundred. `part` and `references` are not sent as they are."""
    name = draws.choices([*PARTS], [part.share for part in PARTS.values()])[0]
    backend, config = CACHES[draws.choice(PARTS[name].caches)]
    body = {
        "part": name,
        "prompt": draws.choice(PROMPTS),
        "seed": draws.randrange(2),
        "steps": 8 if draws.random() < 0.8 else 6,
        "size": draws.choice(SIZES),
        "cache_backend": backend or "none",
        **({"cache_config": config} if backend else {}),
    }
    if draws.random() < 0.3:
        body["guidance"] = 1.0
    if name == "edits":
        body["references"] = [draws.choice(REFERENCES)]
    if name == "videos":
        return body | {"frames": 5, "output_format": "webp", "steps": 6}
    return body | {"response_format": "b64_json"}


@functools.lru_cache(maxsize=len(REFERENCES))
def reference(width: int, height: int) -> bytes:
    """A PNG of colours that go from one corner to the other."""
    rows, columns = np.mgrid[0:height, 0:width]
    colours = np.stack([rows * 255 // height, columns * 255 // width, 0 * rows + 90], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG")
    return buffer.getvalue()


def sent(body: dict[str, Any]) -> tuple[str, bytes]:
    """The content type and the bytes of a body: a form if it has references, else JSON."""
    fields = {key: value for key, value in body.items() if key not in ("part", "references")}
    if "references" not in body:
        return "application/json", json.dumps(fields).encode()
    parts = []
    for key, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{text}\r\n'.encode())
    for size in body["references"]:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        parts.append(head.encode() + b"Content-Type: image/png\r\n\r\n" + reference(*size) + b"\r\n")
    return f"multipart/form-data; boundary={BOUNDARY}", b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


BOUNDARY = "soak-soak-soak"


def pictures_of(answer: Any) -> np.ndarray:
    """The picture of an answer, H × W × 3."""
    (one,) = answer["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))).astype(int)


def frames_of(data: bytes) -> np.ndarray:
    """The frames of a video, F × H × W × 3."""
    with Image.open(io.BytesIO(data)) as clip:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(clip)]
    return np.stack(frames).astype(int)


class FailedError(Exception):
    """A request was answered with an error that a fault may have caused."""


class Client:
    """Sends requests to the servers, and judges the answers.

    Args:
        addresses: part → host and port.
        alone: request → its picture or video made alone.
    """

    def __init__(self, addresses: dict[str, tuple[str, int]], alone: dict[str, np.ndarray], outcome: Outcome) -> None:
        self._addresses = addresses
        self._alone = alone
        self._outcome = outcome

    def ask(self, part: str, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, bytes]:
        """Send a request; the status and the whole answer."""
        connection = http.client.HTTPConnection(*self._addresses[part], timeout=PATIENCE)
        try:
            connection.request(method, path, body or None, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Send a body of JSON to the server of pictures."""
        return self.ask("pictures", "POST", PARTS["pictures"].path, body, "application/json")

    def make(self, body: dict[str, Any]) -> np.ndarray | None:
        """The picture or video of a good request; None if the server has no room.

        Raises:
            FailedError: it was not made.
        """
        part = body["part"]
        kind, data = sent(body)
        status, answer = self.ask(part, "POST", PARTS[part].path, data, kind)
        if status == 429:
            return None
        if status == 500:
            raise FailedError(answer.decode())
        if status != 200:
            raise ValueError(f"status {status}: {answer[:200]!r}")
        return self._video(json.loads(answer)) if part == "videos" else pictures_of(json.loads(answer))

    def _video(self, document: dict[str, Any]) -> np.ndarray:
        path, end = f"{PARTS['videos'].path}/{document['id']}", time.monotonic() + PATIENCE
        while document["status"] not in ("completed", "failed"):
            if time.monotonic() > end:
                raise TimeoutError("a video is not finished")
            time.sleep(0.05)
            document = json.loads(self.ask("videos", "GET", path)[1])
        if document["status"] == "failed":
            raise FailedError(str(document["error"]))
        status, data = self.ask("videos", "GET", f"{path}/content")
        if status != 200:
            raise ValueError(f"the content of a video: status {status}")
        return frames_of(data)

    def leave(self, body: dict[str, Any], after: float) -> None:
        """Send a request, and go away, or delete the video."""
        part = body["part"]
        kind, data = sent(body)
        if part == "videos":
            status, answer = self.ask(part, "POST", PARTS[part].path, data, kind)
            time.sleep(after)
            if status == 200:
                self.ask(part, "DELETE", f"{PARTS[part].path}/{json.loads(answer)['id']}")
            return
        connection = http.client.HTTPConnection(*self._addresses[part], timeout=PATIENCE)
        connection.request("POST", PARTS[part].path, data, {"Content-Type": kind})
        time.sleep(after)
        connection.close()

    def one(self, number: int, seed: int) -> None:
        """Send one random request."""
        begun = time.monotonic()
        kind, body, draws = drawn(number, seed)
        name = kind
        try:
            if kind == "bad":
                name = self._bad(draws)
            elif kind == "leaves":
                self.leave(body, draws.random() * 0.5)
            else:
                name = f"{kind}: {body['part']}"
                (self._stream if kind == "stream" else self._good)(body)
        except Exception as error:
            self._outcome.say(f"request {number} ({name}): {type(error).__name__}: {error}")
        self._outcome.note(name, time.monotonic() - begun)

    def _bad(self, draws: random.Random) -> str:
        name = draws.choice([*BAD])
        made, statuses = BAD[name]
        status, answer = self.post(made(draws))
        if status not in statuses or "error" not in json.loads(answer):
            self._outcome.say(f"{name}: status {status}: {answer[:200]!r}")
        return f"bad: {name}"

    def _failed(self) -> None:
        with self._outcome.lock:
            self._outcome.failed += 1

    def _good(self, body: dict[str, Any]) -> None:
        try:
            made = self.make(body)
        except FailedError:
            self._failed()
            return
        if made is not None:
            self._compare(body, made)

    def _stream(self, body: dict[str, Any]) -> None:
        part = body["part"]
        kind, data = sent({**body, "stream": True, "partial_images": 1})
        status, answer = self.ask(part, "POST", PARTS[part].path, data, kind)
        if status == 429:
            return
        events = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
        last = events[-1] if events else {}
        if "error" in json.dumps(last)[:40] or last.get("type") == "error":
            self._failed()
        elif str(last.get("type")).endswith(".completed"):
            self._compare(body, pictures_of({"data": [last]}))
        else:
            self._outcome.say(f"a stream with status {status} ended with {str(last)[:200]}")

    def _compare(self, body: dict[str, Any], picture: np.ndarray) -> None:
        expected = self._alone[json.dumps(body)]
        off = int(np.abs(picture - expected).max()) if picture.shape == expected.shape else 255
        with self._outcome.lock:
            self._outcome.furthest = max(self._outcome.furthest, off)
        if off > 1:
            self._outcome.say(f"a picture is off by {off} of 255: {body}")


def drawn(number: int, seed: int) -> tuple[str, dict[str, Any], random.Random]:
    """What request `number` is: its kind, a body, and the draws that are left. Videos are not streamed."""
    draws = random.Random(f"{seed} {number}")
    kind = draws.choices(("good", "stream", "bad", "leaves"), (0.6, 0.12, 0.18, 0.1))[0]
    body = body_of(draws)
    return "good" if kind == "stream" and body["part"] == "videos" else kind, body, draws


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
    outcome = Outcome()
    omnis = {name: Omni(part.model, cache_backend=None) for name, part in PARTS.items()}
    for omni in omnis.values():
        omni.pipe.set_progress_bar_config(disable=True)
    threads_before = threading.active_count()
    chunk = max(2 * CLIENTS, requests // 20)
    end, memory = time.monotonic() + 60 * minutes, []
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(serving(omni)) for name, omni in omnis.items()}
        addresses = {}
        for name, server in servers.items():
            host, port = server.address.removeprefix("http://").split(":")
            addresses[name] = host, int(port)
        client = Client(addresses, {}, outcome)
        good = (body for kind, body, _ in (drawn(number, seed) for number in range(requests))
                if kind in ("good", "stream"))  # fmt: skip
        bodies = {json.dumps(body): body for body in good}
        for text, body in bodies.items():
            made = client.make(body)
            if made is None:
                raise RuntimeError("a server without load has no room")
            client._alone[text] = made
        print(f"{len(bodies)} different requests were made alone", flush=True)
        faults, draws = [Faults(omni.pipe) for omni in omnis.values()], random.Random(seed)
        engines: list[Any] = [server.service.engine for server in servers.values()]
        done = 0
        with ThreadPoolExecutor(CLIENTS) as pool:
            for first in range(0, requests, chunk):
                numbers = range(first, min(first + chunk, requests))
                waiting = [pool.submit(client.one, number, seed) for number in numbers]
                for _ in range(math.ceil(FAULTS * len(numbers))):
                    part = draws.choices(faults, [part.share for part in PARTS.values()])[0]
                    part.arm(draws.choice(("block", "scheduler", "vae")))
                    time.sleep(0.2)
                for one in waiting:
                    one.result()
                done = numbers[-1] + 1
                gc.collect()
                memory.append(round(resident_mb(), 1))
                print(f"{done} requests, {memory[-1]} MB, {_total(faults).total()} faults, "
                      f"{len(outcome.wrong)} wrong", flush=True)  # fmt: skip
                if time.monotonic() > end:
                    break
        for one_of in faults:
            one_of.remove()
        _say_what_is_left(engines, outcome)
        forwards = {"forwards": sum(engine.forwards.made for engine in engines),
                    "samples": sum(engine.forwards.samples for engine in engines)}  # fmt: skip
    raised = _total(faults)
    if outcome.failed > raised.total():
        outcome.say(f"{outcome.failed} requests failed, and only {raised.total()} faults were injected")
    third = len(memory) // 3
    second, last = (round(statistics.mean(part or [0.0]), 1) for part in (memory[third:-third], memory[-third:]))
    if done >= WARM and last > second * (1 + GROWTH):
        outcome.say(f"memory has grown from {second} to {last} MB, the means of the second and the last third")
    if threading.active_count() > threads_before + len(PARTS):
        outcome.say(f"{threading.active_count() - threads_before} threads are left")
    return {
        "requests": done,
        "different": len(bodies),
        "answered": dict(sorted(outcome.answered.items())),
        "faults": dict(raised),
        "failed": outcome.failed,
        "levels_off": outcome.furthest,
        "memory_mb": memory,
        "mean_mb": {"second third": second, "last third": last},
        "longest_answer_seconds": round(max(outcome.seconds), 1),
        **forwards,
        "wrong": outcome.wrong,
    }


def _total(faults: Sequence[Faults]) -> collections.Counter[str]:
    return sum((one.raised for one in faults), collections.Counter())


def _say_what_is_left(engines: Sequence[Any], outcome: Outcome) -> None:
    """Nothing may run when all requests were answered, and nothing of them may be left in memory."""
    left = time.monotonic() + PATIENCE
    while any(engine.running or engine.queued or engine._lives for engine in engines) and time.monotonic() < left:
        time.sleep(0.05)
    for engine in engines:
        if engine.running or engine.queued or engine.held_bytes():
            outcome.say(
                f"left at the end: {engine.running} running, {engine.queued} queued, {engine.held_bytes()} bytes"
            )
    time.sleep(1.0)  # the last answers are sent
    gc.collect()
    results = sum(type(one) in (OmniResult, GenerationRequest) for one in gc.get_objects())
    if results > len(engines):  # a thread may still have its last one
        outcome.say(f"{results} results and requests are left in memory")


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
    models = [part.model for part in PARTS.values()]
    write(
        RESULTS / "soak.json", {"command": command, "machine": machine(torch.device("cpu")), "models": models, **report}
    )
    return int(bool(report["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
