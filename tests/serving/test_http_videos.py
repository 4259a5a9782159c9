"""`/v1/videos`: begun, asked for, had, and forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tiny
from http_server import Held, client_of, on_a_port, small, wait_until

from omni_runtime.generation import video
from omni_runtime.serving.http.server import Server

ASKED: dict[str, Any] = {"prompt": "a cat", "size": "64x64"}
EXTRA: dict[str, Any] = {"steps": 3, "seed": 5, "frames": 5, "output_format": "webp"}

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[openai.OpenAI, Server]]:
    omni = small(tiny.wan(layers=2), num_frames=5, max_sequence_length=64)
    with on_a_port(omni, max_frames=9) as (address, server):
        yield client_of(address), server


@pytest.fixture
def client(served: Any) -> openai.OpenAI:
    return served[0]


def finished(client: openai.OpenAI, name: str) -> Any:
    wait_until(lambda: client.videos.retrieve(name).status not in ("queued", "in_progress"))
    return client.videos.retrieve(name)


def test_a_video_is_made_and_downloaded(client: openai.OpenAI, served: Any, tmp_path: Any) -> None:
    with Held(served[1].service) as held:
        begun = client.videos.create(**ASKED, extra_body=EXTRA)
        assert (begun.object, begun.progress, begun.prompt) == ("video", 0, "a cat")
        assert held.reached.wait(60)
        wait_until(lambda: client.videos.retrieve(begun.id).status == "in_progress")
        with pytest.raises(openai.ConflictError, match="not finished"):
            client.videos.download_content(begun.id)
    done = finished(client, begun.id)
    assert (done.status, done.progress, done.size) == ("completed", 100, "64x64")
    assert done.omni["computed"] == 3
    assert float(done.seconds) == pytest.approx(5 / 16, abs=1e-3)
    path = tmp_path / "clip.webp"
    path.write_bytes(client.videos.download_content(begun.id).read())
    assert len(video.read_frames(path)) == 5
    alone = served[1].service.omni.generate(
        "a cat", height=64, width=64, num_frames=5, num_inference_steps=3, seed=5
    )[0].frames[0]  # fmt: skip
    made = video.read_frames(path)
    assert [one.tobytes() for one in made] == [one.convert("RGB").tobytes() for one in alone]
    assert client.videos.download_content(begun.id, variant="thumbnail").read()[8:12] == b"WEBP"
    with pytest.raises(openai.BadRequestError, match="variant must be one of video, thumbnail"):
        client.videos.download_content(begun.id, variant="spritesheet")
    assert client.videos.delete(begun.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(begun.id)


def test_a_video_that_is_deleted_is_cancelled(client: openai.OpenAI, served: Any) -> None:
    service = served[1].service
    with Held(service) as held:
        begun = client.videos.create(**ASKED, extra_body=EXTRA | {"steps": 50})
        assert held.reached.wait(60)
        client.videos.delete(begun.id)
    wait_until(lambda: service.engine.queued + service.engine.running == 0)


def test_a_video_that_fails_says_so(client: openai.OpenAI, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("/home/someone/secret")

    with monkeypatch.context() as patch:
        patch.setattr(served[1].service.omni.pipe.vae, "decode", broken)
        failed = finished(client, client.videos.create(**ASKED, extra_body=EXTRA).id)
    assert failed.status == "failed"
    assert (failed.error.code, failed.error.message) == ("internal_error", "the server could not finish this request")
    with pytest.raises(openai.NotFoundError, match="could not be made"):
        client.videos.download_content(failed.id)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"frames": 10**9}, "frames"),
        ({"frames": None, "seconds": 10**6}, "seconds"),
        ({"seconds": 1}, "seconds"),
        ({"fps": 0}, "fps"),
        ({"size": "10000x64"}, "size"),
        ({"n": 2}, "n"),
        ({"output_format": "avi"}, "output_format"),
    ],
)
def test_an_error_names_its_field(client: openai.OpenAI, extra: dict[str, Any], param: str) -> None:
    given = {key: value for key, value in (ASKED | EXTRA | extra).items() if value is not None}
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt=given.pop("prompt"), extra_body=given)
    assert caught.value.param == param


def test_what_a_video_model_does_not_do(client: openai.OpenAI, served: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="use /v1/videos"):
        client.images.generate(prompt="a cat")
    with pytest.raises(openai.BadRequestError, match="from text alone"):
        client.videos.create(**ASKED, input_reference=("a.png", b"x"))
    (model,) = client.models.list().data
    assert model.omni["makes"] == "video"  # type: ignore[attr-defined]
    assert "mag_cache" not in model.omni["methods"], "nothing was calibrated for it"  # type: ignore[attr-defined]
