"""Ranks fail together: the cause is named on all of them, none waits for long, and the next request works.

What every test asserts was computed by two processes (`several_ranks`), at once for all tests but those in which a
process ends.
"""

import os
import time

import pytest
import tiny
import torch
from several_ranks import NEEDED, on_ranks

from omni_runtime import Omni

pytestmark = NEEDED

CFG = {"cfg": 2}
ULYSSES = {"ulysses": 2}
#: An error on one rank must end the others within so many seconds. They have one second to fail by themselves.
LIMIT = 10


def own_rank():
    return int(os.environ["RANK"])


def request(omni, seed=0, **arguments):
    """A request's latents."""
    defaults = tiny.default_arguments(omni.pipe) | {"height": 64, "width": 64, "num_inference_steps": 4}
    with torch.no_grad():
        (result,) = omni.generate(**{"prompt": "two cats", "output_type": "latent"} | defaults | arguments, seed=seed)
    return result.images


def failing(omni, **arguments):
    """What a request raises, and after how long."""
    begin = time.monotonic()
    try:
        request(omni, **arguments)
        error = None
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "seconds": time.monotonic() - begin}


def raising(error, ranks, step=1):
    """A callback that raises on some ranks."""

    def callback(pipe, index, timestep, tensors):
        if index == step and own_rank() in ranks:
            raise error
        return {}

    return {"callback_on_step_end": callback}


def raise_in_a_block(omni, rank):
    """Raise in the third call of the first block, on one rank."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 3 and own_rank() == rank:
            raise MemoryError("no memory left for block 0")

    return omni.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(hook)


def failures(build, parallel, **cache):
    """Each kind of failure, and the request after it."""
    omni = Omni(build(), parallel=parallel, **cache)
    expected = request(omni)
    found = {}

    def fails(name, **arguments):
        found[name] = failing(omni, **arguments)
        found[name]["the next is right"] = torch.equal(request(omni), expected)

    fails("on one rank", **raising(KeyError("left"), [1]))
    fails("on both", **raising(LookupError("both"), [0, 1]))
    fails("interrupted", **raising(KeyboardInterrupt(), [0]))
    hook = raise_in_a_block(omni, 1)
    found["in a block"] = failing(omni)
    hook.remove()
    found["in a block"]["the next is right"] = torch.equal(request(omni), expected)
    fails("other seeds", seed=own_rank())
    fails("other steps", num_inference_steps=4 + own_rank())
    fails("other prompts", prompt=["two cats", "two dogs"][own_rank()])
    fails("other sizes", width=[64, 96][own_rank()])
    fails("other latents", latents=torch.full((1, 16, 64), 1.0 + own_rank()))
    drawn = [omni.generate("two cats", num_inference_steps=2, output_type="latent")[0].seed for _ in range(2)]
    return found | {"drawn": drawn}


def failing_loads():
    """A rank that cannot load the model, and ranks that load different ones."""
    found = {}
    for name, build, arguments in (
        ("a broken model", lambda: None if own_rank() else tiny.qwen_image(), {}),
        ("different models", tiny.qwen_image if own_rank() else tiny.chroma, {}),
        ("different caches", tiny.qwen_image, {"cache_backend": "velocity_cache" if own_rank() else None}),
    ):
        begin = time.monotonic()
        try:
            pipe = build()
            if pipe is None:  # it fails when it is loaded
                pipe = tiny.qwen_image()
                arguments = {"device": "cpu"}
                pipe.to = broken
            Omni(pipe, parallel=CFG, **arguments)
            found[name] = None
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - begin}
    return found


def broken(*_):
    raise OSError("the disk is broken")


def on_a_rank():
    """Everything that is asserted, but for processes that end."""
    found = {
        "cfg": failures(tiny.qwen_image, CFG),
        "ulysses, a cache": failures(
            tiny.qwen_image, ULYSSES, cache_backend="first_block_cache", cache_config={"threshold": 0.2}
        ),
    }
    return found | {"loads": failing_loads()}


def ends_in_a_step(rank):
    """The process of one rank ends within a request. What the others find in it, and in the next one."""
    omni = Omni(tiny.qwen_image(), parallel={"cfg": 2, "ulysses": int(os.environ["WORLD_SIZE"]) // 2})
    request(omni, negative_prompt="two dogs")

    def callback(pipe, index, timestep, tensors):
        if index == 1 and own_rank() == rank:
            os._exit(0)
        return {}

    found = [failing(omni, negative_prompt="two dogs", callback_on_step_end=callback)]
    return [*found, failing(omni, negative_prompt="two dogs")]


def rank_0_ends():
    return ends_in_a_step(0)


def rank_1_ends():
    return ends_in_a_step(1)


def ends_between_requests():
    omni = Omni(tiny.qwen_image(), parallel=CFG)
    request(omni)
    if own_rank() == 1:
        return "done"
    return failing(omni)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has found."""
    found = on_ranks(on_a_rank, tmp_path_factory.mktemp("ranks"))
    assert "error" not in found[0], found[0]["error"]
    return found


@pytest.fixture(params=["cfg", "ulysses, a cache"])
def pair(ranks, request):
    """What each rank has found under one kind of parallelism."""
    return [rank[request.param] for rank in ranks]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("on one rank", "RankError: rank 1 raised KeyError: 'left'"),
        ("in a block", "RankError: rank 1 raised MemoryError: no memory left for block 0"),
    ],
)
def test_an_error_on_one_rank_is_named_on_all_within_a_limit(pair, name, cause):
    for rank in pair:
        assert rank[name]["error"] == cause
        assert rank[name]["seconds"] < LIMIT


def test_the_same_error_on_all_ranks_is_raised_as_it_is(pair):
    for rank in pair:
        assert rank["on both"]["error"] == "LookupError: both"
        assert rank["on both"]["seconds"] < LIMIT


def test_an_interrupted_rank_ends_the_others(pair):
    assert [rank["interrupted"]["error"] for rank in pair] == [
        "KeyboardInterrupt: ",
        "RankError: rank 0 raised KeyboardInterrupt",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other seeds", "seed: 0 on rank 0 and 1 on rank 1"),
        ("other steps", "num_inference_steps: 4 on rank 0 and 5 on rank 1"),
        ("other prompts", 'prompt: "two cats" on rank 0 and "two dogs" on rank 1'),
        ("other sizes", "width: 64 on rank 0 and 96 on rank 1"),
        ("other latents", "latents: a value with digest"),
    ],
)
def test_unlike_requests_are_refused_by_what_differs(pair, name, words):
    for rank in pair:
        assert rank[name]["error"].startswith("ValueError: the ranks were asked for different things: ")
        assert words in rank[name]["error"]
        assert rank[name]["seconds"] < LIMIT


def test_the_request_after_a_failure_is_right(pair):
    for rank in pair:
        assert all(one["the next is right"] for name, one in rank.items() if name != "drawn")


def test_a_seed_that_is_not_given_is_the_same_on_all_ranks(pair):
    assert pair[0]["drawn"] == pair[1]["drawn"]
    assert len(set(pair[0]["drawn"])) == 2


def test_a_rank_that_cannot_load_the_model_ends_the_others(ranks):
    for rank in ranks:
        one = rank["loads"]["a broken model"]
        assert one["error"] == "RankError: rank 1 raised OSError: the disk is broken"
        assert one["seconds"] < LIMIT


@pytest.mark.parametrize(("name", "words"), [("different models", "model: "), ("different caches", "cache_backend: ")])
def test_ranks_that_load_different_things_are_refused(ranks, name, words):
    for rank in ranks:
        assert rank["loads"][name]["error"].startswith("ValueError: the ranks were asked for different things: ")
        assert words in rank["loads"][name]["error"]


@pytest.mark.parametrize(
    ("compute", "count"), [(rank_0_ends, 2), (rank_1_ends, 2), pytest.param(rank_0_ends, 4, marks=pytest.mark.long)]
)
def test_a_process_that_ends_ends_the_others(tmp_path, compute, count):
    ended = 0 if compute is rank_0_ends else 1
    found = on_ranks(compute, tmp_path / "ranks", count)
    assert found.pop(ended) is None
    for rank in found:
        for one in rank:  # its request, and the one after it
            assert one["error"] == f"RankError: the process of rank {ended} has ended"
            assert one["seconds"] < LIMIT


def test_a_rank_that_makes_fewer_requests_is_named(tmp_path):
    first, second = on_ranks(ends_between_requests, tmp_path / "ranks")
    assert second == "done"
    assert first["error"] == "RankError: the process of rank 1 has ended"
    assert first["seconds"] < LIMIT
