"""`make gpu`: kernel tests and microbenchmarks on the GPU of this machine, written to results/<device>.json.

    python -m benchmarks.gpu [--dry-run]

1. The kernel tests run (`pytest tests/ops -m gpu`). Nothing is timed where one fails: exit code 1.
2. The copy bandwidth is measured, then every op, shape and provider; each result is checked before it is timed.
3. The table is printed and written. Exit code 1 where an op of ours that moves 100 MB or more stays under 85% of the
   copy bandwidth.

Where there is no NVIDIA GPU, the kernels are compiled for one as the launches to be timed specialise them, and nothing
is launched: that is said in one line, and the exit code is 3. `--dry-run` does the same anywhere, with exit code 0.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported; kernels are compiled here, not interpreted
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import argparse
import dataclasses
import datetime
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import combinations, measure
from benchmarks.results import RESULTS
from omni_kernels.ops import OPS
from omni_kernels.validation import aot
from omni_kernels.validation.cases import CASES, Inputs
from omni_kernels.validation.measurement import TARGET_BYTES, TARGET_SHARE, Row, as_json, table
from omni_kernels.validation.record import device_name, machine, slug, write
from omni_kernels.validation.roof import copy_bandwidth
from omni_kernels.validation.shapes import FULL

ROOT = Path(__file__).parents[1]
COMMAND = "python -m benchmarks.gpu"
NO_GPU = 3
AOT_TARGET = "sm_90"


def kernels(target: str) -> list[str]:
    """The names of the kernels that the benchmark launches, each compiled for `target` with its launches' arguments.

    A shape's tokens are cut to 64 and its samples to 2: what a kernel is specialised on, dtypes, channels and
    alignment, stays.
    """
    names: list[str] = []
    for case in CASES.values():
        for shape in FULL:
            small = dataclasses.replace(shape, B=min(shape.B, 2), S=min(shape.S, 64))
            args, kwargs = case.ours(_empty(case.inputs(small, torch.device("cpu"))))
            launcher = OPS[case.op].launcher
            names += [k.metadata.name for k in aot.launches(target, lambda: launcher(*args, **kwargs))]  # noqa: B023
    return names


def _empty(inputs: Inputs) -> Inputs:
    """Inputs that are aligned as a GPU's are; nothing reads them."""
    return {
        k: [torch.empty_like(t) for t in v] if isinstance(v, list) else torch.empty_like(v) for k, v in inputs.items()
    }


def tests_pass() -> bool:
    """Whether the kernel tests pass on this GPU; without any there is nothing to go by."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "tests/ops", "-m", "gpu"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def report(device: torch.device, rows: Sequence[Row]) -> dict[str, Any]:
    """What is written."""
    held = [r for r in rows if r.has_target]
    return {
        "command": COMMAND,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1),
        "timing": "median of 20 replays of a graph of launches on different data; checked against fp64 first",
        "target": {
            "share_of_copy": TARGET_SHARE,
            "from_bytes": TARGET_BYTES,
            "lowest_share": min((r.share or 0.0 for r in held), default=None),
            "met": bool(held) and not any(r.misses for r in held),
        },
        "rows": as_json(rows),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="go up to the first launch and no further")
    options = parser.parse_args(argv)
    there = torch.cuda.is_available() and torch.version.hip is None
    if options.dry_run or not there:
        compiled = kernels(AOT_TARGET)
        summary = f"{len(compiled)} launches of {len(set(compiled))} kernels compiled for {AOT_TARGET}"
        why = "as --dry-run says" if options.dry_run else "for want of an NVIDIA GPU"
        print(f"{summary}; none launched and nothing measured, {why}")
        return 0 if options.dry_run else NO_GPU
    if not tests_pass():
        print("the kernel tests did not pass on this GPU: nothing is timed on a wrong result")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [measure(*one, device) for one in combinations(device)]
    written = report(device, rows)
    path = RESULTS / f"{slug(device_name(device))}.json"
    write(path, written)
    goal = written["target"]
    print(table(rows))
    print(f"{device_name(device)} copies at {written['copy_gb_per_s']} GB/s; written to {path}")
    print(
        f"{'reached' if goal['met'] else 'MISSED'}: {TARGET_SHARE:.0%} of that from {TARGET_BYTES / 1e6:.0f} MB on, "
        f"the lowest being {goal['lowest_share']:.0%}"
    )
    return int(not goal["met"])


if __name__ == "__main__":
    sys.exit(main())
