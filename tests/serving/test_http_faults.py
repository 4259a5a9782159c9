"""Keys, metrics, and what must not be told: paths, tracebacks and secrets."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import tiny
import torch
from http_server import SMALL, Held, in_process, small, wait_until
from prometheus_client.parser import text_string_to_metric_families

from omni_runtime import Omni
from omni_runtime.serving.http import errors, logs
from omni_runtime.serving.http.settings import Settings
from omni_runtime.serving.http.store import Store

URL = "/v1/images/generations"


def test_keys() -> None:
    keys = ("first-key", "second-kéy")
    with in_process(small(tiny.qwen_image(layers=2)), api_keys=keys) as (client, _):
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"}):
            for method, path in (("post", URL), ("get", "/v1/models"), ("get", "/metrics"), ("get", "/openapi.json")):
                answer = client.request(method, path, headers=header)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert "first-key" not in answer.text
        for key in keys:
            answer = client.get("/v1/models", headers={"authorization": f"Bearer {key}".encode()})
            assert answer.status_code == 200
        for path in ("/health", "/ready", "/"):
            assert client.get(path).status_code == 200
    assert "first-key" not in repr(Settings(api_keys=keys))


def values(text: str) -> dict[str, float]:
    """The samples of a page of metrics: name and labels → value."""
    return {
        " ".join([sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics() -> None:
    with in_process(small(tiny.qwen_image(layers=2)), max_batch=2) as (client, service):
        before = values(client.get("/metrics").text)
        assert before["omni_ready"] == 1
        cached = {"cache_backend": "velocity_cache", "cache_config": {"budget": 3}, "steps": 6}
        assert client.post(URL, json=SMALL | cached | {"n": 2}).status_code == 200
        assert client.post(URL, json=SMALL | {"n": 10**9}).status_code == 400
        with Held(service) as held:
            thread = threading.Thread(target=client.post, args=[URL], kwargs={"json": SMALL})
            thread.start()
            assert held.reached.wait(60)
            assert values(client.get("/metrics").text)["omni_in_flight"] == 1
        thread.join(60)
        wait_until(lambda: service.engine.running == 0)  # type: ignore[union-attr]
        after = values(client.get("/metrics").text)
    assert after["omni_queued"] == after["omni_in_flight"] == 0
    assert after["omni_request_steps_total kind=computed method=velocity_cache"] == 6
    assert after["omni_request_steps_total kind=skipped method=velocity_cache"] == 6
    assert after["omni_request_forwards_total kind=skipped method=velocity_cache"] == 6
    assert after["omni_request_forwards_total kind=computed method=none"] == 4
    route = "route=/v1/images/generations"
    assert after[f"omni_request_seconds_count outcome=ok {route}"] == 2
    assert after[f"omni_request_seconds_count outcome=invalid {route}"] == 1
    alone = after["omni_batch_size_bucket le=1.0"]
    assert after["omni_batch_size_count"] > alone, "some forwards were shared"
    assert after["omni_batch_size_sum"] > before["omni_batch_size_sum"]
    assert after["process_resident_memory_bytes"] > 10**7


def broken_block(pipe: Any, seed: int) -> None:
    """From now on, the request with this seed fails in a block of the transformer."""
    latents = torch.randn((1, 1, 16, 8, 8), generator=torch.Generator().manual_seed(seed))
    first = pipe._pack_latents(latents, 1, 16, 8, 8)
    forward = pipe.transformer.forward

    def broken(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(torch.equal(one, first[0]) for one in hidden_states):
            raise RuntimeError("CUDA error: illegal access, see /home/someone/kernels/secret.cu, token=hunter2")
        return forward(hidden_states, *args, **kwargs)

    broken.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    pipe.transformer.forward = broken


def test_a_request_that_fails_takes_no_other_down_and_tells_no_secret(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "omni.serve")
    with in_process(small(tiny.qwen_image(layers=2))) as (client, service):
        broken_block(service.omni.pipe, seed=13)
        answers: dict[int, Any] = {}

        def ask(seed: int) -> None:
            answers[seed] = client.post(URL, json=SMALL | {"seed": seed})

        with Held(service) as held:
            threads = [threading.Thread(target=ask, args=[seed]) for seed in (12, 13, 14)]
            threads[0].start()
            assert held.reached.wait(60)
            for thread in threads[1:]:
                thread.start()
            wait_until(lambda: service.engine.queued == 2)  # type: ignore[union-attr]
        for thread in threads:
            thread.join(60)
        assert {seed: answer.status_code for seed, answer in answers.items()} == {12: 200, 13: 500, 14: 200}
        told = answers[13].json()["error"]
    assert told["type"] == "server_error"
    assert told["code"] == "internal_error"
    lines = [json.loads(record.message) for record in caplog.records if record.name == "omni.serve"]
    request_id = answers[13].headers["x-request-id"]
    assert {"event": "error", "id": request_id, "error": "RuntimeError"}.items() <= lines_of(lines, "error")[0].items()
    failed = next(line for line in lines_of(lines, "request") if line["id"] == request_id)
    assert (failed["outcome"], failed["status"]) == ("failed", 500)
    everything = answers[13].text + "".join(caplog.messages) + "".join(capfd.readouterr())
    for secret in ("hunter2", "secret.cu", "Traceback", "illegal", ".py", "a cat"):
        assert secret not in everything


def lines_of(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


def test_an_error_outside_the_engine_is_told_as_little(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "omni.serve")
    with in_process(small(tiny.qwen_image(layers=2)), debug=True) as (client, service):

        def broken(*_: Any) -> Any:
            raise KeyError("/secret/path")

        monkeypatch.setattr(service, "facts", broken)
        answer = client.post(URL, json=SMALL)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text + "".join(caplog.messages)
    assert "KeyError" in capfd.readouterr().err, "with debug, the traceback is on stderr"


def test_a_picture_that_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_process(small(tiny.qwen_image(layers=2))) as (client, service):
        weight = service.omni.pipe.transformer.proj_out.weight
        with torch.no_grad():
            weight.fill_(float("nan"))
        answer = client.post(URL, json=SMALL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_a_number")
        answer = client.post(URL, json=SMALL | {"steps": 2})  # some schedulers make no numbers in so few
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steps")


def test_a_model_that_cannot_be_loaded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO", "omni.serve")
    omni = small(tiny.qwen_image(layers=2))

    def broken() -> None:
        raise OSError("no file /secret/weights.safetensors")

    monkeypatch.setattr(omni, "load", broken)
    with in_process(omni) as (client, _):
        for path in ("/health", "/ready"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
        answer = client.post(URL, json=SMALL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")
    assert "secret" not in answer.text + "".join(caplog.messages)


def test_requests_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    omni, go = small(tiny.qwen_image(layers=2)), threading.Event()
    load = omni.load
    monkeypatch.setattr(omni, "load", lambda: go.wait(60) and load())
    from starlette.testclient import TestClient

    from omni_runtime.serving.http.app import build_app

    app = build_app(omni, Settings(drain_seconds=0.0, page=False))
    with TestClient(app) as client:
        assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 503)
        answer = client.post(URL, json=SMALL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert int(answer.headers["retry-after"]) > 0
        go.set()
        assert app.state.service.loaded.wait(60)
        assert client.get("/ready").status_code == 200
        assert client.get("/").status_code == 404, "the page was not wanted"


def test_the_name_of_a_directory_is_its_last_part(saved: Any) -> None:
    from omni_runtime.serving.http.service import Service

    service = Service(Omni(str(saved["qwen_image"]), cache_backend=None), Settings())
    assert service.name == "qwen_image"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no file /home/someone/x.json", "no file <path>"),
        ("C:\\Users\\x\\y is damaged", "<path> is damaged"),
        ("'/a/b c' and ~/models/x", "'<path> c' and <path>"),
        ("Qwen/Qwen-Image is no model", "Qwen/Qwen-Image is no model"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("1/2 of\nthe steps", "1/2 of the steps"),
    ],
)
def test_paths_are_left_out(text: str, told: str) -> None:
    assert errors.without_paths(text) == told


def test_lines_of_libraries_are_json_without_paths(capfd: pytest.CaptureFixture[str]) -> None:
    import logging
    import warnings

    root, shown = logging.root.handlers[:], warnings.showwarning
    level = logging.root.level
    try:
        logs.to_stderr()
        try:
            raise ValueError("secret")
        except ValueError:
            logging.getLogger("some.library").exception("cannot read /home/someone/weights")
        warnings.showwarning("read /home/someone/x", UserWarning, "/home/x.py", 3)
    finally:
        logging.root.handlers[:] = root
        logging.root.setLevel(level)
        warnings.showwarning = shown
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["library", "warning"]
    assert [line["message"] for line in lines] == ["cannot read <path>", "read <path>"]


def test_files_are_kept_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("omni_runtime.serving.http.store.time.monotonic", lambda: now[0])
    store = Store(most_files=3, most_bytes=100, seconds=10.0)
    names = [store.keep(bytes(20), "image/png") for _ in range(4)]
    assert [store.get(name) is not None for name in names] == [False, True, True, True]
    large = store.keep(bytes(90), "image/webp")
    assert store.bytes == 90
    assert store.get(names[3]) is None
    assert large.endswith(".webp")
    now[0] = 10.1
    assert store.get(large) is None
    assert store.bytes == 0


@pytest.mark.parametrize("values", [{"queue": 0}, {"max_side": -1}, {"deadline": float("inf")}, {"api_keys": ("",)}])
def test_settings_are_checked(values: Any) -> None:
    with pytest.raises(ValueError, match=r"must be above 0|is empty"):
        Settings(**values)
