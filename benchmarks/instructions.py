"""Counts the instructions that a cache adds to a forward, with valgrind; other processes cannot disturb this figure.

    python -m benchmarks.instructions [--check]      # 10 minutes; needs valgrind (apt-get install valgrind)

The contenders, the transformer and the forwards are those of `bench_overhead`, which measures their time. Here they
run under callgrind, which counts the instructions of 20 skipped steps of each contender. A cache adds its count minus
that of an unpatched transformer with only the block that still runs. 2 whole forwards, with fused blocks and without,
are also counted.

Counts of a whole forward are reproducible to about 1%. Instructions are not time: a cache miss takes as long as many
of them, and valgrind's processor has no AVX-512. `--check` exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.bench_overhead import BLOCKS, FIRST, Run, Target, Weights
from benchmarks.contenders import ALWAYS_SMALL, CONTENDERS
from benchmarks.results import RESULTS
from omni_kernels import patched
from omni_kernels.validation.record import machine, write

STEPS = 20
FORWARDS = 2
#: Ours and the peers, but only contenders that run one block in a skipped forward.
COUNTED = [c for c in CONTENDERS if c.runs == 1]


def _control(*arguments: str) -> None:
    subprocess.run(["callgrind_control", *arguments, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def _count(run: Run, name: str, steps: int) -> None:
    """Count `steps` steps of a request, after the first ones, with callgrind, and write the count under `name`."""

    @contextlib.contextmanager
    def around(step: int) -> Iterator[None]:
        if step == FIRST:
            _control("--zero")
            _control("--instr=on")
        yield
        if step == FIRST + steps - 1:
            _control("--instr=off")
            _control("--dump=" + name.replace(" ", "_"))

    for _ in run.request(
        FIRST + steps, lambda step: contextlib.nullcontext()
    ):  # a first request, for work that is done only once
        pass
    for _ in run.request(FIRST + steps, around):
        pass


@torch.no_grad()
def _inside() -> None:
    """The part that runs under valgrind."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    weights = Weights(BLOCKS, torch.device("cpu"))
    _count(Run(weights, 1), "unpatched", STEPS)
    for contender in COUNTED:
        _count(Run(weights, BLOCKS, contender, ALWAYS_SMALL), contender.name, STEPS)
    run = Run(weights, BLOCKS)
    _count(run, "plain forward", FORWARDS)
    with patched(run.pipe):
        _count(run, "fused forward", FORWARDS)


def counted() -> dict[str, int]:
    """Instructions by contender, for `STEPS` skipped steps or `FORWARDS` whole forwards.

    Raises:
        FileNotFoundError: valgrind is not installed.
    """
    if not shutil.which("valgrind"):
        raise FileNotFoundError("valgrind is not installed: apt-get install valgrind")
    with tempfile.TemporaryDirectory() as directory:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={directory}/out"]
        command += [sys.executable, "-m", "benchmarks.instructions", "--inside"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "0"}, stderr=subprocess.DEVNULL)
        found = dict(_read(path) for path in Path(directory).glob("out.*"))
    labels = ["unpatched", *(c.name for c in COUNTED), "plain forward", "fused forward"]
    return {label: found[label.replace(" ", "_")] for label in labels}


def _read(path: Path) -> tuple[str, int]:
    text = path.read_text(encoding="utf-8")
    (name,) = re.findall(r"^desc: Trigger: dump (.*)$", text, re.MULTILINE) or [
        ""
    ]  # no match: the final dump, with the rest
    (total,) = re.findall(r"^totals: (\d+)$", text, re.MULTILINE)
    return name.strip(), int(total)


def shares(counts: dict[str, int]) -> list[Target]:
    """The targets of host time, applied to instructions."""
    added = {c.name: counts[c.name] - counts["unpatched"] for c in COUNTED}
    targets = [
        Target(f"{c.name}, skipped: added instructions, of {c.peer}'s", round(added[c.name] / added[c.peer], 3), 1 / 3)
        for c in COUNTED
        if c.peer
    ]
    share = counts["fused forward"] / counts["plain forward"]
    return [*targets, Target("fused forward: instructions, of the plain one's", round(share, 3), 1.0)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead-instructions.json", help="where to write")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        _inside()
        return 0
    counts = counted()
    targets = shares(counts)
    for name, count in counts.items():
        print(f"{name:33} {count:12,} instructions")
    for target in targets:
        print(f"{'reached' if target.met else 'MISSED '}  {target.what}: {target.figure:g}, at most {target.limit:.3g}")
    report = {
        "command": "python -m benchmarks.instructions",
        "machine": machine(torch.device("cpu")),
        "blocks": BLOCKS,
        "steps": STEPS,
        "forwards": FORWARDS,
        "instructions": counts,
        "targets": [vars(t) | {"met": t.met} for t in targets],
    }
    write(options.out, report)
    return int(options.check and not all(t.met for t in targets))


if __name__ == "__main__":
    sys.exit(main())
