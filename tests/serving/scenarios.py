"""`python -m scenarios NAME ...`: what happens to requests when replicas are killed. Prints the outcome as JSON.

The test runs this in a network namespace, because the server can be reached only there.
"""

import contextlib
import json
import os
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
            return lambda: one.post("/v1/images/generations", seed=seed, **fields)

        before = one.post("/v1/images/generations", seed=0, **fields)
        results, threads = together([picture(seed) for seed in range(16)])
        time.sleep(0.7)
        one.kill_replica()
        for thread in threads:
            thread.join()
        kept = one.post("/v1/images/generations", seed=0, response_format="url", **fields)
        address = json.loads(kept[1])["data"][0]["url"].removeprefix(one.address)
        return {
            "before": before,
            "results": results,
            "again": one.sent_again(),
            "file": one.get(address)[0],
            "metrics": one.get("/metrics")[1],
            "started": one.started,
            "exit": one.stop(),
        }


def streams(_: str) -> dict[str, Any]:
    """Streams, and requests without a seed, while one replica after the other is killed."""
    with server("-m", "stand_in", "2", "2", STAND_IN_SECONDS="2") as one:
        url = "/v1/images/generations"
        results, threads = together(
            [lambda seed=seed: one.post(url, prompt="a cat", seed=seed, stream=True) for seed in range(6)]
            + [lambda: one.post(url, prompt="a cat") for _ in range(6)]
        )
        for _ in range(2):
            time.sleep(1.0)
            one.kill_replica()
        for thread in threads:
            thread.join()
        return {"results": results, "again": one.sent_again(), "exit": one.stop()}


def deadly(_: str) -> dict[str, Any]:
    """A request that kills each replica that it comes to, among others."""
    with server("-m", "stand_in", "2", "2", STAND_IN_SECONDS="1") as one:
        url = "/v1/images/generations"
        calls = [lambda seed=seed: one.post(url, prompt="a cat", seed=seed) for seed in range(12)]
        calls.insert(4, lambda: one.post(url, prompt="deadly", seed=1))
        results, threads = together(calls)
        for thread in threads:
            thread.join()
        after = one.post(url, prompt="a cat", seed=99)
        return {"deadly": results.pop(4), "results": results, "after": after, "exit": one.stop()}


def scaled(_: str) -> dict[str, Any]:
    """From one replica to two under load; a server that is told to stop finishes what it has."""
    with server("-m", "stand_in", "1", "2", STAND_IN_SECONDS="4") as one:
        url, before = "/v1/images/generations", len(one.replicas())
        ends = threading.Event()
        answers: list[int] = []

        def load() -> None:
            while not ends.is_set():
                answers.append(one.post(url, prompt="a cat", seed=1)[0])

        threads = [threading.Thread(target=load) for _ in range(16)]
        for thread in threads:
            thread.start()
        one.wait_until(lambda: len(one.replicas()) == 2)
        one.wait_until(lambda: '"running": 2' in one.err.read_text())
        ends.set()
        for thread in threads:
            thread.join()
        last, threads = together([lambda seed=seed: one.post(url, prompt="a cat", seed=seed) for seed in range(6)])
        time.sleep(1.0)
        code = one.stop()
        for thread in threads:
            thread.join()
        return {"before": before, "answers": sorted(set(answers)), "last": last, "exit": code}


if __name__ == "__main__":
    found = globals()[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "")
    print(json.dumps(found))
