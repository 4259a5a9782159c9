"""`python -m benchmarks.kernels`: registers, shared memory and spills of every kernel, compiled without the GPUs.

It writes results/kernels.csv. `make test` compares the kernels that it compiles with this file: after a change of a
kernel, write the file again, and the difference shows in review. Each line is one launch's kernel on one target
(registers per thread, the rest in bytes). The kernel that adds up partial sums is shared, and listed once.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import triton

from omni_kernels.validation import aot

PATH = Path(__file__).parent / "results" / "kernels.csv"
COMMAND = "python -m benchmarks.kernels"


def text(costs: dict[str, dict[str, list[aot.Cost]]]) -> str:
    """The file's text: the command and the version, the columns, then launches in order, each with its targets in
    order.

    A launch that was compiled for some targets only has lines for these.
    """
    out = io.StringIO()
    out.write(f"# {COMMAND}, triton {triton.__version__}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["launch", "target", "kernel", "registers", "shared", "spills"])
    shared: set[tuple[str, str]] = set()
    for launch, by_target in costs.items():
        for target in (target for target in aot.TARGETS if target in by_target):
            first, *others = by_target[target]
            for cost in (first, *(c for c in others if (c.kernel, target) not in shared)):
                writer.writerow([launch, target, cost.kernel, cost.registers, cost.shared, cost.spills])
            shared |= {(c.kernel, target) for c in others}
    return out.getvalue()


def main() -> None:
    """Compile everything, and write the file."""
    costs = aot.costs("omni_kernels.validation.launches:table", [*aot.TARGETS])
    PATH.write_text(text(costs), encoding="utf-8")
    print(f"written to {PATH}")


if __name__ == "__main__":
    main()
