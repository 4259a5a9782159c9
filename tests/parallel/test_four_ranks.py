"""Four ranks: CFG parallelism together with Ulysses, ring attention or tensor parallelism; failures; torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from several_ranks import NEEDED, free_port, on_ranks
from test_failing_ranks import LIMIT, failing, own_rank, raise_in_a_block, raising, request
from test_guidance import METHODS, off, picture, told
from test_guidance import request as guided

from omni_runtime import Omni

pytestmark = [*NEEDED, pytest.mark.long]

#: Both prompts have an even number of tokens.
EVEN = {"prompt": "two cats", "negative_prompt": "two dogs"}
#: name → (degrees, pipeline, arguments).
KINDS = {
    "ulysses, cfg": ({"ulysses": 2, "cfg": 2}, tiny.qwen_image, EVEN),
    "ring, cfg": ({"ring": 2, "cfg": 2}, tiny.qwen_image, EVEN),
    "tensor, cfg": ({"tensor": 2, "cfg": 2}, tiny.qwen_image, {}),
    "uneven, cfg": ({"ulysses": 2, "cfg": 2, "uneven": True}, tiny.qwen_image, {}),
    "two transformers": ({"ulysses": 2, "cfg": 2}, lambda: tiny.wan(layers=4, two_stages=True), {}),
    "ulysses, ring": ({"ulysses": 2, "ring": 2}, lambda: tiny.wan(layers=4), {}),
}
CHOSEN = (None, "first_block_cache", "cache_dit, F2B1", "velocity_cache", "easy_cache")


def pictures():
    """Each kind of parallelism under each cache, on one rank and on four."""
    found = {}
    for name, (parallel, build, arguments) in KINDS.items():
        for cache in CHOSEN:
            backend, config = METHODS.get(cache, (None, None))
            alone = Omni(build(), cache_backend=backend, cache_config=config)
            together = Omni(build(), cache_backend=backend, cache_config=config, parallel=parallel)
            expected, _ = guided(alone, **arguments)
            made, _ = guided(together, **arguments)
            sums = picture(made).double().sum().item()
            found[f"{name}, {cache}"] = {"off": off(made, expected), "told": [told(expected), told(made)], "sum": sums}
    return found


def failures():
    omni = Omni(tiny.qwen_image(), parallel={"ulysses": 2, "cfg": 2})
    expected = request(omni, **EVEN)
    found = {"on one rank": failing(omni, **EVEN, **raising(KeyError("left"), [3]))}
    hook = raise_in_a_block(omni, 2)
    found["in a block"] = failing(omni, **EVEN)
    hook.remove()
    found["other seeds"] = failing(omni, **EVEN, seed=int(own_rank() == 2))
    found["the next is right"] = torch.equal(request(omni, **EVEN), expected)

    def callback(pipe, index, timestep, tensors):
        if index == 1 and own_rank() == 3:
            os._exit(0)
        return {}

    found["ended"] = failing(omni, **EVEN, callback_on_step_end=callback)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has found."""
    found = on_ranks(pictures, tmp_path_factory.mktemp("ranks"), ranks=4)
    assert "error" not in found[0], found[0]["error"]
    return found


@pytest.mark.parametrize("cache", CHOSEN)
@pytest.mark.parametrize("name", KINDS)
def test_four_ranks_make_the_picture_of_one(ranks, name, cache):
    for rank in ranks:
        one = rank[f"{name}, {cache}"]
        assert one["off"] < 1e-5
        assert one["told"][0] == one["told"][1]
        assert one["sum"] == ranks[0][f"{name}, {cache}"]["sum"]


def test_four_ranks_fail_together(tmp_path):
    *others, last = on_ranks(failures, tmp_path / "ranks", ranks=4)
    assert last is None  # its process has ended
    for rank in others:
        assert rank["on one rank"]["error"] == "RankError: rank 3 raised KeyError: 'left'"
        assert rank["in a block"]["error"] == "RankError: rank 2 raised MemoryError: no memory left for block 0"
        assert "seed: 0 on rank 0 and 1 on rank 2" in rank["other seeds"]["error"]
        assert rank["the next is right"]
        assert rank["ended"]["error"] == "RankError: the process of rank 3 has ended"
        assert max(one["seconds"] for one in rank.values() if isinstance(one, dict)) < LIMIT


def torchrun(ranks, *arguments):
    """Run `omni` on several ranks as a user does. Returns the exit code, stdout and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "omni_runtime", *arguments]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


def test_torchrun_makes_one_file_with_the_picture_of_one_rank(saved, tmp_path):
    arguments = ["generate", "--model", str(saved["qwen_image"]), "--prompt", "two cats", "--steps", "4", "--seed", "3"]
    arguments += ["--negative-prompt", "two dogs", "--size", "64", "--device", "cpu", "--quiet", "--out"]
    code, said, errors = torchrun(4, *arguments, str(tmp_path / "four"), "--parallel", "ulysses=2,cfg=2")
    assert code == 0, errors
    assert said.count(".png") == 1
    done = subprocess.run(
        [sys.executable, "-m", "omni_runtime", *arguments, str(tmp_path / "one")], capture_output=True, check=True
    )
    (four,), (one,) = ([*(tmp_path / name).iterdir()] for name in ("four", "one"))
    made, expected = (torch.tensor([*Image.open(path).convert("RGB").tobytes()]).int() for path in (four, one))
    assert (made - expected).abs().max() <= 1
    assert done.returncode == 0


def test_torchrun_without_parallel_is_refused(tmp_path):
    code, _, errors = torchrun(2, "generate", "--prompt", "a cat", "--out", str(tmp_path))
    assert code != 0
    assert "torchrun has started 2 processes, and each would make the same picture: give --parallel" in errors
    assert not [*tmp_path.iterdir()]
