"""Degrees of parallelism: wrong ones are refused before anything is loaded."""

import pytest
import tiny

from omni_runtime import Omni
from omni_runtime.parallel.degrees import Degrees, parse


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cgf": 2}, "parallel has no 'cgf'; did you mean 'cfg'"),
        ({"cfg": 4}, "cfg must be 1 or 2"),
        ({"ulysses": 0}, "ulysses must be at least 1"),
        ({"ulysses": 2, "tensor": 2}, "does not combine"),
        ({"uneven": True}, "either ulysses or ring"),
        ({"ulysses": 2, "ring": 2, "uneven": True}, "either ulysses or ring"),
    ],
)
def test_wrong_degrees_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Omni("emoji-qwen-image", parallel=given)


@pytest.mark.parametrize("given", ["cfg=2", {"cfg": 2.5}, {"cfg": True}, {"ulysses": 2, "uneven": "yes"}])
def test_other_types_are_refused(given):
    with pytest.raises(TypeError, match="parallel"):
        Omni("emoji-qwen-image", parallel=given)


def test_a_single_process_is_told_how_to_start_more():
    with pytest.raises(ValueError, match=r"ulysses=2,cfg=2 needs 4 processes.*torchrun --nproc-per-node 4"):
        Omni("emoji-qwen-image", parallel={"ulysses": 2, "cfg": 2})


@pytest.fixture
def place(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("place")
def test_another_number_of_processes_is_refused():
    with pytest.raises(ValueError, match="the ranks of ulysses=2,cfg=2 are 4, and 2 were started"):
        Omni("emoji-qwen-image", parallel={"ulysses": 2, "cfg": 2})


@pytest.mark.usefixtures("place")
def test_degrees_of_one_rank_are_refused_where_there_are_more():
    with pytest.raises(ValueError, match="and 2 were started"):
        Omni("emoji-qwen-image", parallel={"cfg": 1})


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("emoji-z-image", {"ulysses": 2}, "no plan for context parallelism .* of ZImageTransformer2DModel"),
        ("emoji-wan", {"tensor": 2}, "no plan for tensor parallelism of WanTransformer3DModel"),
        ("emoji-qwen-image", {"ulysses": 2}, "ulysses=2 does not divide the 5 attention heads"),
    ],
)
def test_what_diffusers_cannot_do_is_refused_before_loading(model, given, words):
    with pytest.raises(ValueError, match=words):
        Omni(model, parallel=given)


def test_one_rank_needs_no_others():
    omni = Omni(tiny.flux(), parallel={"cfg": 1})
    assert omni.rank == 0


def test_the_command_line_form_is_read():
    assert parse("ulysses=2, cfg=2") == {"ulysses": 2, "cfg": 2}
    assert str(Degrees.of(parse("ulysses=2,uneven=1"))) == "ulysses=2,uneven=1"
    assert Degrees.of({"ulysses": 2, "ring": 2, "cfg": 2}).ranks == 8


@pytest.mark.parametrize("text", ["", "cfg", "cfg=", "cfg=-2", "cfg=2,cfg=2", "cfg=2;ring=2"])
def test_another_command_line_form_is_refused(text):
    with pytest.raises(ValueError, match=r"must be like|twice"):
        parse(text)
