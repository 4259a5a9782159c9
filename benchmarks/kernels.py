"""`python -m benchmarks.kernels`: registers, shared memory and spills of every kernel, compiled for GPUs not there.

It writes results/kernels.csv, against which `make test` holds what it compiles: whoever changes a kernel writes it
anew, and the difference is seen in review. A line is a launch's kernel on a target (registers are per thread, the rest
in bytes); the kernel that adds partial sums up is the same for all, and listed once.
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
    """The file's lines: the command and the version, the columns, then launches in order, targets in order.

    Of a launch that was compiled for some targets alone, there are those.
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
