"""`python -m omni_kernels.tune`: find tiles that are faster on this GPU than the ops' defaults.

    python -m omni_kernels.tune [--ops gelu,rms_norm] [--out FILE] [--dry-run]

Every op has one default tile; a comment in its file gives the reason. This command measures others, at the shapes of
`omni_kernels.validation.shapes`. Each is checked against fp64 and timed. The fastest is timed three more times,
alternating with the default. If it then takes at least 5% less time, it is written with its measurements to
omni_kernels/tuned/<device>.json, which `ops._tiles` reads on such a device.

Ops that sum over a sample (relative_l1, residual_relative_l1, modulated_relative_l1) are not tuned. The cut of a sample
decides the order of its summation, and their sums must be bit-identical on every GPU.

Exit codes: 0 measured, whatever the result; 2 wrong usage; 3 no GPU. `--dry-run` measures nothing: it compiles for
sm_90 what would be tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from omni_kernels.device import device_count
from omni_kernels.ops import OPS, _tiles
from omni_kernels.validation import aot, record
from omni_kernels.validation.cases import CASES, PROVIDERS, Case
from omni_kernels.validation.measurement import calls_for
from omni_kernels.validation.shapes import FULL, WAN, Shape
from omni_kernels.validation.timing import median_seconds

COMMAND = "python -m omni_kernels.tune"
NO_DEVICE = 3
TARGET = "sm_90"
#: The ops that get their tile from `_tiles`.
TUNABLE = (
    *("ada_layer_norm", "gate_residual_norm", "rms_norm", "qk_norm_rope", "gelu", "swiglu", "linear_forecast"),
    "quantize",
)
#: The tile sizes to try, in elements.
CANDIDATES = (1024, 2048, 4096, 8192)
#: The share of the time that another tile must save to be used.
LEAST_GAIN = 0.05
ROUNDS = 10


def own_tile(op: str) -> int:
    """An op's default tile, in elements."""
    file = importlib.import_module(f"omni_kernels.ops.{op}")
    return int(file.BLOCK if hasattr(file, "BLOCK") else file.TILE)


def trials(ops: Sequence[str]) -> Iterator[tuple[Case, Shape, list[int]]]:
    """The uses of these ops, the shapes at which memory dominates the time, and the tiles to try."""
    for case in CASES.values():
        for shape in (*FULL, WAN) if case.op in ops else ():
            if case.fits(shape) and shape.nbytes > 1 << 20:
                yield case, shape, [one for one in CANDIDATES if one != own_tile(case.op)]


def faster(
    case: Case,
    shape: Shape,
    candidates: Sequence[int],
    device: torch.device,
    seconds: Callable[..., float] = median_seconds,
) -> dict[str, Any] | None:
    """The measurements of the fastest of these tiles; None for a use that does not get its tile from `_tiles`.

    Raises:
        AssertionError: the result is wrong with one of the tiles.
    """
    run = PROVIDERS["ours"](case)

    own = own_tile(case.op)

    def timed(tile: int) -> float:
        with _tiles.trying(case.op, tile):
            calls, _ = calls_for(case, shape, "ours", run, device)
            return seconds(calls, device, ROUNDS)

    with _tiles.trying(case.op, own) as asked:
        calls_for(case, shape, "ours", run, device)
    if not asked:
        return None
    times = {tile: timed(tile) for tile in candidates}
    best = min(times, key=times.__getitem__)
    turns = [(timed(own), timed(best)) for _ in range(3)]
    before, after = (sorted(one)[1] for one in zip(*turns, strict=True))
    channels, dtype = asked[-1]
    return {
        "op": case.op,
        "case": case.name,
        "shape": str(shape),
        "dtype": dtype,
        "channels": channels,
        "tile": best,
        "us": round(after * 1e6, 2),
        "own_tile": own,
        "own_us": round(before * 1e6, 2),
    }


def saves(row: dict[str, Any]) -> bool:
    """Whether the measured tile is enough faster than the default."""
    return bool(row["us"] <= (1 - LEAST_GAIN) * row["own_us"])


def agreed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows to keep: tiles that save enough in all uses of an op with this number of channels and dtype.

    Of these uses, the row with the smallest gain is kept.
    """
    kept = []
    for key in dict.fromkeys((row["op"], row["channels"], row["dtype"]) for row in rows):
        alike = [row for row in rows if (row["op"], row["channels"], row["dtype"]) == key]
        if all(map(saves, alike)) and len({row["tile"] for row in alike}) == 1:
            kept.append(max(alike, key=lambda row: row["us"] / row["own_us"]))
    return kept


def compiled(ops: Sequence[str]) -> list[str]:
    """Compile what would be tried for `TARGET`, with at most 64 tokens and 2 samples. Returns the kernels' names."""
    names = []
    for case, shape, candidates in trials(ops):
        small = dataclasses.replace(shape, B=min(shape.B, 2), S=min(shape.S, 64))
        args, kwargs = case.ours(case.inputs(small, torch.device("cpu")))
        for tile in candidates:
            with _tiles.trying(case.op, tile):
                found = aot.launches(TARGET, lambda: OPS[case.op].launcher(*args, **kwargs))  # noqa: B023
            names += [kernel.metadata.name for kernel in found]
    return names


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, or raises SystemExit(2) for wrong usage."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0].partition(": ")[2])
    parser.add_argument("--ops", default=",".join(TUNABLE), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: omni_kernels/tuned/<device>.json")
    parser.add_argument("--dry-run", action="store_true", help=f"compile for {TARGET} what would be tried")
    options = parser.parse_args(argv)
    ops = [name.strip() for name in options.ops.split(",") if name.strip()]
    for name in ops:
        if name not in TUNABLE:
            parser.error(f"--ops: {name!r} has no tunable tile; allowed are {', '.join(TUNABLE)}")
    if options.dry_run:
        names = compiled(ops)
        print(f"{len(names)} launches of {len(set(names))} kernels compiled for {TARGET}; nothing was measured")
        return 0
    if not device_count("cuda"):
        print("there is no GPU here: nothing was measured", file=sys.stderr)
        return NO_DEVICE
    device = torch.device("cuda", 0)
    rows = []
    for case, shape, candidates in trials(ops):
        found = faster(case, shape, candidates, device)
        if found is not None:
            print(f"{case.name} at {shape}: {found['tile']} takes {found['us'] / found['own_us']:.0%}", flush=True)
            rows.append(found)
    path = options.out or _tiles.TUNED / f"{record.slug(record.device_name(device))}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    kept = [row for row in before if row["op"] not in ops] + agreed(rows)
    record.write(
        path,
        {
            "command": COMMAND,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": record.machine(device),
            "least_gain": LEAST_GAIN,
            "rows": kept,
        },
    )
    print(f"{len(kept)} tiles differ from the ops' defaults; written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
