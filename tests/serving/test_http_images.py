"""`/v1/images/generations`: what it answers, and what it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from http_server import SMALL, furthest, in_process, picture, small
from PIL import Image
from starlette.testclient import TestClient

from omni_runtime.serving.http.service import Service

URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[TestClient, Service]]:
    with in_process(small(tiny.qwen_image(layers=2))) as found:
        yield found


@pytest.fixture
def client(served: Any) -> TestClient:
    return served[0]


@pytest.fixture
def service(served: Any) -> Service:
    return served[1]


def made(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post(URL, json=SMALL | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_each_picture_is_the_one_that_generate_makes_with_its_seed(client: TestClient, service: Service) -> None:
    answer = made(client, n=3, seed=7, negative_prompt="dog", guidance=3.0)
    assert [one["omni"]["seed"] for one in answer["data"]] == [7, 8, 9]
    assert answer["size"] == "64x64"
    alone = service.omni.generate(
        "a cat", "dog", height=64, width=64, num_inference_steps=4, seed=8, true_cfg_scale=3.0
    )[0]  # fmt: skip
    assert furthest(picture(answer["data"][1]), alone.images[0]) <= 1
    other = made(client, seed=8)["data"][0]
    assert furthest(picture(other), alone.images[0]) > 1, "guidance has reached the pipeline"


def test_an_answer_tells_what_was_computed(client: TestClient) -> None:
    answer = made(client, steps=8, cache_backend="velocity_cache", cache_config={"budget": 4})
    facts = answer["data"][0]["omni"]
    assert (facts["method"], facts["steps"], facts["computed"], facts["skipped"]) == ("velocity_cache", 8, 4, 4)
    assert facts["mask"].count("1") == 4
    assert (facts["forwards"], facts["forwards_skipped"]) == (4, 4)
    assert facts["seconds"] > 0
    assert answer["omni"]["id"].startswith("req_")
    plain = made(client)["data"][0]["omni"]
    assert (plain["method"], plain["mask"], plain["forwards"], plain["forwards_skipped"]) == (None, "1111", 4, 0)


@pytest.mark.parametrize(
    ("quality", "computed"),
    [
        ("exact", 24), ("high", 12), ("hd", 12), ("balanced", 8), ("medium", 8), ("standard", 8), ("fast", 6),
        ("low", 6),
    ],
)  # fmt: skip
def test_quality_is_a_preset_of_ours_or_a_word_of_openai(client: TestClient, quality: str, computed: int) -> None:
    facts = made(client, steps=24, quality=quality)["data"][0]["omni"]
    assert (facts["method"], facts["computed"]) == ("auto", computed)


@pytest.mark.parametrize("quality", ["auto", None])
def test_quality_auto_leaves_the_cache_as_it_is(client: TestClient, quality: str | None) -> None:
    plain = made(client, quality=quality)["data"][0]["omni"]
    assert (plain["method"], plain["computed"]) == (None, 4)
    cached = made(client, steps=8, quality=quality, cache_backend="velocity_cache", cache_config={"budget": 4})
    assert cached["data"][0]["omni"]["method"] == "velocity_cache"


def test_a_preset_that_the_model_cannot_have_is_named_by_its_field(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: Any) -> None:
        raise ValueError("this model has no cache")

    monkeypatch.setattr(service.engine, "check_cache", refused)
    answer = client.post(URL, json=SMALL | {"quality": "fast"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "quality")


def test_a_request_without_a_seed_gets_one_that_makes_its_picture_again(client: TestClient) -> None:
    first = made(client, seed=None)["data"][0]
    again = made(client, seed=first["omni"]["seed"])["data"][0]
    assert first["b64_json"] == again["b64_json"]
    assert made(client, seed=None)["data"][0]["omni"]["seed"] != first["omni"]["seed"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_formats(client: TestClient, kind: str) -> None:
    answer = made(client, output_format=kind, output_compression=95)
    image = picture(answer["data"][0])
    assert (image.format, image.size) == (kind.upper(), (64, 64))
    assert answer["output_format"] == kind


def test_a_png_holds_its_settings_but_no_path(client: TestClient, service: Service) -> None:
    answer = made(client, cache_backend="velocity_cache", prompt="a cat in /home/of/cats")
    text = picture(answer["data"][0]).text["omni"]  # type: ignore[attr-defined]
    settings = json.loads(text)
    assert settings["model"] == service.name
    assert settings["prompt"] == "a cat in /home/of/cats"
    assert settings["num_inference_steps"] == 4
    assert "callback_on_step_end" not in settings


def test_a_picture_can_be_had_by_its_address_for_a_while(client: TestClient, service: Service) -> None:
    answer = made(client, response_format="url")
    (url,) = [one["url"] for one in answer["data"]]
    assert "b64_json" not in answer["data"][0]
    name = url.rpartition("/")[2]
    assert url.startswith("http://testserver/files/")
    assert len(name) > 32, "it cannot be guessed"
    file = client.get(url)
    assert file.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(file.content)).size == (64, 64)
    service.files.remove(name)
    assert client.get(url).status_code == 404


def test_a_picture_is_compared_with_the_one_without_a_cache(client: TestClient) -> None:
    answer = made(client, steps=8, cache_backend="velocity_cache", cache_config={"budget": 3}, compare=True)
    facts = answer["data"][0]["omni"]
    reference = facts["reference"]
    assert reference["omni"]["computed"] == 8
    assert reference["omni"]["seed"] == facts["seed"]
    plain = made(client, steps=8)["data"][0]
    assert furthest(picture(reference), picture(plain)) <= 1
    assert 10 < reference["psnr"] < 90
    assert not reference["identical"]


# What is refused


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": 7}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"prompt": "x" * 10**6}, "prompt", "too_long"),
        ({"negative_prompt": "x" * 10**5}, "negative_prompt", "too_long"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10**9}, "n", "too_large"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"size": "1000000000000x64"}, "size", "too_large"),
        ({"size": "2048x2049"}, "size", "too_large"),
        ({"size": "65x64"}, "size", "invalid_value"),
        ({"size": "0x64"}, "size", "invalid_value"),
        ({"size": "9" * 5000 + "x64"}, "size", "invalid_value"),
        ({"size": "large"}, "size", "invalid_value"),
        ({"steps": 10**9}, "steps", "too_large"),
        ({"steps": 10**400}, "steps", "too_large"),
        ({"steps": 0}, "steps", "invalid_value"),
        ({"num_inference_steps": 5}, "steps", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"guidance": "much"}, "guidance", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"response_format": "file"}, "response_format", "invalid_value"),
        ({"partial_images": 1}, "partial_images", "invalid_value"),
        ({"partial_images": 4, "stream": True}, "partial_images", "invalid_value"),
        ({"stream": True, "response_format": "url"}, "response_format", "invalid_value"),
        ({"cache_backend": "velocity"}, "cache_backend", "invalid_value"),
        ({"cache_backend": "velocity_cache", "cache_config": {"budge": 2}}, "cache_config", "invalid_value"),
        ({"cache_backend": "velocity_cache", "cache_config": "{"}, "cache_config", "invalid_value"),
        ({"cache_config": {"budget": 2}}, "cache_config", "invalid_value"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"quality": 1}, "quality", "invalid_value"),
        ({"quality": "high", "cache_backend": "velocity_cache"}, "quality", "invalid_value"),
        ({"quality": "low", "cache_config": {"budget": 2}}, "quality", "invalid_value"),
        ({"compare": True}, "compare", "invalid_value"),
        ({"compare": True, "n": 2}, "compare", "invalid_value"),
        ({"stepz": 2}, "stepz", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_error_names_its_field(
    client: TestClient, service: Service, body: dict[str, Any], param: str, code: str
) -> None:
    before = service.engine.forwards.made  # type: ignore[union-attr]
    answer = client.post(URL, content=json.dumps(SMALL | body), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert param in error["message"]
    assert len(error["message"]) < 400
    assert service.engine.forwards.made == before, "nothing was computed"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_object(client: TestClient, content: bytes) -> None:
    answer = client.post(URL, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


def test_other_bodies_are_refused(client: TestClient) -> None:
    assert client.post(URL, content=b"x", headers={"content-type": "text/plain"}).status_code == 400
    large = client.post(URL, content=b" " * (2 << 20), headers={"content-type": "application/json"})
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "too_large"


@pytest.mark.parametrize("value", ["/etc/passwd", "schedule.json", "..\\x"])
def test_no_file_of_the_server_can_be_named(client: TestClient, value: str) -> None:
    answer = client.post(
        URL, json=SMALL | {"cache_backend": "velocity_cache", "cache_config": {"calibration": value}}
    )  # fmt: skip
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cache_config"
    assert "files cannot be named" in answer.json()["error"]["message"]


def test_another_model_is_not_found(client: TestClient, service: Service) -> None:
    answer = client.post(URL, json=SMALL | {"model": "gpt-image-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert made(client, model=service.name)["omni"]["model"] == service.name


def test_fields_of_openai_without_a_meaning_here_are_accepted(client: TestClient) -> None:
    made(client, quality="auto", style="vivid", moderation="auto", user="someone", background="auto")


def test_addresses_that_do_not_exist(client: TestClient) -> None:
    for answer, status in ((client.get("/v2"), 404), (client.get(URL), 405), (client.get("/v1/models/x"), 404)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_edits_need_a_model_that_takes_pictures(client: TestClient) -> None:
    answer = client.post("/v1/images/edits", data={"prompt": "a cat"}, files={"image": b"x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
    assert client.post("/v1/videos", json={"prompt": "a cat"}).status_code == 400


def test_the_model_tells_what_it_can_do(client: TestClient, service: Service) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model == client.get(f"/v1/models/{service.name}").json()
    about = model["omni"]
    assert (about["makes"], about["references"], about["partial_images"]) == ("image", "none", True)
    assert about["defaults"]["size"] == "64x64"
    assert {"velocity_cache", "first_block_cache"} <= set(about["methods"])


def test_a_request_from_a_page_of_another_site_is_refused(client: TestClient) -> None:
    answer = client.post(URL, json=SMALL, headers={"sec-fetch-site": "cross-site"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")


def test_the_schema_names_the_fields(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths[URL]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "n", "size", "seed", "steps", "partial_images"} <= set(schema["properties"])
