"""The examples: each runs offline on a small model, and prints what its docstring says."""

import ast
import doctest
import re
import runpy
import sys
import textwrap
from pathlib import Path

import loopback
import pytest
import torch
from http_server import on_a_port

from omni_runtime import Omni
from omni_runtime.cache.methods import METHODS
from omni_runtime.cache.models import MODELS

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
#: Needs processes of its own, or a server.
ELSEWHERE = ("batch_on_ray", "server_client")


def source(name):
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def told(name):
    """What the docstring says that the example prints; … stands for anything."""
    docstring = ast.get_docstring(ast.parse(source(name)))
    before, _, lines = docstring.rpartition(":\n\n    ")
    anything = "…\n" * bool(re.search(r"It prints .*, and then$", before, re.DOTALL))
    return anything + textwrap.dedent(f"    {lines}\n")


def assert_printed(name, printed):
    wanted = told(name).replace("…", "...")
    assert doctest.OutputChecker().check_output(wanted, printed, doctest.ELLIPSIS), f"{wanted}\n---\n{printed}"
    for found in re.finditer(r"(\d+).*; expect (?:more than|at least) (\d+)", printed):
        last = re.findall(r"\d+", found[0].partition(";")[0])
        assert max(map(int, last)) > int(found[2]), found[0]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A folder for the example, which may add methods and models to the tables."""
    monkeypatch.chdir(tmp_path)
    tables = [(table, dict(table)) for table in (METHODS, MODELS)]
    with torch.random.fork_rng(devices=[]):
        yield
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ELSEWHERE])
def test_an_example_prints_what_it_says(name, alone, capsys):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert_printed(name, capsys.readouterr().out)


def test_the_client_prints_what_it_says(alone, capsys, monkeypatch):
    with on_a_port(Omni("emoji-qwen-image", cache_backend="velocity_cache")) as (address, _):
        monkeypatch.setattr(sys, "argv", ["server_client.py", address])
        runpy.run_path(str(FOLDER / "server_client.py"), run_name="__main__")
    assert_printed("server_client", capsys.readouterr().out)


@pytest.mark.long
@pytest.mark.skipif(bool(loopback.missing()), reason=loopback.missing() or "-")
def test_the_batch_prints_what_it_says(tmp_path):
    pytest.importorskip("ray")
    process = loopback.start([str(FOLDER / "batch_on_ray.py")], tmp_path, cwd=tmp_path)
    try:
        assert process.wait(300) == 0, (tmp_path / "err.txt").read_text()
    finally:
        loopback.end(process)
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert sorted(lines) == sorted(told("batch_on_ray").splitlines())
    assert lines[-1] == told("batch_on_ray").splitlines()[-1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_tells_of_the_full_size(name):
    text = source(name)
    assert len(text.splitlines()) <= 110, "read at once"
    assert f"python examples/{name}.py" in text
    assert "full-size" in ast.get_docstring(ast.parse(text))


def test_the_documents_name_examples_that_exist():
    root = FOLDER.parent
    texts = [path.read_text(encoding="utf-8") for path in [root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]]
    named = {name for text in texts for name in re.findall(r"examples/(\w+)\.py", text)}
    assert named <= set(EXAMPLES)
    assert {"method_in_30_lines", "server_client", "quantised"} <= named
