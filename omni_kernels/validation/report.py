"""What a validation found, for reading: tables in plain text, and one HTML file that holds all and fetches nothing.

Both are made of the document that `validation.json` holds. What was not measured says so.
"""

from __future__ import annotations

import html
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]

NOT_MEASURED = "not measured"
STATUSES = ("passed", "failed", "not run")

STYLE = """
:root{color-scheme:light dark;--line:#8884;--bad:#c62828;--good:#2e7d32;--bar:#4a7fb5}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:.5rem 0 1.5rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right}code{font-size:.9em;overflow-wrap:anywhere}
.failed{color:var(--bad);font-weight:600}.passed{color:var(--good)}.missing{opacity:.6}
.bar{background:var(--line);width:8rem;height:.7rem}.bar i{display:block;height:100%;background:var(--bar)}
"""


def by_op(document: Document) -> dict[str, dict[str, Counter[str]]]:
    """op → dtype → how many checks of each status."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for check in document["checks"]:
        found.setdefault(check["op"], {}).setdefault(check["dtype"], Counter())[check["status"]] += 1
    return found


def speeds(document: Document) -> list[dict[str, Any]]:
    """What was timed, ours with the time of plain torch beside it."""
    plain = {(m["case"], m["shape"]): m["us"] for m in document["measurements"] if m["provider"] == "eager"}
    return [
        {**m, "plain_us": plain.get((m["case"], m["shape"]))}
        for m in document["measurements"]
        if m["provider"] == "ours"
    ]


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """For a cell of a table."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}{unit}"


def _rows(document: Document) -> list[tuple[str, ...]]:
    """Per op: its checks by dtype, and its fastest and slowest share of the roof."""
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
    """In one or two lines."""
    count = Counter(check["status"] for check in document["checks"])
    told = [f"{count[status]} {status}" for status in STATUSES if count[status]]
    if document["unchecked"]:
        told.append(f"never checked: {', '.join(document['unchecked'])}")
    if document["compiled"]:
        wrong = sum(bool(c["error"] or c["spills"]) for c in document["compiled"])
        told.append(f"{len(document['compiled'])} launches compiled, {wrong} of them with errors or spills")
    if document["not_compiled"]:
        told.append(f"{document['not_compiled']} not compiled for want of time")
    roof = document["copy_gb_per_s"]
    speed = (
        f"copy bandwidth {roof:.1f} GB/s" if roof is not None else f"speed {NOT_MEASURED}: {document['not_measured']}"
    )
    if roof is not None and document["not_measured"]:
        speed += f"; {NOT_MEASURED}: {document['not_measured']}"
    return f"{document['verdict'].upper()}: {', '.join(told)}; {speed}"


def _first_calls(document: Document) -> list[tuple[str, ...]]:
    """What a kernel's first call waits for: the median of its variants, and all of them."""
    return [
        (name, str(len(each)), f"{statistics.median(each):.2f}", f"{sum(each):.1f}")
        for name, each in sorted(document["first_calls"].items())
    ]


def _compiled(document: Document) -> list[tuple[str, ...]]:
    """The most that any kernel of a launch takes."""
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
    """The HTML file."""
    about = document["machine"]
    sections = [
        ("Device", _facts(document)),
        ("Failures", _failures(document)),
        ("Results", _table(HEADS, _rows(document), numbers=0) if document["checks"] else "<p>not run</p>"),
        ("Speed", _speed(document)),
        ("First calls", _first_calls_table(document)),
        ("Compiled ahead of time", _compiled_table(document)),
        ("Every check", _checks(document)),
    ]
    title = f"Omni Kernels on {about['name']}: {document['verdict']}"
    body = "\n".join(f"<section><h2>{head}</h2>\n{content}\n</section>" for head, content in sections if content)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p class="{document["verdict"]}">{_text(verdict(document))}</p>
{body}
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]], numbers: int = 1, raw: bool = False) -> str:
    """`numbers`: the first column that is aligned to the right; `raw`: cells are HTML already."""

    def line(cells: Iterable[str], tag: str, escape: Any) -> str:
        return "".join(
            f"<{tag}{' class=n' if numbers and j >= numbers else ''}>{escape(cell)}</{tag}>"
            for j, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{line(row, 'td', str if raw else _text)}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{line(heads, 'th', _text)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _facts(document: Document) -> str:
    about = dict(document["machine"])
    versions = about.pop("versions")
    facts = {
        "device": document["device"],
        "ops run as": document["implementation"],
        **{key.replace("_", " "): "not known" if value is None else value for key, value in about.items()},
        **{name: value or "not installed" for name, value in versions.items()},
        "command": document["command"],
        "seed": document["seed"],
        "date": document["date"],
        "seconds": document["seconds"],
    }
    return _table(("what", "found"), [(key, str(value)) for key, value in facts.items()], numbers=0)


def _failures(document: Document) -> str:
    rows = [
        [
            f"<code>{_text(c['id'])}</code>",
            _text(c["problem"]),
            f"<code>{_text(c['repeat'])}</code>",
        ]
        for c in document["checks"]
        if c["status"] == "failed"
    ]
    return _table(("check", "what is wrong", "repeat"), rows, numbers=0, raw=True) if rows else ""


def _speed(document: Document) -> str:
    roof = document["copy_gb_per_s"]
    if roof is None:
        return f"<p>{NOT_MEASURED}: {_text(document['not_measured'])}</p>"
    rows = [
        [
            _text(m["case"]),
            _text(m["shape"]),
            number(m["gb_per_s"]),
            f'<div class="bar"><i style="width:{min(m["share"], 1):.0%}"></i></div>',
            f"{m['share']:.0%}",
            number(m["us"]),
            number(m["plain_us"]),
            NOT_MEASURED if m["plain_us"] is None else f"{m['plain_us'] / m['us']:.2f}×",
        ]
        for m in speeds(document)
    ]
    heads = ("case", "shape", "GB/s", "", "of roof", "µs", "plain torch µs", "as fast")
    left_out = document["not_measured"]
    return (
        f"<p>The roof is the bandwidth at which the device copies memory: {roof:.1f} GB/s, read and written. "
        f"{_text(document['timing'])}</p>\n"
        + (_table(heads, rows, numbers=2, raw=True) if rows else "")
        + (f"<p>{NOT_MEASURED}: {_text(left_out)}</p>" if left_out else "")
    )


def _first_calls_table(document: Document) -> str:
    return _table(FIRST_CALLS, _first_calls(document), numbers=1) if document["first_calls"] else ""


def _compiled_table(document: Document) -> str:
    if not document["compiled"]:
        return ""
    return _table(("launch", "target", "registers", "shared bytes", "spilt bytes"), _compiled(document), numbers=2)


def _checks(document: Document) -> str:
    """Use × shape, with the dtypes and layouts of each."""
    if not document["checks"]:
        return ""
    cells: dict[tuple[str, str], list[str]] = {}
    for c in document["checks"]:
        mark = {"passed": "✓", "failed": "✗", "not run": "–"}[c["status"]]
        shown = (
            f'<span class="{_text(c["status"].replace("not run", "missing"))}">{c["dtype"]} {c["layout"]} {mark}</span>'
        )
        cells.setdefault((c["case"], c["shape"]), []).append(shown)
    rows = [[_text(case), _text(shape), " ".join(shown)] for (case, shape), shown in cells.items()]
    return _table(("case", "shape", "dtype, layout"), rows, numbers=0, raw=True)
