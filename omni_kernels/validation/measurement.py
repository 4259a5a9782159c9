"""One measurement: one case, shape and provider on one device. The result is checked before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_kernels.validation.cases import Case, Inputs, wrong
from omni_kernels.validation.roof import copy_bandwidth
from omni_kernels.validation.shapes import Shape
from omni_kernels.validation.timing import Call, median_seconds, sets_for

TARGET_BYTES = 100_000_000
TARGET_SHARE = 0.85


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none. `share` is the share of the measured copy bandwidth."""

    case: str
    shape: str
    provider: str
    bytes: int
    us: float | None
    gb_per_s: float | None
    share: float | None
    skipped: str | None = None

    @property
    def has_target(self) -> bool:
        """Whether this is an op of ours that has to reach `TARGET_SHARE`."""
        return self.provider == "ours" and self.bytes >= TARGET_BYTES

    @property
    def misses(self) -> bool:
        """Whether it has a target and misses it."""
        return self.has_target and (self.share is None or self.share < TARGET_SHARE)


def calls_for(
    case: Case, shape: Shape, provider: str, run: Callable[[Inputs], Any], device: torch.device
) -> tuple[list[Call], int]:
    """Calls to be timed, and the bytes that each has to move.

    Raises:
        AssertionError: the result is wrong.
    """
    torch.manual_seed(0)
    inputs = case.inputs(shape, device)
    problem = wrong(case, provider, run(inputs), inputs, shape.dtype)
    assert problem is None, f"{case.name} at {shape}: {problem}"
    nbytes = case.bytes_moved(inputs)
    sets = [inputs] + [case.inputs(shape, device) for _ in range(sets_for(device, nbytes) - 1)]
    return [functools.partial(run, one) for one in sets], nbytes


def row(case: Case, shape: Shape, provider: str, device: torch.device, nbytes: int, seconds: float) -> Row:
    """A measured time as a `Row`."""
    speed = nbytes / seconds
    return Row(
        case=case.name,
        shape=str(shape),
        provider=provider,
        bytes=nbytes,
        us=round(seconds * 1e6, 2),
        gb_per_s=round(speed / 1e9, 1),
        share=round(speed / copy_bandwidth(device), 3),
    )


@torch.no_grad()
def measure(
    case: Case, shape: Shape, provider: str, run: Callable[[Inputs], Any], device: torch.device, rounds: int = 20
) -> Row:
    """Check and time `run` on the inputs of a case.

    Raises:
        AssertionError: its result is wrong.
    """
    calls, nbytes = calls_for(case, shape, provider, run, device)
    return row(case, shape, provider, device, nbytes, median_seconds(calls, device, rounds))


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'op':29} {'shape':41} {'provider':14} {'MB':>7} {'µs':>10} {'GB/s':>8} {'of copy':>8}"]
    for r in rows:
        head = f"{r.case:29} {r.shape:41} {r.provider:14}"
        if r.us is None:
            lines.append(f"{head} {r.skipped}")
        else:
            lines.append(f"{head} {r.bytes / 1e6:7.1f} {r.us:10.2f} {r.gb_per_s:8.1f} {r.share:8.0%}")
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for the results file."""
    return [{k: v for k, v in vars(r).items() if v is not None} | {"misses_target": r.misses} for r in rows]
