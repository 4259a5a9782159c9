"""Makes the table in docs/results.md of what is known about every op on each vendor's devices, from results/.

    python -m benchmarks.support           # prints the table
    python -m benchmarks.support --write   # writes it into docs/results.md

A cell has the best evidence in the files: measured on a device (which, when, GB/s and the share of its copy
bandwidth), computed on a CPU from the vendor's IR, compiled, or not covered. Measurements are read from the files of
`python -m benchmarks.gpu` and `python -m omni_kernels.validate`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS
from omni_kernels.ops import OPS
from omni_kernels.validation import aot
from omni_kernels.validation.cases import CASES

COMMAND = "python -m benchmarks.support --write"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
BEGIN, END = f"<!-- {COMMAND} -->", "<!-- end of the table -->"
NOT_COVERED = "not covered"

#: Vendor → column title.
VENDORS = {"nvidia": "NVIDIA", "amd": "AMD", "ascend": "Ascend"}
#: First letters of an architecture → vendor.
ARCHITECTURES = {"sm": "nvidia", "gf": "amd"}


def measured(directory: Path) -> Iterator[tuple[str, str, str]]:
    """(op, vendor, what was measured) for every device with a file."""
    for path in sorted(directory.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = document.get("rows") or document.get("measurements") or []
        vendor = document.get("machine", {}).get("vendor")
        if vendor not in VENDORS or not document.get("copy_gb_per_s") or document.get("verdict") == "failed":
            continue
        largest: dict[str, Mapping[str, Any]] = {}  # the largest, because small ones are dominated by the launch
        for row in rows:
            op = CASES[row["case"]].op if row.get("case") in CASES else None
            if op is None or row["provider"] != "ours" or not row.get("gb_per_s"):
                continue
            if op not in largest or row["bytes"] > largest[op]["bytes"]:
                largest[op] = row
        for op, row in largest.items():
            when = document["date"][:10]
            yield op, vendor, f"{document['machine']['name']}, {when}: {row['gb_per_s']:.0f} GB/s, {row['share']:.0%}"


def from_ir(directory: Path) -> Iterator[tuple[str, str, str]]:
    """(op, vendor, the result of Ascend's compilers)."""
    path = directory / "ascend-lowering.json"
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        targets = ", ".join(target.removeprefix("Ascend") for target in document["targets"])
        for row in document["support"]:
            yield row["op"], "ascend", f"{row['support']} ({targets})"


def compiled(directory: Path) -> Iterator[tuple[str, str, str]]:
    """(op, vendor, the architectures for which all of its launches compile).

    Launches in a dtype that some architectures lack are told apart.
    """
    path = directory / "kernels.csv"
    if not path.is_file():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    launches: dict[tuple[str, str], dict[str, list[str]]] = {}  # (op, vendor) → launch → targets
    for row in csv.DictReader(lines):
        vendor = ARCHITECTURES[row["target"][:2]]
        of_op = launches.setdefault((row["launch"].split()[0], vendor), {})
        of_op.setdefault(row["launch"], []).append(row["target"])
    for (op, vendor), by_launch in launches.items():
        for dtype in (None, *aot.FP8):
            of_dtype = [each for launch, each in by_launch.items() if dtype == _fp8(launch)]
            first, *others = of_dtype or [[]]
            if names := [name for name in dict.fromkeys(first) if all(name in each for each in others)]:
                yield op, vendor, f"compiled{'' if dtype is None else f' for {dtype}'}: {', '.join(names)}"


def _fp8(launch: str) -> str | None:
    """The 8-bit floating-point dtype in a launch's name; None if there is none."""
    return next((dtype for dtype in aot.FP8 if dtype in launch.split()), None)


def table(directory: Path = RESULTS) -> str:
    """The table, in Markdown."""
    cells: dict[tuple[str, str], list[str]] = {}
    for source in (measured, from_ir, compiled):  # from the strongest evidence to the weakest
        found: dict[tuple[str, str], list[str]] = {}
        for op, vendor, told in source(directory):
            found.setdefault((op, vendor), []).append(told)
        cells = found | cells
    rows = [[f"`{op}`", *("; ".join(cells.get((op, vendor), [NOT_COVERED])) for vendor in VENDORS)] for op in OPS]
    lines = [["op", *VENDORS.values()], ["---"] * (len(VENDORS) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("---|", "---|") for line in lines)


def written(text: str, made: str) -> str:
    """A page's text with the table inserted between the marks.

    Raises:
        ValueError: the page has no such marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args(argv)
    made = table()
    if options.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
