"""Streams, full queues, and clients that leave: over a real socket, with OpenAI's own client."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tiny
from http_server import SMALL, Held, client_of, furthest, on_a_port, picture, refuses, small, wait_until

from omni_runtime.serving.http.server import Server

URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Server]]:
    with on_a_port(small(tiny.qwen_image(layers=2)), in_flight=2, queue=2) as found:
        yield found


@pytest.fixture
def client(served: Any) -> openai.OpenAI:
    return client_of(served[0])


def asked(client: openai.OpenAI, stream: bool = False, **more: Any) -> Any:
    fields = {"prompt": "a cat", "size": "64x64"}
    kept = {name: more.pop(name) for name in ("partial_images", "n") if name in more}
    return client.images.generate(**fields, **kept, stream=stream, extra_body={"steps": 4, "seed": 1} | more)  # type: ignore[call-overload]


def test_the_picture_grows(client: openai.OpenAI) -> None:
    events = [*asked(client, stream=True, partial_images=3, steps=12)]
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    pictures = [picture(event) for event in events]
    distances = [furthest(one, pictures[-1]) for one in pictures]
    assert distances[0] > distances[2] > 0, "it comes nearer"
    last = events[-1]
    assert (last.size, last.output_format, last.usage.total_tokens) == ("64x64", "png", 0)
    assert (last.omni["seed"], last.omni["computed"]) == (1, 12)
    (whole,) = asked(client, steps=12).data
    assert whole.b64_json == last.b64_json, "to be watched changes nothing"


def test_events_tell_the_quality_that_was_asked_for(client: openai.OpenAI) -> None:
    for asked_for in ("low", "exact"):
        (event,) = asked(client, stream=True, steps=12, quality=asked_for)
        assert (event.quality, event.omni["method"]) == (asked_for, "auto")
    (event,) = asked(client, stream=True)
    assert event.quality == "auto"


def test_several_pictures_in_one_stream(client: openai.OpenAI) -> None:
    events = [*asked(client, stream=True, n=2)]
    assert {event.index: event.omni["seed"] for event in events} == {0: 1, 1: 2}


def test_steps_and_the_reference_are_events_if_they_are_asked_for(client: openai.OpenAI) -> None:
    cache = {"cache_backend": "velocity_cache", "cache_config": {"budget": 3}}
    events = [*asked(client, stream=True, steps=6, progress=True, compare=True, **cache)]
    steps = [event for event in events if event.type == "omni.step"]
    mask = "".join(str(int(step.computed)) for step in steps if not step.reference)
    assert [step.step for step in steps] == [*range(6)] * 2
    (completed,) = [event for event in events if event.type.endswith("completed")]
    assert completed.omni["mask"] == mask
    assert mask.count("1") == 3
    assert events[-1].type == "omni.reference"
    assert events[-1].psnr > 10


def test_a_pipeline_whose_latents_are_unknown_says_so(client: openai.OpenAI, served: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(served[1].service, "no_partials", "its latents cannot be decoded here")
    (only,) = asked(client, stream=True, partial_images=3)
    assert only.omni["partial_images"] == "none: its latents cannot be decoded here"


def test_an_error_in_the_middle_ends_the_stream_with_it(client: openai.OpenAI, served: Any, monkeypatch: Any) -> None:
    decode = served[1].service.omni.pipe.vae.decode

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: something at /home/someone/secret.cu")

    stream = asked(client, stream=True)
    monkeypatch.setattr(served[1].service.omni.pipe.vae, "decode", broken)
    with pytest.raises(openai.APIError, match="could not finish") as caught:
        list(stream)
    assert "secret" not in str(caught.value)
    monkeypatch.setattr(served[1].service.omni.pipe.vae, "decode", decode)
    assert asked(client).data, "the next one is served"


def test_a_full_queue_says_when_to_come_back(client: openai.OpenAI, served: Any) -> None:
    service, answers = served[1].service, []
    threads = [
        threading.Thread(target=lambda seed=seed: answers.append(asked(client, seed=seed))) for seed in range(3)
    ]  # fmt: skip
    with Held(service) as held:
        threads[0].start()
        assert held.reached.wait(60)
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: service.engine.queued == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            asked(client)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.code == "queue_full"
    for thread in threads:
        thread.join(60)
    assert len(answers) == 3, "those that were taken are answered"
    with pytest.raises(openai.RateLimitError), Held(service):
        asked(client, n=4)
    wait_until(lambda: service.engine.queued + service.engine.running == 0)
    assert asked(client).data, "of a request that does not fit, nothing is left"


def sent(address: str, body: dict[str, Any]) -> socket.socket:
    """A request on a socket of its own, which nobody has read an answer from."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    content = json.dumps(body).encode()
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_pictures(
    client: openai.OpenAI, served: Any, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    address, server = served
    service, made = server.service, []
    caplog.set_level("INFO", "omni.serve")
    take = service.engine.take
    service.engine.take = lambda *args, **kwargs: made.append(take(*args, **kwargs)) or made[-1]
    try:
        with Held(service) as held:
            connection = sent(address, SMALL | {"n": 2, "stream": stream, "steps": 50})
            assert held.reached.wait(60)
            wait_until(lambda: len(made) == 2)
            connection.close()
            wait_until(lambda: all(job.expired() for job in made))
            held.release()
            wait_until(lambda: all(job.done() for job in made))
        assert {job.state.value for job in made} == {"cancelled"}
        assert max(job.steps for job in made) <= 1
        wait_until(lambda: any('"cancelled"' in line for line in caplog.messages))
    finally:
        del service.engine.take
    assert asked(client).data


def test_the_deadline_ends_a_request() -> None:
    errors: list[openai.APIStatusError] = []
    omni = small(tiny.qwen_image(layers=2))
    with on_a_port(omni, deadline=0.2) as (address, server), Held(server.service) as held:
        thread = threading.Thread(target=in_vain, args=[address, errors])
        thread.start()
        assert held.reached.wait(60)
        (live,) = server.service.engine._lives  # type: ignore[union-attr]
        wait_until(live.job.expired)
        held.release()
        thread.join(60)
    assert errors[0].response.status_code == 504
    assert errors[0].code == "deadline_exceeded"


def in_vain(address: str, errors: list[Any]) -> None:
    """Ask for a picture, and keep the error."""
    try:
        asked(client_of(address))
    except openai.OpenAIError as error:
        errors.append(error)


def test_a_body_is_counted_while_it_is_read(served: Any) -> None:
    host, port = served[0].removeprefix("http://").split(":")
    head = (
        f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()  # fmt: skip
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head)
        answer = b""
        try:
            for _ in range(40):  # 40 times 64 KiB, without an end
                connection.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            answer = connection.recv(1 << 16)
        except (BrokenPipeError, ConnectionResetError):
            answer = answer or connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with on_a_port(small(tiny.qwen_image(layers=2)), body_seconds=0.2) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
            connection.sendall(head.encode() + b"{")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_requests_that_are_under_way_are_finished_before_the_server_stops(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "omni.serve")
    answers = []
    omni = small(tiny.qwen_image(layers=2))
    with on_a_port(omni, drain_seconds=60.0) as (address, server), Held(server.service) as held:
        thread = threading.Thread(target=lambda: answers.append(asked(client_of(address))))
        thread.start()
        assert held.reached.wait(60)
        server.stop()
        wait_until(lambda: refuses(address))
        held.release()
        thread.join(60)
    assert answers[0].data
    assert server.service.finished
    assert any('"stopped", "finished": true' in line for line in caplog.messages)


def test_a_server_does_not_wait_longer_than_it_may() -> None:
    errors: list[Any] = []
    omni = small(tiny.qwen_image(layers=2))
    with on_a_port(omni, drain_seconds=0.2) as (address, server), Held(server.service) as held:
        thread = threading.Thread(target=in_vain, args=[address, errors])
        thread.start()
        assert held.reached.wait(60)
        server.stop()
        wait_until(lambda: not server.service.finished)
        held.release()
        thread.join(60)
    assert errors, "it was told, or cut off"
    assert not server.service.finished
