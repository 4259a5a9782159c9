"""`make gpu`: kernel tests and microbenchmarks on the GPU of this machine, written to results/<device>.json.

    python -m benchmarks.gpu [--dry-run]

1. The kernel tests run (`pytest tests/ops -m gpu`). If one fails, nothing is timed, and the exit code is 2.
2. The copy bandwidth is measured, then every op, shape and provider; each result is checked before it is timed.
3. The table is printed and written. The exit code is 1 if our kernels miss a goal:
   - 85% of the copy bandwidth, if an op moves 100 MB or more;
   - at Qwen-Image's shapes, 85% of the speed of a copy that moves as many bytes, timed in the same run (most of these
     shapes are too small to reach the device's full bandwidth);
   - at every shape, at most the time of the same computation under torch.compile.

Without an NVIDIA GPU, the kernels are compiled for one, specialised as in the launches that would be timed, and
nothing is launched. One line says so, and the exit code is 3. `--dry-run` does the same anywhere, with exit code 0.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported; kernels are compiled here, not interpreted
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import argparse
import dataclasses
import datetime
import functools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import OF_COMPILED, OF_COPY, OF_SAME_COPY, Goal, goals, met, summary
from benchmarks.measure import TIMED, combinations, measure, of_qwen_image, shapes_of
from benchmarks.results import RESULTS
from omni_kernels.ops import OPS
from omni_kernels.validation import aot
from omni_kernels.validation.cases import Inputs
from omni_kernels.validation.measurement import TARGET_BYTES, TARGET_SHARE, Row, as_json, table
from omni_kernels.validation.record import device_name, machine, slug, write
from omni_kernels.validation.roof import copy_bandwidth
from omni_kernels.validation.timing import median_seconds, sets_for

ROOT = Path(__file__).parents[1]
COMMAND = "python -m benchmarks.gpu"
WRONG, NO_GPU = 2, 3
AOT_TARGET = "sm_90"


def kernels(target: str) -> list[str]:
    """Compile the kernels that the benchmark launches for `target`, with the arguments of these launches; their names.

    A shape's tokens are reduced to 64 and its samples to 2. Dtypes, channels and alignment, on which a kernel is
    specialised, stay the same.
    """
    names: list[str] = []
    for case in TIMED.values():
        for shape in shapes_of(case, torch.device("cuda")):
            small = dataclasses.replace(shape, B=min(shape.B, 2), S=min(shape.S, 64))
            args, kwargs = case.ours(_empty(case.inputs(small, torch.device("cpu"))))
            launcher = OPS[case.op].launcher
            names += [k.metadata.name for k in aot.launches(target, lambda: launcher(*args, **kwargs))]  # noqa: B023
    return names


def _empty(inputs: Inputs) -> Inputs:
    """Empty inputs with the alignment that they have on a GPU; nothing reads them."""
    return {
        k: [torch.empty_like(t) for t in v] if isinstance(v, list) else torch.empty_like(v) for k, v in inputs.items()
    }


def tests_pass() -> bool:
    """Whether the kernel tests pass on this GPU; False if none ran."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "tests/ops", "-m", "gpu"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def copy_us(device: torch.device, nbytes: int) -> float:
    """Microseconds of a copy that reads and writes `nbytes` in total, of data that is in no cache."""
    pairs = [
        [torch.empty(max(nbytes // 2, 1), dtype=torch.uint8, device=device) for _ in range(2)]
        for _ in range(sets_for(device, nbytes))
    ]
    calls = [functools.partial(target.copy_, source) for source, target in pairs]
    return median_seconds(calls, device) * 1e6


def report(
    device: torch.device, rows: Sequence[Row], copies: Mapping[int, float], found: Sequence[Goal]
) -> dict[str, Any]:
    """The document that is written."""
    return {
        "command": COMMAND,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1),
        "timing": "median of 20 replays of a graph of launches on different data; checked against fp64 first",
        "target": {
            "share_of_copy": TARGET_SHARE,
            "from_bytes": TARGET_BYTES,
            "lowest_share": min((goal.value for goal in found if goal.what == OF_COPY), default=None),
            "lowest_share_of_same_copy": min((goal.value for goal in found if goal.what == OF_SAME_COPY), default=None),
            "lowest_against_compiled": min((goal.value for goal in found if goal.what == OF_COMPILED), default=None),
            "met": met(found),
            "missed": [str(goal) for goal in found if not goal.met],
        },
        "copies_us": {str(nbytes): round(us, 2) for nbytes, us in copies.items()},
        "rows": as_json(rows),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="compile only; launch nothing")
    options = parser.parse_args(argv)
    there = torch.cuda.is_available() and torch.version.hip is None
    if options.dry_run or not there:
        compiled = kernels(AOT_TARGET)
        told = f"{len(compiled)} launches of {len(set(compiled))} kernels compiled for {AOT_TARGET}"
        why = "because of --dry-run" if options.dry_run else "because there is no NVIDIA GPU"
        print(f"{told}; none launched and nothing measured, {why}")
        return 0 if options.dry_run else NO_GPU
    if not tests_pass():
        print("the kernel tests did not pass on this GPU: nothing is timed on a wrong result")
        return WRONG
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [measure(*one, device) for one in combinations(device)]
    sizes = sorted({r.bytes for r in rows if r.provider == "ours" and of_qwen_image(r) and r.us is not None})
    copies = {nbytes: copy_us(device, nbytes) for nbytes in sizes}
    found = goals(rows, copies)
    written = report(device, rows, copies, found)
    path = RESULTS / f"{slug(device_name(device))}.json"
    write(path, written)
    print(table(rows))
    print(f"{device_name(device)} copies at {written['copy_gb_per_s']} GB/s; written to {path}")
    print(*summary(found), sep="\n")
    return int(not met(found))


if __name__ == "__main__":
    sys.exit(main())
