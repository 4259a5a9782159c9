"""Controls a headless Chromium over its debugging pipe: open pages, evaluate JavaScript, take screenshots.

Needs no packages.

with browser.opened(path) as page:
    page.evaluate("document.images.length")
    page.screenshot(tmp_path / "page.png")
    assert not page.errors and not page.requests
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 120.0  # seconds to wait for one answer, on a busy machine


def find() -> str | None:
    """The path of the browser; None if none is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One page.

    Attributes:
        errors: error messages of the console and the browser.
        requests: requested addresses, other than the page's own, those that begin with it, and data URIs.
    """

    def __init__(self, write: int, read: int) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._write, self._read = write, read
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._loaded = False

    def open(self, path: Path | str, width: int, height: int, dark: bool) -> None:
        """Open a file or an address, and wait until it and its pictures are loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        self._own = path if isinstance(path, str) else path.resolve().as_uri()
        self.call("Page.navigate", url=self._own)
        self.wait(lambda: self._loaded)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which must be representable in JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self, path: Path) -> None:
        """Write the page as a PDF, as it would be printed."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF")["data"]))

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol, and return its answer."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []

        def answered() -> bool:
            answers[:] = [one for one in self._heard if one.get("id") == number]
            return bool(answers)

        self.wait(answered)
        if "error" in answers[0]:
            raise RuntimeError(f"{method}: {answers[0]['error']}")
        return answers[0]["result"]

    def wait(self, done: Any) -> None:
        """Read messages of the browser until `done()` is true."""
        end = time.monotonic() + PATIENCE
        self._heard: list[dict[str, Any]] = []
        while not done():
            if time.monotonic() > end or not select.select([self._read], [], [], PATIENCE)[0]:
                raise TimeoutError("the browser does not answer")
            read = os.read(self._read, 1 << 20)
            if not read:
                raise RuntimeError("the browser has stopped")
            *messages, self._buffer = (self._buffer + read).split(b"\0")
            for message in map(json.loads, messages):
                self._heard.append(message)
                self._note(message.get("method"), message.get("params", {}))

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            if not about["request"]["url"].startswith(("data:", "blob:", self._own)):
                self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown" or (event == "Runtime.consoleAPICalled" and about["type"] == "error"):
            self.errors.append(json.dumps(about)[:500])
        elif event == "Log.entryAdded":
            self.errors.append(about["entry"]["text"])

    _own = "about:blank"


@contextlib.contextmanager
def opened(path: Path | str, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """Context manager: a file or an address in a new browser. Raises FileNotFoundError if there is no browser."""
    program = find()
    if program is None:
        raise FileNotFoundError(f"no browser among {', '.join(NAMES)}")
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        arguments = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        arguments += ["--disable-background-networking", f"--user-data-dir={home}", "--remote-debugging-pipe"]

        def descriptors() -> None:  # the browser reads commands from descriptor 3 and answers on 4
            reading, writing = os.dup(to_browser[0]), os.dup(from_browser[1])
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        process = subprocess.Popen(
            arguments, preexec_fn=descriptors, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            page = Page(to_browser[1], from_browser[0])
            page.open(path, width, height, dark)
            yield page
        finally:
            os.close(to_browser[1])
            os.close(from_browser[0])
            process.terminate()
            process.wait()
