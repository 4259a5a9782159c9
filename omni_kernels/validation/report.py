"""Reports of a validation: tables in plain text, and one self-contained HTML file.

Both are made from the document in `validation.json`. Missing measurements are shown as "not measured".
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

Document = Mapping[str, Any]

NOT_MEASURED = "not measured"
STATUSES = ("passed", "failed", "not run")


def by_op(document: Document) -> dict[str, dict[str, Counter[str]]]:
    """op → dtype → number of checks with each status."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for check in document["checks"]:
        found.setdefault(check["op"], {}).setdefault(check["dtype"], Counter())[check["status"]] += 1
    return found


def speeds(document: Document) -> list[dict[str, Any]]:
    """The measurements of our ops, each with the time of plain torch."""
    plain = {(m["case"], m["shape"]): m["us"] for m in document["measurements"] if m["provider"] == "eager"}
    return [
        {**m, "plain_us": plain.get((m["case"], m["shape"]))}
        for m in document["measurements"]
        if m["provider"] == "ours"
    ]


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number as text for a table cell."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}{unit}"


def _rows(document: Document) -> list[tuple[str, ...]]:
    """One row per op: its checks by dtype, and its lowest and highest share of the roof."""
    shares: dict[str, list[float]] = {}
    for m in speeds(document):
        shares.setdefault(m["op"], []).append(m["share"])
    rows = []
    for op, dtypes in by_op(document).items():
        cells = []
        for dtype in ("float32", "float16", "bfloat16"):
            count = dtypes.get(dtype, Counter[str]())
            done = count["passed"] + count["failed"]
            cells.append(f"{count['passed']}/{done}" if done else "not run")
        ends = dict.fromkeys(f"{share:.0%}" for share in sorted(shares.get(op, ())))
        cells.append(" to ".join([*ends][:: max(1, len(ends) - 1)]) or NOT_MEASURED)
        rows.append((op, *cells))
    return rows


HEADS = ("op", "fp32", "fp16", "bf16", "of roof")
FIRST_CALLS = ("kernel, at its first call", "variants", "s to compile one", "s for all")


def text(document: Document) -> str:
    """The tables at the end of a run: what passed, what was measured, what was compiled, what failed."""
    parts = []
    if document["checks"]:
        parts.append(_aligned([HEADS, *_rows(document)]))
    measured = speeds(document)
    if measured:
        heads = ("case", "shape", "GB/s", "of roof", "µs", "plain torch µs")
        rows = [
            (m["case"], m["shape"], number(m["gb_per_s"]), f"{m['share']:.0%}", number(m["us"]), number(m["plain_us"]))
            for m in measured
        ]
        parts.append(_aligned([heads, *rows]))
    if document["first_calls"]:
        parts.append(_aligned([FIRST_CALLS, *_first_calls(document)]))
    if document["compiled"]:
        parts.append(_aligned([("launch", "target", "registers", "shared", "spills"), *_compiled(document)]))
    failures = [c for c in document["checks"] if c["status"] == "failed"]
    parts += [f"FAILED {c['id']} (seed {document['seed']})\n  {c['problem']}\n  {c['repeat']}" for c in failures]
    for c in document["compiled"]:
        if c["error"] or c["spills"]:
            parts.append(f"FAILED {c['launch']} for {c['target']}\n  {c['error'] or 'spills registers to memory'}")
    parts.append(verdict(document))
    return "\n\n".join(parts)


def verdict(document: Document) -> str:
    """The verdict, with the counts and the speed, in one line."""
    count = Counter(check["status"] for check in document["checks"])
    told = [f"{count[status]} {status}" for status in STATUSES if count[status]]
    if document["unchecked"]:
        told.append(f"never checked: {', '.join(document['unchecked'])}")
    if document["compiled"]:
        wrong = sum(bool(c["error"] or c["spills"]) for c in document["compiled"])
        told.append(f"{len(document['compiled'])} launches compiled, {wrong} of them with errors or spills")
    if document["not_compiled"]:
        told.append(f"{document['not_compiled']} not compiled for lack of time")
    roof = document["copy_gb_per_s"]
    speed = (
        f"copy bandwidth {roof:.1f} GB/s" if roof is not None else f"speed {NOT_MEASURED}: {document['not_measured']}"
    )
    if roof is not None and document["not_measured"]:
        speed += f"; {NOT_MEASURED}: {document['not_measured']}"
    return f"{document['verdict'].upper()}: {', '.join(told)}; {speed}"


def _first_calls(document: Document) -> list[tuple[str, ...]]:
    """The compile times that a kernel's first calls wait for: the median of its variants, and the sum."""
    return [
        (name, str(len(each)), f"{statistics.median(each):.2f}", f"{sum(each):.1f}")
        for name, each in sorted(document["first_calls"].items())
    ]


def _compiled(document: Document) -> list[tuple[str, ...]]:
    """One row per launch: the most registers and shared memory of any of its kernels, and their spills."""
    return [
        (
            c["launch"],
            c["target"],
            *("error" if c["error"] else str(c[key]) for key in ("registers", "shared", "spills")),
        )
        for c in document["compiled"]
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def page(document: Document) -> str:
    """The HTML file, from the template page.html.jinja."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    checks: dict[tuple[str, str], list[Mapping[str, str]]] = {}  # by use and shape
    for check in document["checks"]:
        checks.setdefault((check["case"], check["shape"]), []).append(check)
    return environment.get_template("page.html.jinja").render(
        document=document,
        title=f"Omni Kernels on {document['machine']['name']}: {document['verdict']}",
        verdict=verdict(document),
        facts=_facts(document).items(),
        failures=[check for check in document["checks"] if check["status"] == "failed"],
        heads=HEADS,
        results=_rows(document),
        speeds=[_speed(m) for m in speeds(document)],
        first_calls_heads=FIRST_CALLS,
        first_calls=_first_calls(document),
        compiled=_compiled(document),
        checks=checks,
    )


def _facts(document: Document) -> dict[str, Any]:
    about = dict(document["machine"])
    versions = about.pop("versions")
    return {
        "device": document["device"],
        "ops run as": document["implementation"],
        **{key.replace("_", " "): "not known" if value is None else value for key, value in about.items()},
        **{name: value or "not installed" for name, value in versions.items()},
        **{key: document[key] for key in ("command", "seed", "date", "seconds")},
    }


def _speed(m: Mapping[str, Any]) -> dict[str, str]:
    """The measurements of one use, formatted for the page."""
    return {
        "case": m["case"],
        "shape": m["shape"],
        "gb_per_s": number(m["gb_per_s"]),
        "width": f"{min(m['share'], 1):.0%}",
        "share": f"{m['share']:.0%}",
        "us": number(m["us"]),
        "plain_us": number(m["plain_us"]),
        "as_fast": NOT_MEASURED if m["plain_us"] is None else f"{m['plain_us'] / m['us']:.2f}×",
    }
