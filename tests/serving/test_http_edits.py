"""`/v1/images/edits`: references of a form, and what must not be decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tiny
from http_server import client_of, furthest, on_a_port, picture, small

ASKED: dict[str, Any] = {"prompt": "a red cat", "size": "64x64"}
EXTRA: dict[str, Any] = {"steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with tiny.small_references(), tiny.processor_without_video():
        omni = small(tiny.qwen_image_edit(layers=2, plus=True))
        with on_a_port(omni, max_references=2, max_reference_pixels=200 * 200) as (address, server):
            yield client_of(address), server.service


@pytest.fixture
def client(served: Any) -> openai.OpenAI:
    return served[0]


def png(seed: int = 0, side: int = 96) -> bytes:
    buffer = io.BytesIO()
    tiny.reference_image(side, seed).save(buffer, format="PNG")
    return buffer.getvalue()


def test_one_reference_and_several(client: openai.OpenAI, served: Any) -> None:
    one = client.images.edit(image=("a.png", png()), **ASKED, extra_body=EXTRA)
    two = client.images.edit(image=[("a.png", png()), ("b.png", png(1))], n=2, **ASKED, extra_body=EXTRA)
    alone = served[1].omni.generate(
        ASKED["prompt"], image=[tiny.reference_image(), tiny.reference_image(seed=1)], height=64, width=64,
        num_inference_steps=3, seed=5,
    )  # fmt: skip
    assert furthest(picture(two.data[0]), alone[0].images[0]) <= 1
    assert furthest(picture(one.data[0]), alone[0].images[0]) > 1
    assert [entry.omni["seed"] for entry in two.data] == [5, 6]


def test_an_edit_is_streamed(client: openai.OpenAI) -> None:
    events = [*client.images.edit(
        image=("a.png", png()), **ASKED, stream=True, partial_images=2, extra_body={"steps": 8, "seed": 5}
    )]  # fmt: skip
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert picture(events[0]).size == (64, 64)


def test_generations_need_a_model_without_pictures(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="use /v1/images/edits") as caught:
        client.images.generate(prompt="a cat")
    assert caught.value.param == "image"


def header(width: int, height: int) -> bytes:
    """A PNG that says that it is very large, and has one byte of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"not a picture", "invalid_image"),
        (b"", "invalid_image"),
        (png()[:400], "invalid_image"),
        (b"GIF89a" + bytes(50), "invalid_image"),
        (header(201, 200), "too_large"),
        (header(30_000, 30_000), "too_large"),
        (header(2**31 - 1, 2**31 - 1), "too_large"),
    ],
    ids=["text", "empty", "cut", "gif", "large", "bomb", "larger"],
)
def test_a_picture_that_cannot_be_read(client: openai.OpenAI, data: bytes, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=("a.png", data), **ASKED)
    assert (caught.value.param, caught.value.code) == ("image", code)


def test_forms_are_limited(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="2 pictures at most"):
        client.images.edit(image=[("a.png", png())] * 3, **ASKED)
    with pytest.raises(openai.BadRequestError, match="form cannot be read"):
        client.images.edit(image=[("a.png", png())] * 9, **ASKED)
    with pytest.raises(openai.BadRequestError, match="mask is not supported"):
        client.images.edit(image=("a.png", png()), mask=("m.png", png()), **ASKED)
    with pytest.raises(openai.BadRequestError, match="steps must be 100 at most"):
        client.images.edit(image=("a.png", png()), **ASKED, extra_body={"steps": 10**6})
