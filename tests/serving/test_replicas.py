"""The front of several replicas, without Ray: what is sent again and how, and what the front answers by itself."""

import asyncio
import contextlib
import json
import re
import threading
import time
import urllib.request
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import pytest
import stand_in
import tiny
from http_server import client_of, furthest, picture, small, wait_until
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from omni_runtime.serving.http.app import build_app
from omni_runtime.serving.http.server import Server, listening
from omni_runtime.serving.http.settings import Settings
from omni_runtime.serving.http.store import Kept
from omni_runtime.serving.replicas import application, router
from omni_runtime.serving.replicas.application import Application, Ask, LostError, followed
from omni_runtime.serving.replicas.fleet import Fleet, Front, merged
from omni_runtime.serving.replicas.router import ATTEMPTS, FullError, seeded

URL = "/v1/images/generations"
CAT = {"prompt": "a cat", "seed": 7}


class Fake:
    """A cluster of applications in this process, which takes each request to the next of them.

    Attributes:
        dies: for each request in turn, after how many parts of its answer its replica is lost; None: it is not.
        full: whether too many requests wait.
        asked: the requests.
        most: how many requests were with replicas at once.
    """

    def __init__(self, *apps: Any) -> None:
        self.apps = [Application(app) for app in apps]
        self.dies: list[int | None] = []
        self.full = False
        self.wrong: Exception | None = None
        self.asked: list[Ask] = []
        self.now = self.most = 0
        self.stopped = False

    def start(self) -> None:
        if self.wrong is not None:
            raise self.wrong

    def stop(self) -> None:
        self.stopped = True

    def running(self) -> int:
        return len(self.apps)

    async def kept(self, name: str) -> Kept | None:
        return Kept(b"data", "image/png", 0.0) if name == "there.png" else None

    async def texts(self) -> Mapping[str, str]:
        return {"a": "# TYPE omni_in_flight gauge\nomni_in_flight 3.0\n"}

    async def ask(self, ask: Ask, follow: bool = False) -> AsyncGenerator[Any, None]:
        if self.full:
            raise FullError
        self.asked.append(ask)
        app = self.apps[len(self.asked) % len(self.apps)]
        left = self.dies.pop(0) if self.dies else None
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            async with contextlib.aclosing(followed(app, ask) if follow else app.ask(ask)) as parts:
                async for part in parts:
                    if left is not None and not left:
                        raise LostError("killed")
                    left = None if left is None else left - 1
                    yield part
        finally:
            self.now -= 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "PAUSE", 0.0)
    monkeypatch.setattr(application, "PAUSE", 0.01)


@contextlib.contextmanager
def front(fake: Fake, **settings: Any) -> Iterator[tuple[TestClient, Fleet]]:
    fleet = Fleet(fake, Settings(**{"drain_seconds": 5.0, **settings}), "tiny")
    with TestClient(Front(fleet)) as client:  # type: ignore[arg-type]
        assert fleet.loaded.wait(10)
        wait_until(lambda: fleet.ready or fleet.error)
        yield client, fleet


@pytest.fixture
def fake() -> Fake:
    return Fake(stand_in.build(), stand_in.build())


# Sending again


@pytest.mark.parametrize("parts", [0, 1])
def test_a_request_whose_replica_dies_is_sent_to_another(fake: Fake, parts: int) -> None:
    fake.dies = [parts, parts]
    with front(fake) as (client, fleet):
        answer = client.post(URL, json=CAT)
        assert answer.status_code == 200
        assert answer.json()["picture"] == stand_in.picture(7)
        assert fleet.router.again == 2
        assert len({ask.id for ask in fake.asked}) == 1
        assert answer.headers.get_list("x-request-id") == [fake.asked[0].id], "the replicas have it from the front"


def test_a_request_without_a_seed_is_sent_again_with_the_same_one(fake: Fake) -> None:
    fake.dies = [1]
    with front(fake) as (client, _):
        answer = client.post(URL, json={"prompt": "a cat"}).json()
        assert [json.loads(ask.body)["seed"] for ask in fake.asked] == [answer["seed"]] * 2


@pytest.mark.parametrize("parts", [[1], [3], [7], [4, 2, 6]])
def test_a_stream_goes_on_with_the_events_that_the_client_does_not_have(fake: Fake, parts: list[int]) -> None:
    fake.dies = [*parts]
    with front(fake) as (client, _):
        answer = client.post(URL, json=CAT | {"stream": True})
    told = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]
    assert [one.get("step") for one in told] == [*range(stand_in.STEPS), None]
    assert told[-1]["picture"] == stand_in.picture(7)
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_request_that_ends_each_replica_is_given_up(fake: Fake) -> None:
    fake.dies = [0] * ATTEMPTS
    with front(fake) as (client, _):
        answer = client.post(URL, json=CAT)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "replica_lost"
        assert len(fake.asked) == ATTEMPTS
        fake.dies = [3] * ATTEMPTS
        assert '"code": "replica_lost"' in client.post(URL, json=CAT | {"stream": True}).text, "as an event"
        assert client.post(URL, json=CAT).status_code == 200


def test_requests_that_were_lost_twice_are_sent_one_at_a_time() -> None:
    fake = Fake(stand_in.build(seconds=0.01))
    fake.dies = [0] * 16
    fleet = Fleet(fake, Settings(), "tiny")
    fleet.state = router.State.READY

    async def pass_on(number: int) -> None:
        async def send(message: Any) -> None:
            pass

        body = json.dumps(CAT | {"seed": number}).encode()
        ask = Ask(str(number), "POST", URL, headers=((b"content-type", b"application/json"),), body=body)
        await fleet.router._pass_on(ask, send)

    async def together() -> None:
        await asyncio.gather(*map(pass_on, range(8)))

    asyncio.run(together())
    assert len(fake.asked) == 24, "each of 8 died twice, and was then answered"
    assert fake.most == 8
    fake.most = 0
    fake.dies = [0, 0]
    asyncio.run(pass_on(1))
    assert fake.most == 1


def test_a_replica_that_stops_is_left_for_another(fake: Fake) -> None:
    stopping = build_app(small(tiny.qwen_image(layers=2)))  # it was not started: it answers 503
    fake.apps[1] = Application(stopping)
    with front(fake) as (client, fleet):
        assert client.post(URL, json=CAT).status_code == 200
        assert fleet.router.again == 1


def test_too_many_waiting_requests_are_refused(fake: Fake) -> None:
    with front(fake) as (client, _):
        fake.full = True
        answer = client.post(URL, json=CAT)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"


def test_seeds_are_put_into_bodies_that_have_none() -> None:
    def ask(kind: str, body: bytes, method: str = "POST", path: str = URL) -> Ask:
        headers = ((b"content-type", kind.encode()), (b"Content-Length", str(len(body)).encode()))
        return seeded(Ask("", method, path, headers=headers, body=body))

    made = ask("application/json", b'{"prompt": "a cat", "seed": null}')
    assert 0 <= json.loads(made.body)["seed"] < 2**32
    assert made.header(b"content-length") == str(len(made.body)).encode()
    for body in (b'{"seed": 3}', b"[1]", b"{", b'"text"'):
        assert ask("application/json", body).body == body
    form = b'--xyz\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat\r\n--xyz--\r\n'
    made = ask('multipart/form-data; boundary="xyz"', form)
    assert re.match(rb'--xyz\r\nContent-Disposition: form-data; name="seed"\r\n\r\n\d+\r\n--xyz\r\n', made.body)
    given = form.replace(b'"prompt"', b'"seed"')
    assert ask("multipart/form-data; boundary=xyz", given).body == given
    assert ask("application/json", b"{}", path="/other").body == b"{}"
    assert ask("application/json", b"{}", method="GET").body == b"{}"


# What the front does itself


def test_constant_answers_are_asked_for_once(fake: Fake) -> None:
    with front(fake, api_keys=("key",)) as (client, _):
        assert client.get("/v1/models").status_code == 401
        key = {"Authorization": "Bearer key"}
        assert [client.get("/v1/models", headers=key).json() for _ in range(3)] == [{"object": "list"}] * 3
        assert len(fake.asked) == 1
        assert client.post(URL, json=CAT).status_code == 401


def test_limits_hold_before_a_replica_is_asked(fake: Fake) -> None:
    with front(fake, max_body=100) as (client, _):
        assert client.post(URL, json=CAT | {"prompt": "a" * 200}).status_code == 413
        assert fake.asked == []


def test_it_tells_whether_it_is_ready(fake: Fake) -> None:
    with front(fake) as (client, fleet):
        assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 200)
        fleet.running = 0
        assert client.get("/ready").json() == {"status": "no_replica"}
        assert client.post(URL, json=CAT).status_code == 200, "it waits for one"
        fleet.stop_taking()
        assert client.get("/ready").json() == {"status": "stopping"}
        assert client.post(URL, json=CAT).status_code == 503
    assert fake.stopped
    assert fleet.finished


def test_replicas_that_do_not_start_are_told(fake: Fake) -> None:
    fake.wrong = ValueError("no weights")
    failed = threading.Event()
    fleet = Fleet(fake, Settings(drain_seconds=0), "tiny")
    with TestClient(Front(fleet, failed.set)) as client:  # type: ignore[arg-type]
        assert failed.wait(10)
        assert client.get("/health").status_code == 503
        assert client.post(URL, json=CAT).json()["error"]["code"] == "model_failed"
    assert fleet.error is fake.wrong


def test_kept_files_come_from_beside_the_replicas(fake: Fake) -> None:
    with front(fake) as (client, _):
        answer = client.get("/files/there.png")
        assert (answer.content, answer.headers["content-type"]) == (b"data", "image/png")
        assert client.get("/files/gone.png").status_code == 404


def test_metrics_are_those_of_all_and_tell_them_apart(fake: Fake) -> None:
    fake.dies = [0]
    with front(fake) as (client, _):
        client.post(URL, json=CAT)
        text = client.get("/metrics").text
    found = {(one.name, one.labels["replica"]): one.value for family in text_string_to_metric_families(text)
             for one in family.samples}  # fmt: skip
    assert found["omni_in_flight", "a"] == 3
    assert found["omni_replicas", "front"] == 2
    assert found["omni_again_total", "front"] == 1
    assert found["omni_request_seconds_count", "front"] == 1
    assert merged({}) == ""


def test_a_client_that_leaves_cancels_its_request() -> None:
    slow = stand_in.build(seconds=30)
    fake = Fake(slow)
    fleet = Fleet(fake, Settings(drain_seconds=0.0), "tiny")
    server: Any = Server(Front(fleet), listening("127.0.0.1", 0))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    try:
        wait_until(lambda: server.started and fleet.ready)
        request = urllib.request.Request(f"{server.address}{URL}", json.dumps(CAT).encode())
        request.add_header("Content-Type", "application/json")
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(request, timeout=0.5)
        wait_until(lambda: slow.state.left == [7])
        assert fake.now == 0
    finally:
        server.stop()
        thread.join(20)


# Videos


def test_a_video_keeps_its_id_and_its_seed_when_its_replica_dies(fake: Fake) -> None:
    fake.dies = [3]
    with front(fake) as (client, _):
        begun = client.post("/v1/videos", json={"prompt": "a cat"}).json()
        address = f"/v1/videos/{begun['id']}"
        wait_until(lambda: client.get(address).json()["status"] == "completed")
        assert len(fake.asked) == 2
        assert client.get(address).json()["created_at"] == begun["created_at"]
        expected = stand_in.picture(begun["seed"])
        assert client.get(f"{address}/content").text == f"video {expected}"
        assert client.get(f"{address}/content?variant=thumbnail").text == f"thumbnail {expected}"
        assert client.get(f"{address}/content?variant=other").status_code == 400
        assert client.delete(address).json()["deleted"]
        assert client.get(address).status_code == 404


def test_a_video_that_ends_each_replica_fails(fake: Fake) -> None:
    fake.dies = [2] * ATTEMPTS
    with front(fake) as (client, _):
        address = f"/v1/videos/{client.post('/v1/videos', json={'prompt': 'a cat'}).json()['id']}"
        wait_until(lambda: client.get(address).json()["status"] == "failed")
        assert client.get(address).json()["error"]["code"] == "replica_lost"
        assert client.get(f"{address}/content").status_code == 404


def test_a_refused_video_is_refused_and_a_deleted_one_is_cancelled(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    with front(fake) as (client, _):
        assert client.post("/v1/videos", json={"prompt": ""}).status_code == 400
        monkeypatch.setattr(application, "PAUSE", 60.0)
        begun = client.post("/v1/videos", json={"prompt": "a cat", "seed": 5}).json()
        address = f"/v1/videos/{begun['id']}"
        assert client.get(f"{address}/content").status_code == 409
        client.delete(address)
        wait_until(lambda: fake.now == 0)
        assert 5 in [*fake.apps[0]._app.state.left, *fake.apps[1]._app.state.left]


def test_a_server_that_stops_waits_for_its_videos(fake: Fake) -> None:
    with front(fake) as (client, fleet):
        client.post("/v1/videos", json={"prompt": "a cat"})
        began = time.monotonic()
    assert fleet.finished
    assert fake.now == 0
    assert time.monotonic() - began < 5


# The real application


def test_the_application_behind_the_front_gives_the_same_pictures() -> None:
    apps = [build_app(small(tiny.qwen_image(layers=2))) for _ in range(2)]
    fake = Fake(*apps)
    fake.start = lambda: None  # type: ignore[method-assign]
    fleet = Fleet(fake, Settings(drain_seconds=5.0), "tiny")
    server: Any = Server(Front(fleet), listening("127.0.0.1", 0))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_until_stopped)
    for app in apps:
        app.state.service.start()
        assert app.state.service.loaded.wait(60)
    thread.start()
    try:
        wait_until(lambda: server.started and fleet.ready)
        client = client_of(server.address)
        fake.dies = [None, 1, None]
        made = [client.images.generate(prompt="a cat", size="64x64", extra_body={"steps": 3, "seed": 1}) for _ in "ab"]
        assert furthest(*(picture(one.data[0]) for one in made)) == 0
        assert len(fake.asked) == 3
        with urllib.request.urlopen(server.address) as page:
            assert "<html" in page.read().decode().lower()
            assert page.headers["content-security-policy"]
    finally:
        server.stop()
        thread.join(20)
        for app in apps:
            app.state.service.engine.close()
