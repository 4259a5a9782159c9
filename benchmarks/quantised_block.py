"""A Qwen-Image block at its real width on the CPU: in fp32, in bf16, and with its linear layers in int8.

    python -m benchmarks.quantised_block [--tokens 1024] [--rounds 7]   # a minute; writes results/quantised-block.json

All run in turns in one process, with random weights, fused. The time is the median of the rounds, and the ratio the
median of the rounds' ratios to fp32. Torch multiplies int8 quickly on CPUs with VNNI only; the file says if this one
has it. Modulation stays as it is, and all other linear layers are quantised.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

import omni_kernels
from benchmarks.results import RESULTS
from omni_kernels.validation.record import machine, write

D, HEADS, HEAD, TEXT = 3072, 24, 128, 128
COLUMNS = ["block", "ms", "of fp32's time", "relative error"]


def blocks() -> dict[str, Any]:
    """Name → a block with the same weights."""
    torch.manual_seed(0)
    block = QwenImageTransformerBlock(D, HEADS, HEAD).eval()
    made = {"fp32": copy.deepcopy(block), "bf16": copy.deepcopy(block).bfloat16()}
    for name in ("fp32", "bf16"):
        made[f"int8, {name} beside"] = copy.deepcopy(made[name])
    for name, one in made.items():
        transformer = torch.nn.Module()
        transformer.transformer_blocks = torch.nn.ModuleList([one])
        quantize = {"dtype": "int8", "include": ["img_mlp"], "keep": "none"} if "int8" in name else None
        omni_kernels.patch(SimpleNamespace(transformer=transformer), quantize=quantize)
    return made


def call_of(block: Any, tokens: int) -> Callable[[], torch.Tensor]:
    """A call of a block with the same inputs in its dtype; it returns the image's states in fp32."""
    dtype, generator = block.img_mod[1].weight.dtype, torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    turns = [torch.rand(n, HEAD // 2, generator=generator) for n in (tokens, TEXT)]
    angles = [torch.polar(torch.ones_like(one), one) for one in turns]
    x, text, temb = randn(1, tokens, D), randn(1, TEXT, D), randn(1, D)
    return lambda: block(x, text, None, temb, angles)[1].float()


@torch.no_grad()
def rows_of(tokens: int, rounds: int) -> list[list[str]]:
    """The table's rows."""
    torch.manual_seed(2)
    calls = {name: call_of(block, tokens) for name, block in blocks().items()}
    results = {name: call() for name, call in calls.items()}  # also the first call, which is slower
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    rows = []
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["fp32"], strict=True))
        error = float((results[name] - results["fp32"]).norm() / results["fp32"].norm())
        rows.append([name, f"{statistics.median(own) * 1e3:.0f}", f"{ratio:.2f}", f"{error:.1e}"])
    return rows


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised_block", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="of the image (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    options = parser.parse_args()
    rows = rows_of(options.tokens, options.rounds)
    for row in (COLUMNS, *rows):
        print(*row, sep=" | ")
    report = {
        "command": " ".join(["python -m benchmarks.quantised_block", *sys.argv[1:]]),
        "machine": machine(torch.device("cpu")),
        "vnni": bool(torch.cpu._is_vnni_supported()),
        "threads": torch.get_num_threads(),
        "tokens": options.tokens,
        "columns": COLUMNS,
        "rows": rows,
    }
    write(RESULTS / "quantised-block.json", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
