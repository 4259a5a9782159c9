"""What cutting rows into chunks does to the kernels, counted in their compiled code, without a GPU.

    TRITON_INTERPRET=0 python -m benchmarks.lanes   # a minute; writes results/lanes.json

For each launch on sm_90: the share of a program's lanes that are idle, and how many KB of loads a multiprocessor can
have in flight (programs that fit into its 65,536 registers and 2,048 threads, times what each loads). Both in one
piece, which pads a row to a power of two, and as the launchers cut them. For qk_norm_rope, the pieces are one chunk of
heads to a program, which loads the angles once for each chunk.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.results import RESULTS
from omni_kernels.ops import OPS, _chunks, qk_norm_rope
from omni_kernels.validation import aot
from omni_kernels.validation.launches import attention
from omni_kernels.validation.record import machine, write

TARGET, REGISTERS, THREADS, PROGRAMS = "sm_90", 65536, 2048, 32
TOKENS = 4096
COLUMNS = ["op", "row", "idle lanes, one piece", "in chunks", "KB in flight, one piece", "in chunks"]


def launches() -> dict[tuple[str, str], tuple[partial[Any], int, int]]:
    """(op, row) → a launch, the elements of a row, and the bytes that a program loads for each row."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    found = {}
    for name, D in (("Qwen-Image, FLUX", 3072), ("Z-Image", 3840), ("Wan 14B", 5120)):
        x, row = tensor(1, TOKENS, D), tensor(1, D)
        for op, inputs, loaded in (
            ("ada_layer_norm", (x, row, row), 1),
            ("gate_residual_norm", (x, x, row, row, row), 2),
            ("rms_norm", (x, row[0]), 1),
        ):
            found[op, f"{D} ({name})"] = partial(OPS[op].launcher, *inputs), D, 2 * D * loaded
    for name, D in (("Z-Image", 10240), ("Qwen-Image, FLUX", 12288)):
        run = partial(OPS["gelu"].launcher, tensor(1, TOKENS, D), quantize=torch.int8)
        found["gelu in int8", f"{D} ({name})"] = run, D, 2 * D
    for name, H, across in (("Qwen-Image, FLUX", 24, False), ("Z-Image", 30, False), ("Wan 14B", 40, True)):
        run = attention(1, TOKENS, H, 128, 0, weighted=128 * (H if across else 1), v=False, across_heads=across)
        found["qk_norm_rope", f"{H} heads of 128 ({name})"] = run, H * 128, 2 * 2 * 128 * H
    return found


@contextlib.contextmanager
def in_one_piece() -> Iterator[None]:
    """Context manager: launchers pad rows to a power of two, and a program has one chunk of heads."""
    _chunks.chunks.cache_clear()
    file = sys.modules[qk_norm_rope.__module__]
    with mock.patch.object(_chunks, "COUNTS", (1,)), mock.patch.object(file, "cut", _one_chunk):
        yield
    _chunks.chunks.cache_clear()


def _one_chunk(H: int, block: int, tile: int, most: int, across: bool) -> tuple[int, int]:
    rows = 1 << (H - 1).bit_length()
    return (rows, 1) if across else (min(rows, 2048 // block), 1)


def counted(run: partial[Any], elements: int, nbytes: int) -> tuple[float, float]:
    """The share of idle lanes, and the KB in flight on a multiprocessor."""
    (kernel, *_) = aot.launches(TARGET, run)
    constants = {name: kernel.src.constants[place,] for place, name in enumerate(kernel.src.fn.arg_names)
                 if (place,) in kernel.src.constants}  # fmt: skip
    rows, chunks, block = (constants[name] for name in ("ROWS", "CHUNKS", "BLOCK"))
    by_heads = "H" in constants
    groups = -(-constants["H"] // (rows * chunks)) if by_heads else 1
    lanes = groups * rows * chunks * block if by_heads else chunks * block
    registers = -(-aot.cost(kernel).registers // 8) * 8
    threads = 32 * kernel.metadata.num_warps
    programs = min(REGISTERS // (registers * threads), THREADS // threads, PROGRAMS)
    loaded = nbytes / groups if by_heads else nbytes * rows
    return 1 - elements / lanes, programs * loaded / 1024


def main() -> int:
    """The command; returns its exit code."""
    rows = []
    for (op, name), (run, elements, nbytes) in launches().items():
        with in_one_piece():
            before = counted(run, elements, nbytes)
        after = counted(run, elements, nbytes)
        rows.append([op, name, f"{before[0]:.0%}", f"{after[0]:.0%}", f"{before[1]:.0f}", f"{after[1]:.0f}"])
        print(*rows[-1], sep=" | ", flush=True)
    command = "TRITON_INTERPRET=0 python -m benchmarks.lanes"
    report = {"command": command, "machine": machine(torch.device("cpu")), "target": TARGET}
    write(RESULTS / "lanes.json", report | {"columns": COLUMNS, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
