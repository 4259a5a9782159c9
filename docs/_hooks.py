"""What mkdocs makes at build time: tables from the code, and pages from files that lie elsewhere.

A line `<!-- keys -->` becomes a table of keys for each cache method; `<!-- file: PATH -->` becomes that file's text,
without its title. Figures under benchmarks/results that a page shows are copied into the site.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the plots of results to the site."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.svg")):
        files.append(File.generated(config, f"images/{path.name}", content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace the marks."""
    markdown = re.sub(r"<!-- file: (\S+) -->", lambda found: _text(found[1]), markdown)
    return markdown.replace("<!-- keys -->", keys()) if "<!-- keys -->" in markdown else markdown


def keys() -> str:
    """A section for each cache method: its summary, and a table of its keys."""
    from omni_kernels.patching import backends

    sections = []
    for name, method in backends.available().items():
        rows = [
            f"| `{key.name}` | `{_cell(json.dumps(key.default, ensure_ascii=False))}` | {_cell(key.allowed)} "
            f"| {_cell(key.doc)} |"
            for key in method.keys
        ]
        head = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
        sections.append("\n".join([f"## {name}", "", f"{method.summary}.", "", *head, *rows]))
    return "\n\n".join(sections)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _text(path: str) -> str:
    _, _, text = (ROOT / path).read_text(encoding="utf-8").partition("\n")
    # Links from a file at the root, as links from a page of the site.
    return re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
