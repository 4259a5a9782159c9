"""Mutation testing: changes one place of the source at a time, and reports the changes that no test notices.

    python tests/mutants.py omni_runtime/cache omni_kernels/patching --sample 200 --seed 0 --workers 2

Run it from the root of a checkout. First, the tests (here tests/cache and tests/patching, or those of `--tests`) run
once, to record which lines each test reaches. Then mutants are drawn. For each mutant, a copy of the tree is changed,
and the tests that reach the changed lines run, the shortest first, until one fails. The tree itself is never changed.

A mutant replaces one of < <= > >= == != by its neighbour or its opposite, + by − and * by / (and the reverse), `and` by
`or` (and the reverse), removes a `not`, swaps True and False or 0 and 1, returns None instead of a value, or removes a
call statement such as `history.clear()`. Annotations, decorators, f-strings, `raise` statements and warnings are not
changed.

`--journal FILE` (mutants.jsonl) has one line per mutant, and FILE.lines has the lines that each test reaches. If both
exist, the same command continues where it stopped. Delete FILE.lines when tests change, and both when the source
changes. At the end, the surviving mutants are printed, including those that no test reaches, those that ran out of
time, and the score. A mutant that ran out of time counts as noticed.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

_COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
}  # fmt: skip
_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
RECORD, FOLDERS, SELECT = "MUTANTS_RECORD", "MUTANTS_FOLDERS", "MUTANTS_SELECT"  # for the tests' processes


class Mutant(NamedTuple):
    """Bytes [start, end) of a file become `new`.

    A test that runs one of the lines `reach` reaches the mutant. None: the code runs at import, so every test does.
    """

    file: str
    line: int
    reach: range | None
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.old} → {self.new} @{self.start}"


def changed(node: Any) -> Iterator[ast.AST]:
    """Yield the nodes that replace `node`, one for each mutant."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            for other in _COMPARISONS.get(type(operator), ()):
                yield ast.Compare(node.left, [*node.ops[:index], other(), *node.ops[index + 1 :]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        if not any(isinstance(side, ast.JoinedStr) or _is(side, str) for side in (node.left, node.right)):
            yield ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif _is(node, bool, int) and node.value in (0, 1):  # including True and False
        yield ast.Constant(type(node.value)(1 - node.value))
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def _is(node: ast.AST, *kinds: type) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in kinds


def visited(node: Any, reach: range | None = None, inside: bool = False) -> Iterator[tuple[Any, range | None]]:
    """Yield the nodes that run and may be changed, each with the lines of its statement, without nested statements."""
    if isinstance(node, ast.stmt) and inside:
        last = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno
        reach = range(node.lineno, max(node.lineno, last or 0) + 1)
    yield node, reach
    inside = inside or isinstance(node, ast.FunctionDef)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if name in ("annotation", "returns", "decorator_list") or not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.Expr) and ast.unparse(child).startswith("warnings.warn("):
                continue
            if not isinstance(child, ast.Raise | ast.JoinedStr):
                yield from visited(child, reach, inside)


def mutants_of(root: Path, file: Path) -> Iterator[Mutant]:
    """All mutants of a source file."""
    source = file.read_bytes()
    starts = list(itertools.accumulate((len(line) for line in source.splitlines(keepends=True)), initial=0))
    for node, reach in visited(ast.parse(source)):
        for mutated in changed(node):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            new = ast.unparse(ast.fix_missing_locations(mutated))
            new = f"({new})" if isinstance(mutated, ast.expr) and not isinstance(mutated, ast.Constant) else new
            old = " ".join(source[start:end].decode().split())
            yield Mutant(file.relative_to(root).as_posix(), node.lineno, reach, start, end, old, new)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """As a pytest plugin in the tests' processes: keep only the selected tests, in the selected order."""
    if SELECT in os.environ:
        wanted = {name: place for place, name in enumerate(json.loads(Path(os.environ[SELECT]).read_text()))}
        items[:] = sorted((item for item in items if item.nodeid in wanted), key=lambda item: wanted[item.nodeid])


def pytest_configure(config: Any) -> None:
    """Start recording lines, if that is requested."""
    if RECORD in os.environ:
        config.pluginmanager.register(_Recorder())


class _Recorder:
    """Writes, for each test that passes: its name, its seconds, and the lines that it reached, by file."""

    def __init__(self) -> None:
        self.folders = tuple(os.environ[FOLDERS].split(os.pathsep))
        self.seen: set[tuple[str, int]] = set()
        self.start = 0.0
        threading.settrace(self.trace)

    def trace(self, frame: Any, *event: Any) -> Any:
        return self.line if frame.f_code.co_filename.startswith(self.folders) else None

    def line(self, frame: Any, *event: Any) -> Any:
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line

    def pytest_runtest_setup(self, item: Any) -> None:
        self.seen, self.start = set(), time.monotonic()
        sys.settrace(self.trace)  # again, because a test may have removed the trace function

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            lines: dict[str, list[int]] = {}
            for file, line in sorted(self.seen):
                lines.setdefault(os.path.relpath(file), []).append(line)
            passed = {"test": report.nodeid, "seconds": time.monotonic() - self.start, "lines": lines}
            with open(os.environ[RECORD], "a", encoding="utf-8") as out:
                out.write(json.dumps(passed) + "\n")


def run_tests(tree: Path, files: list[str], limit: float | None, **environment: str) -> Any:
    """Run pytest in a copy of the tree, with this file as its plugin."""
    own = {"PYTHONPATH": str(tree / "tests"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-p", "mutants", "-p", "no:xdist", "--basetemp", str(tree / "basetemp"), "--tb", "no"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(["-x"] if SELECT in environment else []), *files],
        cwd=tree, env=os.environ | own | environment, capture_output=True, text=True, timeout=limit,
    )  # fmt: skip


def record(tree: Path, folders: list[str], tests: list[str], target: Path) -> None:
    """Run the tests once, and save the lines that each reaches."""
    watched = os.pathsep.join(str(tree / folder) for folder in folders)
    done = run_tests(tree, tests, None, **{RECORD: str(tree / "lines"), FOLDERS: watched})
    if not (tree / "lines").is_file():
        raise SystemExit(f"no test passed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = sum(line.startswith(("FAILED", "ERROR")) for line in done.stdout.splitlines())
    print(f"recorded which tests reach each line; {failed} tests failed, and are not used", flush=True)
    shutil.move(tree / "lines", target)


def judge(tree: Path, mutant: Mutant, reached: list[dict[str, Any]], most: float) -> dict[str, Any]:
    """Run the tests that reach a mutant (all tests, if its code runs at import), and return the outcome."""
    lines = None if mutant.reach is None else set(mutant.reach)
    tests = [one for one in reached if lines is None or lines.intersection(one["lines"].get(mutant.file, ()))]
    if not tests:
        return {"outcome": "not reached", "by": ""}
    tests.sort(key=lambda one: one["seconds"])
    selected, file = tree / "selected.json", tree / mutant.file
    selected.write_text(json.dumps([one["test"] for one in tests]))
    source = file.read_bytes()
    file.write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])
    limit = min(most, 120 + 10 * sum(one["seconds"] for one in tests))
    try:
        files = {one["test"].partition("::")[0] for one in tests}
        done = run_tests(tree, sorted(files), limit, **{SELECT: str(selected)})
        outcome, by = "killed" if done.returncode else "survived", done.stdout.strip()[-300:]
    except subprocess.TimeoutExpired:
        outcome, by = "timeout", f"{limit:.0f} s"
    finally:
        file.write_bytes(source)
    return {"outcome": outcome, "by": by}


def run(root: Path, asked: argparse.Namespace) -> None:
    """Record the lines, draw mutants, judge them, and print the survivors and the score."""
    files = [file for name in asked.sources for file in sorted((root / name).rglob("*.py")) or [root / name]]
    everything = [mutant for file in files for mutant in mutants_of(root, file)]
    sample = random.Random(asked.seed).sample(everything, min(asked.sample, len(everything)))
    lines = asked.journal.with_name(asked.journal.name + ".lines")
    known = asked.journal.read_text(encoding="utf-8").splitlines() if asked.journal.is_file() else []
    outcomes = {one["mutant"]: one for one in map(json.loads, known)}
    left = [mutant for mutant in sample if str(mutant) not in outcomes]
    print(f"{len(sample)} of {len(everything)} mutants, {len(left)} of them not judged yet", flush=True)
    ignore = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "*.egg-info", ".*_cache")
    free: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as scratch, asked.journal.open("a", encoding="utf-8") as out:
        for number in range(asked.workers):
            free.put(shutil.copytree(root, Path(scratch) / f"tree{number}", ignore=ignore))
        if not lines.is_file():
            tests = asked.tests or [f"tests/{Path(name).parts[1]}" for name in asked.sources]
            record(Path(scratch) / "tree0", asked.sources, tests, lines)
        reached = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]

        def one(mutant: Mutant) -> None:
            tree = free.get()
            try:
                outcomes[str(mutant)] = {"mutant": str(mutant), **judge(tree, mutant, reached, asked.limit)}
            finally:
                free.put(tree)
            out.write(json.dumps(outcomes[str(mutant)], ensure_ascii=False) + "\n")
            out.flush()

        with ThreadPoolExecutor(asked.workers) as pool:
            list(pool.map(one, left))
    found = [outcomes[str(mutant)] for mutant in sample]
    others = [f"{one['outcome']}: {one['mutant']}" for one in found if one["outcome"] != "killed"]
    noticed = sum(one["outcome"] in ("killed", "timeout") for one in found)
    print("\n".join([*sorted(others), f"score: {noticed} of {len(found)} mutants were noticed"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("sources", nargs="+", help="folders or files, from the root of the tree")
    parser.add_argument("--sample", type=int, default=200, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument(
        "--tests", nargs="+", help="test files or folders (default: the folders in tests/ with the same names)"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of mutants at the same time")
    parser.add_argument("--limit", type=float, default=600.0, help="largest number of seconds for a mutant")
    parser.add_argument("--journal", type=Path, default=Path("mutants.jsonl"), help="the file of outcomes")
    run(Path.cwd(), parser.parse_args())
