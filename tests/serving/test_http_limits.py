"""What a server holds and how long: connections, pictures of waiting requests, videos; and when it says it is dead."""

from __future__ import annotations

import gc
import io
import json
import socket
import threading
import time
from typing import Any

import pytest
import tiny
from http_server import SMALL, Held, in_process, on_a_port, small, wait_until
from PIL import Image

from omni_runtime.generation.result import OmniResult
from omni_runtime.serving.http import logs
from omni_runtime.serving.http.protocol import limited
from omni_runtime.serving.http.settings import MIB, Settings

URL = "/v1/images/generations"
VIDEO = {"prompt": "a cat", "size": "64x64", "steps": 2, "frames": 5, "output_format": "webp"}


# A device, or an engine, that is dead


def test_a_server_whose_device_is_dead_says_so(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "omni.serve")
    with in_process(small(tiny.qwen_image(layers=2))) as (client, service):

        def broken(*_: Any) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered, see /home/someone/secret.cu")

        service.omni.pipe.transformer.register_forward_pre_hook(broken)
        answers = []
        for _ in range(3):
            assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 200)
            answers.append(client.post(URL, json=SMALL))
            wait_until(lambda: not service.engine.running)  # type: ignore[union-attr]
        wait_until(lambda: service.engine.failure is not None)  # type: ignore[union-attr]
        assert [answer.status_code for answer in answers] == [500, 500, 500]
        for path in ("/health", "/ready"):
            assert (client.get(path).status_code, client.get(path).json()) == (503, {"status": "failed"})
        after = client.post(URL, json=SMALL)
        told = after.json()["error"]
        assert (after.status_code, told["code"]) == (503, "device_failed")
        assert "must be started again" in told["message"]
        assert 'omni_failed{reason="RuntimeError"} 1.0' in client.get("/metrics").text
    assert any(
        {"event": "failed", "reason": "RuntimeError"}.items() <= json.loads(one).items() for one in messages(caplog)
    )
    everything = after.text + "".join(caplog.messages) + "".join(capfd.readouterr())
    for secret in ("secret", "Traceback", ".py"):
        assert secret not in everything


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "omni.serve"]


def test_requests_that_wait_when_the_engine_stops_get_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process(small(tiny.qwen_image(layers=2)), in_flight=1) as (client, service):
        answers: list[Any] = []
        with Held(service) as held:
            threads = [threading.Thread(target=lambda: answers.append(client.post(URL, json=SMALL))) for _ in range(2)]
            for thread in threads:
                thread.start()
            assert held.reached.wait(60)
            wait_until(lambda: service.engine.queued == 1)  # type: ignore[union-attr]
            monkeypatch.setattr(service.engine, "_resume", None)
        for thread in threads:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [503, 503]
        assert client.get("/health").status_code == 503


def test_an_error_that_ends_a_thread_is_a_line_of_json(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "omni.serve")

    def ends() -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(threading, "excepthook", logs.thread_ended)
    thread = threading.Thread(target=ends, name="omni-test")
    thread.start()
    thread.join()
    (line,) = messages(caplog)
    assert {"event": "error", "thread": "omni-test", "error": "KeyError"}.items() <= json.loads(line).items()
    assert "secret" not in line + "".join(capfd.readouterr())


# What is held


def test_pictures_of_waiting_requests_are_bounded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1024, 1024), "red").save(buffer, "PNG")
    with tiny.small_references(), tiny.processor_without_video():
        omni = small(tiny.qwen_image_edit(layers=2, plus=True))
        with in_process(omni, in_flight=1, max_held=9 * MIB) as (client, service):
            answers: list[Any] = []

            def ask() -> None:
                answers.append(
                    client.post(
                        "/v1/images/edits",
                        data={"prompt": "a", "size": "64x64", "steps": "3"},
                        files=[("image", ("a.png", buffer.getvalue(), "image/png"))],
                    )
                )

            with Held(service) as held:
                threads = [threading.Thread(target=ask) for _ in range(4)]
                for thread in threads:
                    thread.start()
                assert held.reached.wait(60)
                wait_until(lambda: len(answers) == 2)
                assert [answer.status_code for answer in answers] == [429, 429]
                assert answers[0].json()["error"]["code"] == "queue_full"
                assert int(answers[0].headers["retry-after"]) > 0
            for thread in threads:
                thread.join(60)
            assert [answer.status_code for answer in answers[2:]] == [200, 200]
            ask()
            assert answers[-1].status_code == 200, "nothing is held any more"


def test_frames_of_finished_videos_are_not_kept() -> None:
    omni = small(tiny.wan(layers=2), num_frames=5, max_sequence_length=64)
    with in_process(omni) as (client, _):
        names = [client.post("/v1/videos", json=VIDEO | {"seed": seed}).json()["id"] for seed in range(2)]
        for name in names:
            wait_until(lambda: client.get(f"/v1/videos/{name}").json()["status"] == "completed")  # noqa: B023
        gc.collect()
        assert [one for one in gc.get_objects() if type(one) is OmniResult] == []
        told = client.get(f"/v1/videos/{names[1]}").json()
        assert (told["progress"], told["size"], told["omni"]["seed"]) == (100, "64x64", 1)


def test_a_video_that_is_deleted_while_it_is_encoded_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_runtime.serving.http import encoding

    encodes, go_on, clip = threading.Event(), threading.Event(), encoding.clip

    def slow(*arguments: Any) -> bytes:
        encodes.set()
        assert go_on.wait(60)
        return clip(*arguments)

    monkeypatch.setattr(encoding, "clip", slow)
    omni = small(tiny.wan(layers=2), num_frames=5, max_sequence_length=64)
    with in_process(omni) as (client, service):
        name = client.post("/v1/videos", json=VIDEO).json()["id"]
        assert encodes.wait(60)
        assert client.get(f"/v1/videos/{name}").json()["status"] == "in_progress"
        assert client.delete(f"/v1/videos/{name}").json()["deleted"]
        go_on.set()
        monkeypatch.setattr(encoding, "clip", clip)
        other = client.post("/v1/videos", json=VIDEO).json()["id"]
        wait_until(lambda: client.get(f"/v1/videos/{other}").json()["status"] == "completed")
        assert len(service.files._files) == 2, "those of the other: a video and its first frame"


# Connections


def connected(address: str, sent: bytes) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    one = socket.create_connection((host, int(port)), timeout=60)
    one.sendall(sent)
    return one


def closed(one: socket.socket) -> bool:
    """Whether the server closes a connection, within a minute."""
    try:
        return one.recv(1) == b""
    except ConnectionResetError:
        return True


HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def test_connections_that_say_nothing_do_not_keep_others_out() -> None:
    with on_a_port(small(tiny.qwen_image(layers=2)), max_connections=4) as (address, server):
        silent = [connected(address, HEAD) for _ in range(8)]
        one = connected(address, HEAD + b"\r\n")
        assert b"200 OK" in one.recv(100)
        assert all(closed(other) for other in silent[:5]), "those that have waited longest"
        # Many at once, all in one turn of the server's loop.
        next(iter(server.server_state.connections)).loop.call_soon_threadsafe(time.sleep, 0.5)  # type: ignore[union-attr]
        silent = [connected(address, HEAD) for _ in range(8)]
        assert all(closed(other) for other in silent[:4])
        wait_until(lambda: len(server.server_state.connections) == 4)
    assert limited(Settings(max_connections=10**9)).most < 10**9, "a process has fewer file descriptors"


def test_the_head_of_a_request_must_come_in_time_however_it_is_cut_up() -> None:
    with on_a_port(small(tiny.qwen_image(layers=2)), header_seconds=0.3) as (address, _):
        slow, again = connected(address, HEAD), connected(address, HEAD + b"\r\n")
        assert b"200 OK" in again.recv(1000)
        again.sendall(HEAD)  # a second request on it
        for one in (slow, again):
            wait_until(lambda: cut_off(one, b"x-more: y\r\n"))  # noqa: B023


def cut_off(one: socket.socket, more: bytes) -> bool:
    """Whether the server has closed a connection that sends more and more."""
    try:
        one.sendall(more)
    except OSError:
        return True
    time.sleep(0.05)
    return False


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_port(small(tiny.qwen_image(layers=2)), write_seconds=0.3) as (address, server):
        app: Any = server.service
        monkeypatch.setattr(type(app), "about", lambda self: {"id": "x" * (32 << 20)})
        one = connected(address, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        wait_until(lambda: len(server.server_state.connections) == 1)
        wait_until(lambda: len(server.server_state.connections) == 0)
        quick = connected(address, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        read = 0
        while part := quick.recv(1 << 20):
            read += len(part)
        assert read > 32 << 20
        one.close()
