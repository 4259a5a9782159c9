"""The code of docs/guides/several-ranks.md, on the four ranks that it is for, with a small model."""

import functools
import os
import re
from pathlib import Path

import pytest
import tiny
from several_ranks import NEEDED, on_ranks

pytestmark = [*NEEDED, pytest.mark.long]
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "several-ranks.md"


def as_written(directory):
    (code,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    small = {
        '"Qwen/Qwen-Image"': '"model", device="cpu"',
        "seed=0)": "seed=0, num_inference_steps=6, height=64, width=64)",
    }
    for big, stand_in in small.items():
        assert big in code
        code = code.replace(big, stand_in)
    os.chdir(directory)
    space = {"__name__": "__main__"}
    exec(compile(code, str(PAGE), "exec"), space)
    return {"forwards": space["result"].cache.forwards, "rank": space["omni"].rank}


def test_the_code_of_the_page_runs(tmp_path):
    tiny.qwen_image(num_attention_heads=4).save_pretrained(tmp_path / "model")
    results = on_ranks(functools.partial(as_written, str(tmp_path)), tmp_path / "results", ranks=4)
    assert [one.get("rank") for one in results] == [0, 1, 2, 3], results
    assert {one["forwards"] for one in results} == {results[0]["forwards"]}
    assert (tmp_path / "two-cats.png").is_file()
