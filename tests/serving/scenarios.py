"""`python -m scenarios NAME ...`: what happens to requests when replicas are killed. Prints the outcome as JSON.

The test runs this in a network namespace, because the server can be reached only there.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loopback

REPLICA = "ray::ServeReplica"
SECONDS = 240.0
URL = "/v1/images/generations"


class Server:
    """A server with replicas, in a process of its own.

    Attributes:
        address: where it listens.
        started: the seconds until it was ready.
    """

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        begun = time.monotonic()
        self.err = folder / "server.txt"
        with open(self.err, "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=err, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.wait_until(lambda: self.get("/ready")[0] == 200)
        self.started = time.monotonic() - begun

    def wait_until(self, true: Callable[[], Any]) -> Any:
        end = time.monotonic() + SECONDS
        while not (found := true()):
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.1)
        return found

    def get(self, path: str) -> tuple[int, str]:
        return self.ask(urllib.request.Request(self.address + path))

    def post(self, path: str, **fields: Any) -> tuple[int, str]:
        body = json.dumps(fields).encode()
        return self.ask(urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"}))

    def stream(self, path: str, first: Callable[[Any], None], **fields: Any) -> tuple[int, str]:
        """Ask for a stream. `first` is called with its first event when that is here."""
        body, text = json.dumps(fields | {"stream": True}).encode(), ""
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            for line in answer:
                if "data:" not in text and line.startswith(b"data:"):
                    first(json.loads(line[5:]))
                text += line.decode()
            return answer.status, text

    def ask(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, answer.read().decode("latin-1")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, repr(error)

    def replicas(self) -> list[int]:
        return loopback.processes_of(self.process.pid, REPLICA)

    def kill_replica(self) -> int:
        """Kill one replica, and return its process."""
        process = self.wait_until(self.replicas)[0]
        os.kill(process, signal.SIGKILL)
        return int(process)

    def asked(self) -> int:
        """The number of requests that are with replicas, or wait for one."""
        found = re.search(r'^omni_asked\{replica="front"\} (\d+)', self.get("/metrics")[1], re.MULTILINE)
        return int(found[1]) if found else 0

    def sent_again(self) -> int:
        return sum('"event": "again"' in line for line in self.err.read_text().splitlines())

    def stop(self) -> int:
        """Stop it, and return its exit code."""
        self.process.terminate()
        return self.process.wait(SECONDS)


@contextlib.contextmanager
def server(*arguments: str, **environment: str) -> Iterator[Server]:
    made = Server(Path.cwd(), *arguments, **environment)
    try:
        yield made
    finally:
        made.process.kill()


def together(calls: list[Callable[[], Any]]) -> tuple[list[Any], list[threading.Thread]]:
    """Make all calls at once, each in a thread; the list of results is complete when the threads have ended."""
    results: list[Any] = [None] * len(calls)

    def make(place: int) -> None:
        results[place] = calls[place]()

    threads = [threading.Thread(target=make, args=[place]) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    return results, threads


def killed(model: str) -> dict[str, Any]:
    """The command with two replicas, of which one is killed under load."""
    options = ("--replicas", "2", "--model", model, "--port", "0", "--cache-backend", "none")
    with server("-m", "omni_runtime.cli", "serve", *options) as one:
        fields = {"prompt": "a cat", "size": "64x64", "steps": 40}

        def picture(seed: int) -> Callable[[], Any]:
            return lambda: one.post(URL, seed=seed, **fields)

        before = one.post(URL, seed=0, **fields)
        begun = threading.Event()
        results, threads = together(
            [
                *(picture(seed) for seed in range(16)),
                lambda: one.stream(URL, lambda event: begun.set(), seed=0, progress=True, **fields),
            ]
        )
        one.wait_until(begun.is_set)
        one.kill_replica()
        for thread in threads:
            thread.join()
        kept = one.post(URL, seed=0, response_format="url", **fields)
        address = json.loads(kept[1])["data"][0]["url"].removeprefix(one.address)
        return {
            "before": before,
            "results": results[:16],
            "stream": results[16],
            "again": one.sent_again(),
            "file": one.get(address)[0],
            "metrics": one.get("/metrics")[1],
            "started": one.started,
            "exit": one.stop(),
        }


def streams(_: str) -> dict[str, Any]:
    """Streams, and requests without a seed, while one replica after the other is killed."""
    with server("-m", "stand_in", "2", "2", STAND_IN_SECONDS="2") as one:
        results, threads = together(
            [lambda seed=seed: one.stream(URL, kill if seed in (0, 3) else nothing, prompt="a cat", seed=seed)
             for seed in range(6)]
            + [lambda: one.post(URL, prompt="a cat") for _ in range(6)]
        )  # fmt: skip
        for thread in threads:
            thread.join()
        return {"results": results, "again": one.sent_again(), "exit": one.stop()}


def kill(event: Any) -> None:
    """Kill the replica that has sent this event."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(event["process"], signal.SIGKILL)


def nothing(event: Any) -> None:
    pass


def deadly(_: str) -> dict[str, Any]:
    """A request that kills each replica that it comes to, among others."""
    with server("-m", "stand_in", "2", "2", STAND_IN_SECONDS="1") as one:
        calls = [lambda seed=seed: one.post(URL, prompt="a cat", seed=seed) for seed in range(12)]
        calls.insert(4, lambda: one.post(URL, prompt="deadly", seed=1))
        results, threads = together(calls)
        for thread in threads:
            thread.join()
        after = one.post(URL, prompt="a cat", seed=99)
        return {"deadly": results.pop(4), "results": results, "after": after, "exit": one.stop()}


def scaled(_: str) -> dict[str, Any]:
    """From one replica to two under load; a server that is told to stop finishes what it has."""
    with server("-m", "stand_in", "1", "2", STAND_IN_SECONDS="4") as one:
        before = len(one.replicas())
        ends = threading.Event()
        answers: list[int] = []

        def load() -> None:
            while not ends.is_set():
                answers.append(one.post(URL, prompt="a cat", seed=1)[0])

        threads = [threading.Thread(target=load) for _ in range(16)]
        for thread in threads:
            thread.start()
        one.wait_until(lambda: len(one.replicas()) == 2)
        one.wait_until(lambda: '"running": 2' in one.err.read_text())
        ends.set()
        for thread in threads:
            thread.join()
        last, threads = together([lambda seed=seed: one.post(URL, prompt="a cat", seed=seed) for seed in range(6)])
        one.wait_until(lambda: one.asked() == 6)
        code = one.stop()
        for thread in threads:
            thread.join()
        return {"before": before, "answers": sorted(set(answers)), "last": last, "exit": code}


def token(_: str) -> dict[str, Any]:
    """Another process, which does not have the token, cannot use a Ray that was started here."""
    from omni_runtime.serving import local_ray

    code = "import ray, sys; ray.init(address=sys.argv[1]); print(ray.get(ray.remote(lambda: 5).remote()))"
    with local_ray.ray_runs(2) as ray:
        address = ray.get_runtime_context().gcs_address
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        given = {"without": {"RAY_AUTH_MODE": "disabled"}, "wrong": {"RAY_AUTH_TOKEN": "0" * 64}, "right": os.environ}
        return {
            name: subprocess.run(
                [sys.executable, "-c", code, address], env={**plain, **more}, capture_output=True, check=False
            ).returncode
            for name, more in given.items()
        }


if __name__ == "__main__":
    found = globals()[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "")
    print(json.dumps(found))
