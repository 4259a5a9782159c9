"""Try every cache, fused blocks, compiled blocks and two ranks on every tiny pipeline; write the table of what works.

    python -m benchmarks.models                           # prints the table
    python -m benchmarks.models --write docs/models.md    # also writes results/models.json and the table into the page
    python -m benchmarks.models --only Wan --methods first_block_cache   # with --write, all other cells are kept

Each pipeline has random weights and a few blocks. A cell says "works" only if the cache skips something (the blocks'
calls are counted), the result with nothing skipped equals the unpatched one bit by bit (also with guidance, and in
another size), a request gives the same bits again after one of another size, and the pipeline gives the same bits as
before once the patch is removed. Pictures say nothing here, because the weights are random.

A class of pipelines has a row for each way of using it. It is counted as one in which a method works if it does so in
all of these rows. All classes of diffusers with a transformer are counted, also those of `UNTRIED`.
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
#: Pipelines of diffusers with a transformer that have no row, and why.
UNTRIED = {
    **dict.fromkeys(
        ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "VQDiffusionPipeline"),
        "deprecated by diffusers; its transformer predicts tokens of a codebook, and its scheduler draws some of them",
    ),
    "RFD4ProteinaPipeline": "it designs molecules, and has two schedulers, neither of them under the name `scheduler`",
    "SanaWMLTX2Refiner": "the second stage of SanaWMPipeline: three steps of a distilled model for each few frames",
}
#: So many classes are named in which a method does not work.
SHOWN = 16
SIGNS = {"works": "✓", "refused": "✗", "nothing": "–", "wrong": "wrong"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write results/models.json, and the table into PAGE")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="only pipelines whose name contains one of these; --write keeps the others",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="only these columns; --write keeps the others"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return parser.parse_args(arguments)


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

    try:
        model = tiny.build(name)
        trial = cells.Trial(model)
    except Exception as error:
        return {"name": name, "failed": f"{type(error).__name__}: {error}", "cells": {}}
    made = {}
    for method in methods:
        begin = time.process_time() + trial.elsewhere
        cell = trial.cell(method)
        made[method] = cell.to_dict() | {"seconds": round(time.process_time() + trial.elsewhere - begin, 2)}
    parts = model.pipe.components
    return {
        "name": name,
        "pipeline": type(model.pipe).__name__,
        "transformer": type(parts.get("transformer")).__name__,
        "scheduler": type(parts.get("scheduler")).__name__,
        "guided": bool(model.guided),
        "steps": model.steps,
        "cells": made,
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


def classes() -> list[str]:
    """The pipelines of the installed diffusers that have a transformer, also the modular ones."""
    import inspect

    import diffusers

    found = []
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if not inspect.isclass(kind) or kind is diffusers.ModularPipeline:
            continue
        if issubclass(kind, diffusers.ModularPipeline):
            blocks = getattr(diffusers.modular_pipelines, kind.default_blocks_name or "", None)
            parts = [] if blocks is None else [one.name for one in blocks().expected_components]
        elif issubclass(kind, diffusers.DiffusionPipeline):
            parts = list(inspect.signature(kind.__init__).parameters)
        else:
            continue
        if any("transformer" in part for part in parts):
            found.append(name)
    return found


def lacking(found: Sequence[Mapping[str, Any]], every: Sequence[str]) -> dict[str, list[str]]:
    """Method → the classes of `every` in which it does not work in all rows, or which have no row."""
    tried = {name: [one for one in found if one.get("pipeline") == name] for name in every}
    return {
        method: [
            name
            for name, its in tried.items()
            if not its or any(one["cells"].get(method, {}).get("state") != "works" for one in its)
        ]
        for method in summary(found)
    }


def counts(results: Mapping[str, Any]) -> str:
    """How long the table took, and in how many classes each method works."""
    every, modular = results["classes"], [name for name in results["classes"] if name.endswith("ModularPipeline")]
    untried = [name for name in every if name in UNTRIED]
    times = [cell["seconds"] for one in results["rows"] for cell in one["cells"].values() if "seconds" in cell]
    timed, cells = len(times), sum(len(one["cells"]) for one in results["rows"])
    older = (
        f" The other {cells - timed} are older: they were not tried with guidance and in another size, nor timed."
        if timed < cells
        else ""
    )
    lines = [
        f"{len(results['rows'])} rows. The checks of {timed} of their {cells} cells took {sum(times) / 60:.0f} CPU "
        f"minutes in all; the command uses every core.{older}",
        "",
        f"diffusers {results['versions']['diffusers']} has {len(every)} pipeline classes with a transformer, "
        f"{len(modular)} of them modular. A method works in a class if it works in all of the class's rows:",
        "",
        "| method | works in | of | not in |",
        "|---|---|---|---|",
    ]
    for method, names in results["lacking"].items():
        rest = [name for name in names if name not in UNTRIED]
        shown = ", ".join(rest) if len(rest) <= SHOWN else f"{len(rest)} of the classes that were tried"
        shown += f"{', and ' if shown else ''}the {len(untried)} below" if untried else ""
        lines.append(f"| `{method}` | {len(every) - len(names)} | {len(every)} | {shown} |")
    reasons: dict[str, list[str]] = {}
    for name in untried:
        reasons.setdefault(UNTRIED[name], []).append(name)
    told = [f"- {', '.join(names)}: {why}" for why, names in reasons.items()]
    return "\n".join([*lines, "", "Not tried:", "", *told] if told else lines)


def shown(results: Mapping[str, Any]) -> str:
    """What the page shows between `BEGIN` and `END`."""
    return f"{counts(results)}\n\n{markdown(results['rows'])}"


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table, with a numbered note for each reason."""
    methods, notes = list(summary(found)), dict[str, int]()

    def cell(one: Mapping[str, Any] | None) -> str:
        if one is None:
            return "not tried"
        share = f"{one['done']}/{one['of']}" if one["done"] != one["of"] else ""
        note = str(notes.setdefault(one["words"], len(notes) + 1)) if one["words"] else ""
        return " ".join(filter(None, [SIGNS[one["state"]], share, note]))

    lines = [f"| pipeline | {' | '.join(f'`{method}`' for method in methods)} |", "|---" * (len(methods) + 1) + "|"]
    tried = [one for one in found if one["cells"]]
    lines += [
        f"| {one['name']} | {' | '.join(cell(one['cells'].get(method)) for method in methods)} |" for one in tried
    ]
    counts = " | ".join(f"**{count}**" for count in summary(found).values())
    lines.append(f"| **works in, of {len(tried)}** | {counts} |")
    return "\n".join([*lines, "", *(f"{number}. {words}" for words, number in notes.items())])


def with_others(found: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """All rows: those of results/models.json, with the cells that were tried now in their place."""
    before = {one["name"]: one for one in json.loads(FILE.read_text(encoding="utf-8"))["rows"]}
    now = {one["name"]: one for one in found}
    merged = []
    for name in names:
        old, new = before.get(name, {"cells": {}}), now.get(name, {"cells": {}})
        cells = old["cells"] | new["cells"]
        merged.append({**old, **new, "cells": {m: cells[m] for m in METHODS if m in cells}})
    return merged


def document(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results/models.json holds."""
    every = classes()
    versions = {name: metadata.version(name) for name in ("diffusers", "torch", "transformers")}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "command": COMMAND,
        "date": date,
        "versions": versions,
        "classes": every,
        "works": summary(found),
        "lacking": lacking(found, every),
        "rows": list(found),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare()
    from benchmarks.models import tiny

    every = tiny.names()
    asked = {part for part in options.only if part in every}  # a full name is not also a part of others
    parts = {part for part in options.only if part not in every}
    names = [name for name in every if not options.only or name in asked or any(part in name for part in parts)]
    if not names:
        print(f"no pipeline's name contains {' or '.join(options.only)}", file=sys.stderr)
        return 2
    found = []
    for one in rows(names, options.methods, options.workers):
        found.append(one)
        states = ", ".join(f"{m} {c['state']}" for m, c in one["cells"].items() if c["state"] != "works")
        print(f"{one['name']}: {one.get('failed') or states or 'all work'}", file=sys.stderr, flush=True)
    if not options.write:
        print(markdown(found))
    else:
        if len(names) < len(every) or tuple(options.methods) != METHODS:
            found = with_others(found, every)
        results = document(found)
        print(shown(results))
        FILE.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n\n{shown(results)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return (
        1 if any("failed" in one or any(c["state"] == "wrong" for c in one["cells"].values()) for one in found) else 0
    )
