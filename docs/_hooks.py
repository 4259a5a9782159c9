"""What mkdocs makes at build time: tables from the code, and pages from files that lie elsewhere.

The marks, each on a line of its own:

    <!-- keys -->             a section for each cache method, with the table of its keys
    <!-- keys: METHOD -->     that table alone
    <!-- figures: METHOD -->  what `python -m benchmarks.quality` measured of it
    <!-- results: FILE -->    the table in that file of results, which has `columns` and `rows`; FILE PART: of a part
    <!-- schedules -->        what the calibrations of the embedded models have measured
    <!-- budgets -->          the calibrated schedules in the comparison, beside even steps and plain sampling
    <!-- aims -->             the aims of `python -m benchmarks.quality --check`, and what was reached
    <!-- hard: PART -->       a table of the study of hard pictures: stretches, variance, or rules
    <!-- file: PATH -->       the text of that file, without its title

Plots under benchmarks/results are copied into the site.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the plots of results to the site."""
    for path in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"images/{path.name}", content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace the marks."""
    markdown = re.sub(r"<!-- file: (\S+) -->", lambda found: _text(found[1]), markdown)
    markdown = re.sub(r"<!-- keys: (\w+) -->", lambda found: key_table(found[1]), markdown)
    markdown = re.sub(r"<!-- figures: (\w+) -->", lambda found: figures(found[1]), markdown)
    markdown = re.sub(r"<!-- results: (\S+)(?: (\w+))? -->", lambda found: results(*found.groups()), markdown)
    markdown = re.sub(r"<!-- hard: (\w+) -->", lambda found: hard_pictures(found[1]), markdown)
    for mark, made in (("schedules", schedules), ("budgets", budgets), ("aims", aims)):
        markdown = re.sub(f"<!-- {mark} -->", lambda found, made=made: made(), markdown)
    return markdown.replace("<!-- keys -->", keys()) if "<!-- keys -->" in markdown else markdown


def keys() -> str:
    """A section for each cache method: its summary, and a table of its keys."""
    from omni_kernels.patching import backends

    return "\n\n".join(
        f"## {name}\n\n{method.summary}.\n\n{key_table(name)}" for name, method in backends.available().items()
    )


def key_table(name: str) -> str:
    """The keys of one cache method, with default, allowed values and meaning."""
    from omni_kernels.patching import backends

    rows = [
        [f"`{key.name}`", f"`{_cell(json.dumps(key.default, ensure_ascii=False))}`", _cell(key.allowed), _cell(key.doc)]
        for key in backends.available()[name].keys
    ]
    table = _table(["key", "default", "allowed", "meaning"], rows)
    others = getattr(backends.available()[name], "spellings", {})
    told = ", ".join(f"`{other}` for `{key}`" for other, key in others.items())
    return f"{table}\n\nOther names that are taken: {told}." if told else table


def figures(name: str) -> str:
    """The measured runs of one cache method, a tab for each small model.

    Each run stands beside plain sampling with about as many forwards: the nearest number that was measured, the larger
    one if two are as near. Runs of other libraries at the same settings follow ours.
    """
    tabs = []
    for path in sorted(RESULTS.glob("quality-*.json"), key=lambda path: path.stem):
        document = json.loads(path.read_text(encoding="utf-8"))
        if rows := _figures(document, name):
            table = _table(
                ["run", "forwards", "speedup", "PSNR, dB", "p5", "plain sampling with about as many, dB", "p5"], rows
            )
            tabs.append(f'=== "{document["model"]}"\n\n' + textwrap.indent(f"{_how(document)}\n\n{table}", "    "))
    return "\n\n".join(tabs)


def results(name: str, part: str | None = None) -> str:
    """The table of one file of results, or of a named part of it, and the command that made it."""
    document = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    table = document if part is None else document[part]
    return f"{_table(table['columns'], table['rows'])}\n\nMade by `{document['command']}`."


def schedules() -> str:
    """The calibrated schedules of the embedded models, beside the default, evenly spread steps and plain sampling."""
    kinds = ("schedule", "uncalibrated", "evenly spread", "plain sampling")
    head = ["model", "computed steps", *(cell for kind in kinds for cell in (kind, "p5")), "times as fast"]
    rows = []
    for path in sorted((ROOT / "omni_runtime" / "embedded").glob("*/velocity_cache.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["schedules"]:
            even = "even" if row["computed"] == row["start"]["computed"] else ""
            parts = [row[kind] for kind in ("psnr", "uncalibrated", "evenly_spread", "plain_sampling")]
            cells = [text for part in parts for text in (f"{part['mean']:.1f}", f"{part['p5']:.1f}")]
            cells[0] += f" ({even})" * bool(even)
            speedup = "not measured" if row["speedup"] is None else f"{row['speedup']:.2f}"
            rows.append([path.parent.name, str(row["budget"]), *cells, speedup])
    return _table(head, rows)


def _compared() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("quality-*.json"))]


def budgets() -> str:
    """The calibrated schedules on the pictures of the comparison, none of which they were searched on.

    Cells of runs that were not made are empty.
    """
    from omni_runtime.compare.report_html import typical

    kinds = ("uncalibrated", "evenly spread", "plain sampling")
    head = ["model", "of 50 steps", "schedule", "p5", "speedup", *(cell for kind in kinds for cell in (kind, "p5"))]
    rows = []
    for document in _compared():
        runs = {run["name"]: run for run in document["runs"]}
        for budget in (32, 25, 17, 13, 10, 8):
            names = [f"velocity {budget}", *(f"velocity, {one} {budget}" for one in ("uncalibrated", "even"))]
            names.append(f"{budget} steps")
            if names[0] in runs:
                cells = [_psnr(runs[name]) if name in runs else ["", ""] for name in names]
                cells[0].append(f"{typical(runs[names[0]]['speedup']):.2f}×")
                rows.append([document["model"], str(budget), *(cell for group in cells for cell in group)])
    return _table(head, rows)


def aims() -> str:
    """Each aim of the comparison, with the figure of each model; the aim is missed where the figure is marked."""
    found: dict[tuple[str, float], dict[str, str]] = {}
    for document in _compared():
        for one in document["aims"]:
            ours, _, rest = one["what"].partition(" above ")
            theirs, _, statistic = rest.rpartition(", ")
            kind = (
                "even steps"
                if "even" in theirs
                else "plain sampling"
                if theirs.endswith("steps")
                else "caches of blocks"
            )
            words = f"{ours} above {kind}, {statistic}"
            figure = f"{one['figure']:.1f}" + ("" if one["met"] else " (missed)")
            found.setdefault((words, one["at_least"]), {})[document["model"]] = figure
    models = [document["model"] for document in _compared()]
    rows = [[words, f"{least:g}", *(by.get(model, "") for model in models)] for (words, least), by in found.items()]
    return _table(["aim, in dB", "at least", *models], rows)


def hard_pictures(part: str) -> str:
    """A table of `python -m benchmarks.hard_pictures`, for all models that were measured."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("hard-pictures-*.json"))]
    rows = []
    if part == "stretches":
        head = ["model", "skipped steps", "σ", "easy quarter, dB", "hard quarter, dB", "rank correlation"]
        for one in found:
            for row in one["stretches"]:
                (begin, end), (high, low) = row["steps"], row["sigmas"]
                cells = [f"{row[kind]:.1f}" for kind in ("easy", "hard")]
                rows.append([one["model"], f"{begin + 1}–{end - 1}", f"{high:.2f} to {low:.2f}", *cells])
                rows[-1].append(f"{row['correlation']:.2f}")
    elif part == "variance":
        head = ["model", "prompt", "noise", "neither alone", "`turn`", "`bend`"]
        for one in found:
            cells = [f"{100 * one['variance'][kind]:.0f}%" for kind in ("prompt", "seed", "both")]
            rows.append([one["model"], *cells, *(f"{one['correlation'][kind]:.2f}" for kind in ("turn", "bend"))])
    else:
        head = ["model", "steps", "easy / hard", "fixed even", "fixed early", "by `turn`", "by `bend`", "oracle"]
        for one in found:
            for row in one["rules"]:
                which = " / ".join(f"{kind} {count}" for kind, count in (row["easy"], row["hard"]))
                measured = [*row["fixed"].values(), *(row[kind] for kind in ("turn", "bend", "oracle"))]
                cells = [f"{part['mean']:.1f}, {part['p5']:.1f}" for part in measured]
                rows.append([one["model"], str(row["mean_steps"]), which, *cells])
    commands = ", ".join(f"`{one['command']}`" for one in found)
    return f"{_table(head, rows)}\n\nMade by {commands}."


def _figures(document: dict[str, Any], name: str) -> list[list[str]]:
    from omni_runtime.compare.report_html import typical

    runs = document["runs"]
    plain = sorted((run for run in runs if run["method"] == "fewer steps"), key=lambda run: run["nfe"]["mean"])
    ours = [run["name"] for run in runs if run["cache_backend"] == name]
    theirs = {pair["theirs"] for pair in document["pairs"] if pair["ours"] in ours}
    rows = []
    for run in runs:
        if run["name"] in theirs or run["cache_backend"] == name:
            peer = min(plain, key=lambda one: (abs(one["nfe"]["mean"] - run["nfe"]["mean"]), -one["nfe"]["mean"]))
            rows.append(
                [
                    run["name"],
                    f"{run['nfe']['mean']:.0f}",
                    f"{typical(run['speedup']):.2f}×",
                    *_psnr(run),
                    *_psnr(peer, f", {peer['nfe']['mean']:.0f} forwards"),
                ]
            )
    return rows


def _psnr(run: dict[str, Any], note: str = "") -> list[str]:
    psnr = run["psnr"]
    return ["identical", ""] if psnr["mean"] is None else [f"{psnr['mean']:.1f}{note}", f"{psnr['p5']:.1f}"]


def _how(document: dict[str, Any]) -> str:
    full = next(run for run in document["runs"] if run["name"] == "no cache")
    return (
        f"{full['psnr']['identical']} pictures with {len(document['seeds'])} seeds, {full['steps']} steps on a CPU. "
        "A number in a name is a threshold or a budget. PSNR is against the full run: the mean, and the fifth "
        f"percentile (p5). Without a cache, a picture takes {full['nfe']['mean']:.0f} forwards. "
        f"Made by `{document['command']}`."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _text(path: str) -> str:
    _, _, text = (ROOT / path).read_text(encoding="utf-8").partition("\n")
    # Links from a file at the root, as links from a page of the site.
    return re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
