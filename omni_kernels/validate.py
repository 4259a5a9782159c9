"""`python -m omni_kernels.validate`: check every op on a device for correctness, and measure its bandwidth.

    python -m omni_kernels.validate [--device cuda|npu|cpu] [--quick] [--ops a,b] [--out DIR]
    python -m omni_kernels.validate --case gelu/3x37x200/bfloat16/offset [--seed N]
    python -m omni_kernels.validate --compile-only [--targets sm_90,gfx942]

1. Every op is checked against fp64, at the models' shapes and unusual ones, in fp32, fp16 and bf16, and in several
   memory layouts. It runs twice, with guard memory around its tensors (`validation.checks`). On a CPU, the models'
   shapes have fewer tokens, and the ops are plain torch; with TRITON_INTERPRET=1 they are the kernels, interpreted.
2. The device's bandwidth for copying memory is measured, then every op, and the same in plain torch.
3. Tables are printed. `validation.json` and `validation.html` contain everything, with device, driver and versions.

`--compile-only` needs no device: it compiles the kernels for GPUs and reports registers, shared memory and spills.

Exit codes: 0 everything that ran is correct; 1 something is wrong, or an op was never run; 2 wrong usage; 3 no device.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from omni_kernels.ascend import by_triton
from omni_kernels.ascend.operators import present
from omni_kernels.compilations import following
from omni_kernels.device import device_count
from omni_kernels.ops import OPS
from omni_kernels.validation import aot, checks, interpreter, launches, record, report
from omni_kernels.validation.cases import CASES, PROVIDERS
from omni_kernels.validation.checks import Check, Implementation
from omni_kernels.validation.measurement import Row, measure
from omni_kernels.validation.roof import copy_bandwidth
from omni_kernels.validation.shapes import CPU_DIVISOR, Shape

#: NVIDIA and AMD, Ascend, CPU, in order of preference.
KINDS = ("cuda", "npu", "cpu")

PASSED, FAILED, WRONG_USAGE, NO_DEVICE = range(4)
COMMAND = "python -m omni_kernels.validate"

#: Time limits in seconds: after the first no check is begun, after the second nothing at all. Start-up is not included.
LIMITS = {"quick": (25.0, 40.0), "whole": (300.0, 440.0)}
QUICK_TARGETS = ("sm_90", "gfx942")

TIMING = {
    "cpu": "Times are medians of the host's clock. The data are small enough to fit in its caches.",
    "cuda": "Times are medians of the device's clock, for replayed graphs on data too large for its caches.",
}
OTHER_TIMING = "Times are medians between two events around the launches."


def find_device(wanted: str | None) -> torch.device | None:
    """The requested device, or the best available one; None if the requested one is not available.

    Raises:
        ValueError: its kind is not one of `KINDS`.
    """
    for name in [wanted] if wanted else KINDS:
        kind, _, index = name.partition(":")
        if kind not in KINDS or (index and not index.isdigit()):
            raise ValueError(
                f"--device: {name!r} is not one of {', '.join(KINDS)}, nor one with an index, as in cuda:1"
            )
        if int(index or 0) < device_count(kind):
            return torch.device(name)
    return None


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


def implementation_on(device: torch.device) -> tuple[str, Implementation]:
    """How the ops are implemented on a device, in words, and a function that returns an op's implementation."""
    if interpreted():
        interpreter.correct()
        return "Triton kernels, interpreted on the CPU", lambda op: OPS[op].launcher
    words = "plain torch"
    if device.type == "npu":
        kernels = [op for op in OPS if by_triton(op)]
        words = ", ".join(([f"Triton kernels for {' and '.join(kernels)}"] if kernels else []) + [*present(), words])
    elif device.type == "cuda" and find_spec("triton") is not None:
        words = "Triton kernels"
    return words, lambda op: OPS[op].function


class Progress:
    """Prints a line about a phase's progress from time to time. `limit` is its latest end, on time.monotonic."""

    def __init__(self, phase: str, total: int, limit: float) -> None:
        self.phase, self.total, self.limit = phase, total, limit
        self.began = self.told = time.monotonic()
        self.done = 0

    @property
    def is_over(self) -> bool:
        """Whether there is no time left."""
        return time.monotonic() >= self.limit

    def step(self, told: str = "") -> None:
        """Count one more as done."""
        self.done += 1
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self.told < (0.5 if terminal else 10) and self.done < self.total:
            return
        self.told = now
        left = min((now - self.began) / self.done * (self.total - self.done), max(0.0, self.limit - now))
        line = f"{self.phase} {self.done}/{self.total}{told}, about {left:.0f} s left"
        end = "\n" if self.done == self.total or not terminal else ""
        print(f"\r\033[K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)


def repeat(check: Check, device: torch.device, seed: int) -> str:
    """The command that repeats one check."""
    words = [*COMMAND.split(), "--device", str(device), "--case", check.id, "--seed", str(seed)]
    return ("TRITON_INTERPRET=1 " if interpreted() else "") + shlex.join(words)


def check_all(wanted: Sequence[Check], device: torch.device, seed: int, limit: float) -> list[dict[str, Any]]:
    """The outcomes of all checks, in order. "not run": there was no time or memory left, or the device was lost."""
    implementation = implementation_on(device)[1]
    progress = Progress("checks", len(wanted), limit)
    outcomes: list[dict[str, Any]] = []
    lost: str | None = None
    for check in wanted:
        outcome = {
            "id": check.id,
            "op": check.use.op,
            "case": check.use.name,
            "shape": f"{check.shape.name} {'×'.join(map(str, check.shape.size))}",
            "dtype": check.dtype,
            "layout": check.layout,
        }
        if lost is None and progress.is_over:
            outcome |= {"status": "not run", "problem": "there was no time left"}
        elif lost is not None:
            outcome |= {"status": "not run", "problem": lost}
        else:
            outcome |= _checked(check, implementation, device, seed)
            lost = _lost(device) if outcome["status"] == "failed" else None
        outcomes.append(outcome)
        progress.step(f", {sum(o['status'] == 'failed' for o in outcomes)} failed")
    return outcomes


def _checked(check: Check, implementation: Implementation, device: torch.device, seed: int) -> dict[str, Any]:
    """The outcome of one check."""
    worst = None
    try:
        problems = checks.run(check, implementation, device, seed)
    except torch.OutOfMemoryError:
        return {"status": "not run", "problem": "the device has not enough memory"}
    except Exception as error:  # a kernel that cannot be compiled or launched is a failed check, too
        problem = f"{type(error).__name__}: {error}"[:2000]
    else:
        if not problems:
            return {"status": "passed"}
        problem, worst = "; ".join(map(str, problems)), dataclasses.asdict(problems[0])
    command = repeat(check, device, seed)
    return {"status": "failed", "problem": problem, "worst": worst, "seed": seed, "repeat": command}


def _lost(device: torch.device) -> str | None:
    """Why nothing more can be run, or None. After an invalid memory access, a device's context is unusable."""
    if device.type == "cpu":
        return None
    try:
        torch.ones(1, device=device).item()
    except Exception as error:
        return f"the device was lost: {error}"[:500]
    return None


def measure_all(
    ops: Sequence[str], shapes: Sequence[Shape], device: torch.device, limit: float, wrong: set[str]
) -> tuple[list[Row], list[str]]:
    """Measure our ops and plain torch for every case and shape. Returns the rows, and what was left out and why."""
    cases = [case for case in CASES.values() if case.op in ops]
    wanted = [(case, shape, p) for shape in shapes for case in cases if case.fits(shape) for p in PROVIDERS]
    progress = Progress("times", len(wanted), limit)
    rows: list[Row] = []
    left_out = [f"{op}, whose results are wrong" for op in ops if op in wrong]
    for j, (case, shape, provider) in enumerate(wanted):
        if progress.is_over:
            left_out.append(f"{len(wanted) - j} of {len(wanted)} measurements, for lack of time")
            break
        try:
            if case.op not in wrong:
                rows.append(measure(case, shape, provider, PROVIDERS[provider](case), device, rounds=10))
        except Exception as error:
            left_out.append(f"{case.name} at {shape.name} ({provider}): {error}"[:500])
            if _lost(device):
                break
        progress.step()
    return rows, left_out


def compile_all(
    ops: Sequence[str], targets: Sequence[str], limit: float, quick: bool = False
) -> tuple[list[dict[str, Any]], int, dict[str, list[float]]]:
    """Compile the launches of `ops` for `targets`; with `quick`, only those at the models' shapes.

    Returns:
        The results, the number of launches left out for lack of time, and the compile times of each kernel's variants.
    """
    table = launches.models() if quick else launches.table()
    names = [name for name in table if set(name.split()) & set(ops)]
    progress = Progress("compiled", len(names) * len(targets), limit)
    found: list[dict[str, Any]] = []
    first_calls: dict[str, list[float]] = {}
    for result in aot.compiled(targets, names):
        for kernel, each in result.seconds.items():
            first_calls.setdefault(kernel, []).extend(round(s, 3) for s in each)
        found.append(
            {
                "launch": result.launch,
                "target": result.target,
                "registers": max((kernel.registers for kernel in result.kernels), default=None),
                "shared": max((kernel.shared for kernel in result.kernels), default=None),
                "spills": result.spills,
                "kernels": [kernel.kernel for kernel in result.kernels],
                "error": result.error,
            }
        )
        progress.step()
        if progress.is_over:
            break
    return found, progress.total - progress.done, first_calls


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0].partition(": ")[2])
    parser.add_argument(
        "--device", help="cuda (NVIDIA, AMD), npu (Ascend), cpu, or cuda:1; default: the first there is"
    )
    parser.add_argument(
        "--quick", action="store_true", help="in less than a minute: every op in every dtype, one model"
    )
    parser.add_argument("--ops", metavar="A,B", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--case", action="append", metavar="ID", help="run only this check, not timed; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    parser.add_argument("--minutes", type=float, help="begin nothing new after this many minutes")
    parser.add_argument("--compile-only", action="store_true", help="compile the kernels; needs no device")
    parser.add_argument("--targets", metavar="A,B", help=f"to compile for: {', '.join(aot.TARGETS)}; default: all")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: here; --case: nowhere)")
    return parser


def _chosen(parser: argparse.ArgumentParser, option: str, text: str | None, allowed: Sequence[str]) -> list[str]:
    """The names in a comma-separated list."""
    if text is None:
        return [*allowed]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            parser.error(f"{option}: {name!r} is unknown; {f'did you mean {near[0]}?' if near else ', '.join(allowed)}")
    if not names:
        parser.error(f"{option}: no names are given; allowed are {', '.join(allowed)}")
    return names


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, or raises SystemExit(2) for wrong usage."""
    began = time.monotonic()
    parser = _arguments()
    options = parser.parse_args(argv)
    ops = _chosen(parser, "--ops", options.ops, [*OPS])
    to_checks, to_end = LIMITS["quick" if options.quick else "whole"]
    if options.minutes is not None:
        to_checks, to_end = options.minutes * 60 * to_checks / to_end, options.minutes * 60
    document: dict[str, Any] = {
        "command": shlex.join([*COMMAND.split(), *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "verdict": "failed",
        "seed": options.seed,
        "device": "none: nothing was run",
        "implementation": "nothing was run",
        "machine": record.machine(torch.device("cpu")),
        "copy_gb_per_s": None,
        "timing": "",
        "not_measured": "",
        "unchecked": [],
        "checks": [],
        "measurements": [],
        "first_calls": {},
        "compiled": [],
        "not_compiled": 0,
    }
    if options.compile_only:
        targets = _chosen(parser, "--targets", options.targets, [*aot.TARGETS])
        if find_spec("triton") is None:
            print("Triton is not installed: there are no kernels to compile", file=sys.stderr)
            return NO_DEVICE
        if options.quick and options.targets is None:
            targets = [*QUICK_TARGETS]
        print(f"compiling for {', '.join(targets)}; nothing is run")
        found, left, first_calls = compile_all(ops, targets, began + to_end, options.quick)
        document |= {
            "compiled": found,
            "not_compiled": left,
            "first_calls": first_calls,
            "not_measured": "the kernels were compiled, not run",
            "unchecked": [] if left else [op for op in ops if op not in {one["launch"].split()[0] for one in found}],
        }
        return _finish(document, options.out or Path(), began)
    if options.targets is not None:
        parser.error("--targets goes with --compile-only")
    try:
        device = find_device(options.device)
        only = [checks.parse(text) for text in options.case or ()]
    except ValueError as error:
        parser.error(str(error))
    if device is None:
        print(f"there is no device {options.device!r} here", file=sys.stderr)
        return NO_DEVICE
    document |= {
        "device": str(device),
        "machine": record.machine(device),
        "implementation": implementation_on(device)[0],
    }
    print(_found(document, device))
    if only:
        document |= {
            "checks": check_all(only, device, options.seed, float("inf")),
            "not_measured": "--case is not timed",
        }
        return _finish(document, options.out, began)
    divisor = 1
    if device.type == "cpu":
        divisor = CPU_DIVISOR * (16 if interpreted() else 4 if options.quick else 1)
    wanted = checks.plan(ops, divisor=divisor, quick=options.quick)
    with following() as compilations:
        document["checks"] = check_all(wanted, device, options.seed, began + (to_end if interpreted() else to_checks))
    document["first_calls"] = {name: [round(s, 3) for s in each] for name, each in compilations.seconds.items()}
    done = {c["op"] for c in document["checks"] if c["status"] != "not run"}
    document["unchecked"] = [op for op in ops if op not in done]
    if interpreted():
        document["not_measured"] = "interpreted kernels are not timed"
    elif _lost(device):
        document["not_measured"] = "the device was lost"
    else:
        wrong = {c["op"] for c in document["checks"] if c["status"] == "failed"}
        document["copy_gb_per_s"] = round(copy_bandwidth(device) / 1e9, 1)
        document["timing"] = TIMING.get(device.type, OTHER_TIMING)
        models = [checks.reduced(s, divisor) for s in (checks.MODELS[:1] if options.quick else checks.MODELS)]
        rows, left_out = measure_all(ops, models, device, began + to_end, wrong)
        document["measurements"] = [
            {key: value for key, value in vars(r).items() if key != "skipped"} | {"op": CASES[r.case].op} for r in rows
        ]
        document["not_measured"] = "; ".join(left_out)
    return _finish(document, options.out or Path(), began)


def _found(document: dict[str, Any], device: torch.device) -> str:
    """A description of the device and the versions, printed first."""
    about = document["machine"]
    facts = [about["vendor"], about["arch"]]
    if about.get("memory"):
        facts += [f"{about['multiprocessors']} multiprocessors", f"{about['memory'] / 2**30:.0f} GiB"]
    if about.get("driver"):
        facts.append(f"driver {about['driver']}")
    if about.get("runtime"):
        facts.append(about["runtime"])
    versions = [f"{name} {about['versions'][name] or 'not installed'}" for name in ("torch", "triton")]
    return (
        f"{device}: {about['name']} ({', '.join(facts)}); {', '.join(versions)}\n"
        f"the ops run as {document['implementation']}"
    )


def _finish(document: dict[str, Any], out: Path | None, began: float) -> int:
    """Print and write the results. Returns the exit code."""
    wrong = any(c["status"] == "failed" for c in document["checks"]) or document["unchecked"]
    wrong = wrong or any(c["error"] or c["spills"] for c in document["compiled"])
    document["verdict"] = "failed" if wrong else "passed"
    document["seconds"] = round(time.monotonic() - began, 1)
    print(report.text(document))
    if out is not None:
        record.write(out / "validation.json", document)
        record.replace(out / "validation.html", report.page(document))
        print(f"written to {out / 'validation.json'} and {out / 'validation.html'}")
    return FAILED if wrong else PASSED


if __name__ == "__main__":
    sys.exit(main())
