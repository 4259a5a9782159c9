"""Records what Triton compiles, and how long it takes. The first call of a kernel waits for its compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omni_kernels.ops._triton import triton


@dataclass
class Compilations:
    """What was compiled; printable.

    Attributes:
        seconds: kernel name → compile time of each of its variants.
        found: the number of variants whose binary was found in the disk cache.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    found: int = 0

    def __str__(self) -> str:
        variants = sum(map(len, self.seconds.values()))
        total = sum(map(sum, self.seconds.values()))
        lines = [f"{variants} variants of {len(self.seconds)} kernels compiled in {total:.1f} s, {self.found} on disk"]
        lines += [f"{name}: {len(each)}, {max(each):.2f} s at most" for name, each in self.seconds.items()]
        return "\n".join(lines)


@contextlib.contextmanager
def following() -> Iterator[Compilations]:
    """Context manager that records what Triton compiles. Records nothing without Triton, or before Triton 3.4."""
    told = Compilations()
    knobs: Any = getattr(triton, "knobs", None)
    if not hasattr(getattr(knobs, "compilation", None), "listener"):
        yield told
        return

    def listener(*, src: Any, times: Any, cache_hit: bool, **others: Any) -> None:
        if before is not None:
            before(src=src, times=times, cache_hit=cache_hit, **others)
        if cache_hit:
            told.found += 1
        else:
            told.seconds.setdefault(src.name, []).append(times.total / 1e6)  # from microseconds

    before = knobs.compilation.listener
    knobs.compilation.listener = listener
    try:
        yield told
    finally:
        knobs.compilation.listener = before
