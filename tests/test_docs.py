"""README and docs: their code runs, on the embedded model where they name a big one, and their commands exist."""

import json
import re
import runpy
import shlex
from contextlib import ExitStack
from pathlib import Path

import diffusers
import pytest
import torch
from http_server import on_a_port

import omni_kernels
from omni_runtime import Omni, cli
from omni_runtime.cache.methods import METHODS
from omni_runtime.cli.options import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: the server that the guide starts
SERVER = "http://127.0.0.1:8000"
#: what stands for a big model on a GPU
STAND_INS = {"Qwen/Qwen-Image": "emoji-qwen-image", '"cuda"': '"cpu"', "height=1024, width=1024": "height=64, width=64"}


def blocks(page, language):
    """(line, text) of each block of that language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^( *)```{language}[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, one.start()) + 2, one[2]) for one in found]


def names(page):
    return str(page.relative_to(ROOT))


def with_code(language):
    return [pytest.param(page, id=names(page)) for page in PAGES if blocks(page, language)]


@pytest.fixture
def loaded(monkeypatch):
    """The embedded model; its pipeline makes pictures of its own size when it is not told one."""
    pipe = Omni("emoji-qwen-image", cache_backend=None).pipe
    omni_kernels.unpatch(pipe)
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    return pipe


@pytest.mark.parametrize("page", with_code("python"))
def test_the_code_of_a_page_runs(page, loaded, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    space = {"pipe": loaded, "__name__": "page"}
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        server = SERVER
        if any(SERVER in code for _, code in blocks(page, "python")):
            omni = Omni("emoji-qwen-image", cache_backend="velocity_cache")
            server, _ = stack.enter_context(on_a_port(omni))
        for line, code in blocks(page, "python"):
            code = code.replace(SERVER, server)
            for big, small in STAND_INS.items():
                code = code.replace(big, small)
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), space)


@pytest.mark.parametrize("page", with_code("console"))
def test_the_commands_of_a_page_exist(page):
    for line, text in blocks(page, "console"):
        for command in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command, comments=True) or ["#"]
            if program == "torchrun" and "omni_runtime" in arguments:
                program, arguments = "omni", arguments[arguments.index("omni_runtime") + 1 :]
            if program == "omni" and not {"--help", "--version"} & set(arguments):
                assert parser().parse_args(arguments).command, f"{page}:{line}"
            elif program == "make":
                targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert {a for a in arguments if "=" not in a} <= set(targets), f"{page}:{line}"
            elif program.startswith("python") and arguments[0] == "-m":
                place = ROOT / arguments[1].replace(".", "/")
                known = place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
                assert known or arguments[1] in ("pytest", "venv"), f"{page}:{line}"


#: What makes a command of the docs a small one: an option → what stands for its value.
SMALL = {"--steps": "6", "--budgets": "3", "--size": "64", "--fewer-steps": "3", "--seeds": "0", "--tries": "8"}
MODELS = {"Qwen/Qwen-Image": "emoji-qwen-image", "DIRECTORY": "emoji-qwen-image"}
MODELS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"] = "emoji-wan"
#: Words of commands that need a server, several processes, another device, or a plug-in.
ELSEWHERE = {"serve", "--workers", "npu", "every_nth", 'mine=every_nth:{"n": 3}', "--help", "--version"}


def small(arguments):
    """The same command on an embedded model, with few steps; None if it needs what a test has not."""
    if ELSEWHERE & set(arguments):
        return None
    found = [MODELS.get(one, one) for one in arguments if one != "--fewer-steps"]
    for place, one in enumerate(arguments):
        if one == "--fewer-steps":
            found.remove(arguments[place + 1])
    for place, one in enumerate(found[:-1]):
        if one in SMALL:
            found[place + 1] = SMALL[one]
        if one == "--cache-config":
            found[place + 1] = re.sub(r'"budget": \d+', '"budget": 3', found[place + 1])
    found = ["num_frames=9" if one.startswith("num_frames=") else one for one in found]
    takes = found[0] in ("generate", "compare", "calibrate", "batch", "explain")
    more = [] if not takes or "--steps" in found else ["--steps", SMALL["--steps"]]
    return [
        *found,
        *more,
        *(["--min-width", "64"] if found[:2] == ["calibrate", "precision"] and "--min-width" not in found else []),
        *(["--budgets", "3"] if found[:2] == ["calibrate", "schedule"] and "--budgets" not in found else []),
    ]


@pytest.mark.long
@pytest.mark.parametrize("page", with_code("console"))
def test_the_commands_of_a_page_run(page, monkeypatch, tmp_path, capsys):
    """In order, in one directory; on embedded models, with few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    prompts = [
        f"{what} on {where}" for what in ("a cat", "a fox", "red apple") for where in ("blue", "red", "pink", "white")
    ]
    Path("prompts.txt").write_text("\n".join(prompts))
    Path("others.txt").write_text("a rocket\na tulip")
    rows = blocks(page, "json") if page.stem == "batch" else []
    Path("prompts.jsonl").write_text(rows[0][1] if rows else '{"prompt": "a cat", "seed": 1}\n')
    for line, text in blocks(page, "console"):
        for command in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command, comments=True) or ["#"]
            arguments = small(arguments) if program == "omni" else None
            if arguments is not None:
                code = cli.main(arguments)
                assert code == 0, f"{page}:{line}: {command}\n{capsys.readouterr().err[-500:]}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(lines))
    assert all(link.startswith("https://") for link in links), "a package index shows it away from the repository"
    site = re.search(r"^site_url: (.*)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    pages = [link.removeprefix(site).partition("#")[0] for link in links if link.startswith(site) and link != site]
    assert pages
    missing = [page for page in pages if not (ROOT / "docs" / page).with_suffix(".md").is_file() or ".html" not in page]
    assert missing == [], "pages of the site end in .html (use_directory_urls)"


def test_every_extra_is_told():
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = extras.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    page = (ROOT / "docs" / "get-started" / "install.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert sorted(told) == sorted(re.findall(r"^([a-z-]+) = \[", extras, re.MULTILINE))


def test_every_key_of_every_method_is_in_the_reference():
    pytest.importorskip("mkdocs")
    text = runpy.run_path(str(ROOT / "docs" / "_hooks.py"))["keys"]()
    for name, method in METHODS.items():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert [key.name for key in method.keys] == re.findall(r"^\| `(\w+)`", section, re.MULTILINE)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page_with_its_figures(method):
    pytest.importorskip("mkdocs")
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)", page, re.MULTILINE)
    assert [one.rstrip("s") for one in headings if not one.startswith("Which")] == [
        "Formula",
        "When to use it",
        "Key",
        "Figure",
        "Source",
    ]
    assert f"<!-- keys: {method} -->" in page
    assert f"<!-- figures: {method} -->" in page
    assert f"({method}.md)" in (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")


def test_the_figures_of_a_method_are_those_of_the_results():
    pytest.importorskip("mkdocs")
    text = runpy.run_path(str(ROOT / "docs" / "_hooks.py"))["figures"]("tea_cache")
    runs = json.loads((ROOT / "benchmarks/results/quality-emoji-z-image.json").read_text(encoding="utf-8"))["runs"]
    by_name = {run["name"]: run for run in runs}
    ours, plain = by_name["TeaCache + Newton 0.05"], by_name["25 steps"]  # 25 forwards
    cells = [ours["name"], "25", f"{ours['speedup']['mean']:.2f}×", f"{ours['psnr']['mean']:.1f}"]
    tab = text.partition('=== "emoji-z-image"')[2]
    assert f"| {' | '.join(cells)} |" in tab
    assert f"| {plain['psnr']['mean']:.1f}, 25 forwards |" in tab
    assert "`python -m benchmarks.quality --model emoji-z-image`" in tab


def test_the_address_of_the_project_is_the_same_everywhere():
    urls = dict(re.findall(r'^(\w+) = "(https://[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"site_url: {urls['Documentation']}\n" in site
    assert f"repo_url: {urls['Repository']}\n" in site


def test_every_message_of_troubleshooting_is_one_of_the_code():
    code = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for package in ("omni_kernels", "omni_runtime")
        for path in (ROOT / package).rglob("*.py")
    )
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for part in re.split(r"…|\d", message):
            assert part.strip(" '") in code, message
