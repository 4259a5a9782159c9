"""The rows of a batch: what is read, what is refused and with which words, and what a seed and a digest follow from."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
from PIL import Image

from omni_runtime import Omni
from omni_runtime.serving.rows import Row, RowsError, read


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights may be loaded, and no cache comes from the environment."""
    monkeypatch.delenv("DIFFUSION_CACHE_BACKEND", raising=False)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights loaded"))


@pytest.fixture
def omni(saved: dict[str, Path]) -> Omni:
    return Omni(saved["qwen_image"])


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def rows_of(folder: Path, omni: Omni, *rows: Any, **more: Any) -> list[Row]:
    return read(written(folder, *rows), omni, **more)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a cat"', "not valid JSON: Expecting ',' delimiter: column 19"),
        ('["a cat"]', 'a row is a JSON object, like {"prompt": "a cat"}, not ["a cat"]'),
        ({"prompt": "a cat", "hight": 64}, "QwenImagePipeline takes no 'hight'; did you mean 'height'?"),
        ({"prompt": "a cat", "height": 60}, "height 60 is not a multiple of 16; nearest: 48 or 64"),
        ({"prompt": ["a cat", "a dog"]}, "prompt must be text, not list: a row is one request"),
        ({"prompt": "a cat", "seed": [1, 2]}, "seed must be a whole number, not a list"),
        ({"prompt": "a cat", "seed": -1}, "seed must be at least 0, not -1"),
        ({"prompt": "a cat", "cache_backend": "no_cache"}, "unknown cache backend 'no_cache'"),
        ({"prompt": "a cat", "cache_backend": "tea_cache", "cache_config": {"rel": 1}}, "rel"),
        ({"prompt": "a cat", "cache_config": {"rel_l1_thresh": 1}}, "without a cache_backend"),
        ({"prompt": "a cat", "image": "cat.png"}, "no image file 'cat.png'"),
        ({"prompt": "a cat", "fps": 8}, "fps is for videos"),
        ({"prompt": "a cat", "output_type": "latent"}, "output_type cannot be set"),
        ({"prompt": "a cat", "generator": 1}, "generator is an object, which a row cannot hold: give seed"),
        ({"prompt_embeds": [[1.0]]}, "prompt_embeds is a tensor, which a row cannot hold"),
        ({"prompt": "a cat", "id": 1.5}, "id must be text or a whole number, not 1.5"),
        ({"prompt": "a cat", "id": " "}, "id must have from 1 to 1000 characters"),
        ({}, "needs a prompt"),
    ],
)
def test_a_wrong_line_is_named_with_the_reason(tmp_path: Path, omni: Omni, line: Any, words: str) -> None:
    with pytest.raises(RowsError, match="1 line is wrong, and nothing was made") as caught:
        rows_of(tmp_path, omni, {"prompt": "fine"}, "", line)
    assert f"line 3: {words}" in str(caught.value) or (words in str(caught.value) and "line 3: " in str(caught.value))


def test_all_wrong_lines_are_named_at_once(tmp_path: Path, omni: Omni) -> None:
    path = written(tmp_path, *({"prompt": "a cat", "id": "same"} for _ in range(12)))
    path.write_bytes(b'{"prompt": "\xff"}\n' + path.read_bytes())
    with pytest.raises(RowsError, match="12 lines are wrong") as caught:
        read(path, omni)
    assert "line 1: not UTF-8: invalid start byte at byte 13" in str(caught.value)
    assert "line 3: id 'same' is that of line 2, too" in str(caught.value)
    assert str(caught.value).endswith("; and 4 more")


def test_a_file_without_rows_is_refused(tmp_path: Path, omni: Omni) -> None:
    with pytest.raises(RowsError, match="has no rows"):
        rows_of(tmp_path, omni, "", " ")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "none.jsonl", omni)
    with pytest.raises(FileNotFoundError, match="is a directory"):
        read(tmp_path, omni)


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path, omni: Omni) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\n  {a dog}  ".encode())
    rows = read(tmp_path / "prompts.txt", omni)
    assert [(row.line, row.arguments["prompt"]) for row in rows] == [(1, "a cat"), (3, "{a dog}")]


def test_a_seed_follows_from_the_content_and_stays_when_other_rows_come_and_go(tmp_path: Path, omni: Omni) -> None:
    cat, dog = {"prompt": "a cat"}, {"prompt": "a dog"}
    before = rows_of(tmp_path, omni, cat, dog, cat)
    assert len({row.arguments["seed"] for row in before}) == 3, "equal rows have two pictures"
    after = rows_of(tmp_path, omni, {"prompt": "a bird"}, dog, cat, cat, defaults={"num_inference_steps": 9})
    by_id = {row.id: row for row in after}
    for row in before:
        assert by_id[row.id].arguments["seed"] == row.arguments["seed"], "whatever the options"
        assert by_id[row.id].name == row.name
        assert by_id[row.id].digest != row.digest, "nine steps make another picture"


def test_rows_with_an_id_have_a_seed_of_their_own_wherever_they_are(tmp_path: Path, omni: Omni) -> None:
    one, two, seeded = ({"id": id, "prompt": "a cat"} for id in ("one", "two", 3))
    first = {row.id: row.arguments["seed"] for row in rows_of(tmp_path, omni, one, two, seeded | {"seed": 0})}
    again = {row.id: row.arguments["seed"] for row in rows_of(tmp_path, omni, seeded | {"seed": 0}, two, one)}
    assert first == again
    assert len(set(first.values())) == 3
    assert first["3"] == 0


def test_ids_become_names_of_files_that_differ_on_every_file_system(tmp_path: Path, omni: Omni) -> None:
    ids = ["cat-1", "Cat-1", "cat 1", "../cat", "a" * 500, "cat.png", "кот", 12]
    names = [row.name for row in rows_of(tmp_path, omni, *({"id": id, "prompt": "a cat"} for id in ids))]
    assert names[0] == "cat-1"
    assert names[-1] == "12"
    assert len({name.lower() for name in names}) == len(ids)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.") and len(name) < 120 for name in names)
    assert all("." in name for name in names[1:-1]), "so none is the name of another row's second picture"


def test_the_digest_is_of_all_that_a_picture_depends_on(tmp_path: Path, omni: Omni, saved: dict[str, Path]) -> None:
    def digest(row: dict[str, Any], omni: Omni = omni, **more: Any) -> str:
        return rows_of(tmp_path, omni, {"id": "a", "prompt": "a cat", "seed": 1} | row, **more)[0].digest

    cached = Omni(saved["qwen_image"], cache_backend="tea_cache")
    found = [
        digest({}),
        digest({"prompt": "a dog"}),
        digest({"seed": 2}),
        digest({"num_inference_steps": 4}),
        digest({"cache_backend": "tea_cache"}),
        digest({"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 0.1}}),
        digest({}, cached),
        digest({"cache_config": {"rel_l1_thresh": 0.1}}, cached),
        digest({}, model={"model": "other"}),
    ]
    assert len(set(found)) == len(found)
    assert digest({"cache_backend": None}, cached) == digest({"cache_backend": "none"}), "null is no cache"
    same = rows_of(tmp_path, omni, "", {"seed": 1, "prompt": "a cat", "id": "a"})[0].digest
    assert same == found[0], "neither the line nor the order of the keys counts"
    assert digest({}, defaults={"num_inference_steps": 4}) == found[3]
    assert digest({"num_inference_steps": None}, defaults={"num_inference_steps": 4}) == found[0], (
        "null: the model's own"
    )


def test_images_are_relative_to_the_file_and_count_by_their_content(tmp_path: Path, saved: dict[str, Path]) -> None:
    omni = Omni(saved["qwen_image_edit"])
    folder = tmp_path / "in"
    folder.mkdir()
    tiny.reference_image(seed=1).save(folder / "a.png")
    tiny.reference_image(seed=1).save(folder / "b.png")
    row = {"id": "a", "prompt": "more", "image": "a.png", "seed": 0}
    one, two = (rows_of(folder, omni, row | {"image": name})[0] for name in ("a.png", "b.png"))
    assert one.arguments["image"] == str(folder / "a.png")
    assert one.digest == two.digest, "the same picture under another name"
    tiny.reference_image(seed=2).save(folder / "a.png")
    assert rows_of(folder, omni, row)[0].digest != one.digest
    default = rows_of(folder, omni, {"prompt": "more"}, defaults={"image": tmp_path / "in" / "b.png"})[0]
    assert default.arguments["image"] == str(folder / "b.png")


def test_what_is_no_picture_is_refused_and_pixels_are_not_read(
    tmp_path: Path, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    omni = Omni(saved["qwen_image_edit"])
    tiny.reference_image().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    loads: list[Any] = []
    monkeypatch.setattr(Image.Image, "load", lambda self: loads.append(self))
    rows_of(tmp_path, omni, {"prompt": "more", "image": "a.png"})
    assert loads == []
    with pytest.raises(
        RowsError, match=r"line 1: b\.png is not an image that Pillow can read; line 2: .*needs an image"
    ):
        rows_of(tmp_path, omni, {"prompt": "more", "image": "b.png"}, {"prompt": "more"})
    with pytest.raises(RowsError, match="takes one image per prompt, not 2"):
        rows_of(tmp_path, omni, {"prompt": "more", "image": ["a.png", "a.png"]})
