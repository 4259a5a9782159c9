"""Try every cache, fused blocks, compiled blocks and two ranks on every tiny pipeline; write the table of what works.

    python -m benchmarks.models                           # prints the table
    python -m benchmarks.models --write docs/models.md    # also writes results/models.json and the table into the page
    python -m benchmarks.models --only Wan --methods first_block_cache

Each pipeline has random weights and a few blocks. A cell says "works" only if the cache skips something (the blocks'
calls are counted), the result with nothing skipped equals the unpatched one bit by bit, a request gives the same bits
again after one of another size, and the pipeline gives the same bits as before once the patch is removed. Pictures say
nothing here, because the weights are random.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS

METHODS = (
    "velocity_cache",
    "easy_cache",
    "first_block_cache",
    "cache_dit",
    "mag_cache",
    "tea_cache",
    "sea_cache",
    "fuse",
    "compile",
    "parallel",
    "engine",
)
FILE = RESULTS / "models.json"
COMMAND = "python -m benchmarks.models --write docs/models.md"
BEGIN, END = f"<!-- {COMMAND} -->", "<!-- end of the table -->"
SIGNS = {"works": "✓", "refused": "✗", "nothing": "–", "wrong": "wrong"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write results/models.json, and the table into PAGE")
    parser.add_argument("--only", nargs="+", default=[], help="only pipelines whose name contains one of these")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="only these columns; --write keeps the others"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write needs all rows: leave out --only")
    return options


def prepare() -> None:
    """Called once in each process: one thread, and no messages of the libraries."""
    import logging

    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)


def row(name: str, methods: Sequence[str]) -> dict[str, Any]:
    """All cells of a pipeline, and the classes that it is made of."""
    from benchmarks.models import cells, tiny

    begin = time.perf_counter()
    try:
        model = tiny.build(name)
        trial = cells.Trial(model)
    except Exception as error:
        return {"name": name, "failed": f"{type(error).__name__}: {error}", "cells": {}}
    made = {method: trial.cell(method).to_dict() for method in methods}
    parts = model.pipe.components
    return {
        "name": name,
        "transformer": type(parts.get("transformer")).__name__,
        "scheduler": type(parts.get("scheduler")).__name__,
        "guided": bool(model.guided),
        "steps": model.steps,
        "cells": made,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def rows(names: Sequence[str], methods: Sequence[str], workers: int) -> Iterator[dict[str, Any]]:
    """The rows in the order of the names."""
    if workers == 1:
        prepare()
        for name in names:
            yield row(name, methods)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, prepare) as pool:
        yield from pool.map(row, names, [methods] * len(names))


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Method → in how many pipelines it works."""
    methods = [method for method in METHODS if any(method in one["cells"] for one in found)]
    return {m: sum(one["cells"].get(m, {}).get("state") == "works" for one in found) for m in methods}


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table, with a numbered note for each reason."""
    methods, notes = list(summary(found)), dict[str, int]()

    def cell(one: Mapping[str, Any]) -> str:
        share = f"{one['done']}/{one['of']}" if one["done"] != one["of"] else ""
        note = str(notes.setdefault(one["words"], len(notes) + 1)) if one["words"] else ""
        return " ".join(filter(None, [SIGNS[one["state"]], share, note]))

    lines = [f"| pipeline | {' | '.join(f'`{method}`' for method in methods)} |", "|---" * (len(methods) + 1) + "|"]
    tried = [one for one in found if one["cells"]]
    lines += [f"| {one['name']} | {' | '.join(cell(one['cells'][method]) for method in methods)} |" for one in tried]
    counts = " | ".join(f"**{count}**" for count in summary(found).values())
    lines.append(f"| **works in, of {len(tried)}** | {counts} |")
    return "\n".join([*lines, "", *(f"{number}. {words}" for words, number in notes.items())])


def with_other_columns(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the cells of results/models.json for the methods that were not tried now."""
    before = {one["name"]: one["cells"] for one in json.loads(FILE.read_text(encoding="utf-8"))["rows"]}
    return [
        {**one, "cells": {m: c for m in METHODS if (c := (before.get(one["name"], {}) | one["cells"]).get(m))}}
        for one in found
    ]


def document(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results/models.json holds."""
    versions = {name: metadata.version(name) for name in ("diffusers", "torch", "transformers")}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"command": COMMAND, "date": date, "versions": versions, "works": summary(found), "rows": list(found)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare()
    from benchmarks.models import tiny

    names = [name for name in tiny.names() if not options.only or any(part in name for part in options.only)]
    if not names:
        print(f"no pipeline's name contains {' or '.join(options.only)}", file=sys.stderr)
        return 2
    found = []
    for one in rows(names, options.methods, options.workers):
        found.append(one)
        states = ", ".join(f"{m} {c['state']}" for m, c in one["cells"].items() if c["state"] != "works")
        print(f"{one['name']}: {one.get('failed') or states or 'all work'}", file=sys.stderr, flush=True)
    if options.write and tuple(options.methods) != METHODS:
        found = with_other_columns(found)
    table = markdown(found)
    print(table)
    if options.write:
        FILE.write_text(json.dumps(document(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return (
        1 if any("failed" in one or any(c["state"] == "wrong" for c in one["cells"].values()) for one in found) else 0
    )
