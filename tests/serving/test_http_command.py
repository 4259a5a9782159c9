"""`omni serve`: its options, and the whole command in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_server import client_of, refuses, wait_until

from omni_runtime.cli import main
from omni_runtime.cli.options import parser
from omni_runtime.cli.serve import LIMITS, settings_of
from omni_runtime.serving.http.settings import Settings

ROOT = Path(__file__).parents[2]


def parsed(*arguments: str) -> Any:
    return parser().parse_args(["serve", *arguments])


def test_options_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNI_API_KEY", raising=False)
    assert settings_of(parsed()) == Settings()
    given = (
        "--memory",
        "0.5",
        "--queue",
        "3",
        "--max-side",
        "512",
        "--deadline",
        "1.5",
        "--api-key",
        "a",
        "--api-key",
        "b",
        "--no-page",
    )
    settings = settings_of(parsed(*given))
    assert (settings.queue, settings.max_side, settings.deadline, settings.api_keys) == (3, 512, 1.5, ("a", "b"))
    assert settings.memory == 1 << 29
    assert not settings.page
    monkeypatch.setenv("OMNI_API_KEY", "from-the-environment")
    assert settings_of(parsed()).api_keys == ("from-the-environment",)


def test_the_help_states_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in LIMITS:
        default = getattr(Settings(), name)
        if default is None:
            continue
        assert f"(default: {default:g})" in text or f"(default: {default})" in text, name
        assert f"--{name.replace('_', '-')}" in text
    assert parsed().host == "127.0.0.1"


@pytest.mark.parametrize("options", [["--port", "65536"], ["--queue", "0"], ["--deadline", "-1"], ["--deadlin", "1"]])
def test_wrong_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *options]) == 2
    assert "omni: error: " in capsys.readouterr().err


class Process:
    """`omni serve` with these options, ready."""

    def __init__(self, *options: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.running = subprocess.Popen(
            [sys.executable, "-m", "omni_runtime.cli", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self.lines: list[dict[str, Any]] = []
        self.other: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        assert self.running.stdout is not None
        self.address = self.running.stdout.readline().strip()

    def _read(self) -> None:
        assert self.running.stderr is not None
        for line in self.running.stderr:
            if line.startswith("{"):
                self.lines.append(json.loads(line))
            else:
                self.other.append(line)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.events("ready") or self.running.poll() is not None)
        assert self.events("ready"), (self.lines, self.other)

    def ended(self) -> int:
        code = self.running.wait(60)
        self.reader.join(60)
        return code


@pytest.fixture
def started() -> Iterator[Any]:
    processes: list[Process] = []

    def start(*options: str) -> Process:
        processes.append(Process(*options))
        return processes[-1]

    yield start
    for process in processes:
        process.running.kill()
        process.running.wait(60)


@pytest.mark.long
def test_it_drains_when_it_is_told_to_stop(started: Any) -> None:
    process = started("--cache-backend", "velocity_cache", "--api-key", "sesame")
    process.wait_until_ready()
    client = client_of(process.address, "sesame")
    stream = client.images.generate(
        prompt="a secret wish", stream=True, partial_images=3, extra_body={"steps": 100, "progress": True}
    )
    first = next(iter(stream))
    process.running.send_signal(signal.SIGTERM)
    events = [first, *stream]
    assert events[-1].type == "image_generation.completed"
    assert process.ended() == 0
    assert process.events("stopped") == [process.events("stopped")[0]]
    assert process.events("stopped")[0]["finished"]
    assert process.other == [], "all of stderr is JSON lines"
    everything = json.dumps(process.lines)
    for secret in ("secret wish", "sesame", str(ROOT), "site-packages", "Traceback"):
        assert secret not in everything
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.long
def test_a_second_signal_ends_it_at_once(started: Any) -> None:
    process = started("--drain-seconds", "600", "--max-steps", "100000")
    process.wait_until_ready()
    stream = client_of(process.address).images.generate(
        prompt="a cat", stream=True, extra_body={"steps": 100_000, "progress": True}
    )
    next(iter(stream))
    process.running.send_signal(signal.SIGTERM)
    wait_until(lambda: refuses(process.address))
    assert process.running.poll() is None, "the request is under way"
    process.running.send_signal(signal.SIGTERM)
    assert process.ended() == 1


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_ends_the_process(started: Any, saved: Any, tmp_path: Path) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(saved["qwen_image"], model)
    for weights in (model / "transformer").glob("*.safetensors"):
        weights.unlink()
    process = started("--model", str(model))
    assert process.ended() == 2
    (error,) = process.other
    assert error.startswith("omni: error: ")
    assert process.events("error")[0]["id"] == "load"


@pytest.mark.long
def test_a_port_in_use(started: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = subprocess.run(
            [sys.executable, "-m", "omni_runtime.cli", "serve", "--port", str(taken.getsockname()[1])],
            capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert result.returncode == 2
    assert "Address already in use" in result.stderr
    assert "Traceback" not in result.stderr
