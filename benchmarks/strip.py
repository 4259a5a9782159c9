"""The picture strip of the README: the same prompts without a cache and with the velocity cache at two budgets.

    python -m benchmarks.strip   # a minute; writes docs/images/strip.png

Each row is one run of emoji-qwen-image, 50 steps with guidance, one seed. A row's label has the number of computed
steps, the speedup, and the mean PSNR over its pictures against the row without a cache. The speedup is the time
without the cache over the time with it. Each time is the shortest of 5; the rows take turns.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from omni_runtime import Omni
from omni_runtime.compare import quality

OUT = Path(__file__).parents[1] / "docs" / "images" / "strip.png"
PROMPTS = ("a penguin", "a rocket", "red apple on blue", "a wolf and a castle", "a mushroom on orange")
STEPS, SEED, ROUNDS, SIDE, LABEL = 50, 0, 5, 128, 26
ROWS: tuple[dict[str, Any], ...] = ({}, {"budget": 25}, {"budget": 13})


def pictures(omni: Omni) -> tuple[list[Image.Image], float]:
    """A picture of each prompt, and the total seconds."""
    start = time.perf_counter()
    made = [omni.generate(prompt=one, num_inference_steps=STEPS, seed=SEED)[0].images[0] for one in PROMPTS]
    return made, time.perf_counter() - start


def _tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).movedim(-1, -3)


def strip(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """One image with each row's label, and its pictures below."""
    font = ImageFont.load_default(16)
    sheet = Image.new("RGB", (SIDE * len(PROMPTS), (SIDE + LABEL) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows):
        top = row * (SIDE + LABEL)
        draw.text((4, top + 3), label, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (column * SIDE, top + LABEL))
    return sheet


def main() -> int:
    """The command; returns its exit code."""
    torch.set_num_threads(1)
    omnis = [
        Omni("emoji-qwen-image", cache_backend="velocity_cache" if config else None, cache_config=config or None)
        for config in ROWS
    ]
    rounds = [[pictures(omni) for omni in omnis] for _ in range(ROUNDS)]
    reference, *others = (made for made, _ in rounds[0])
    seconds = [min(took for _, took in row) for row in zip(*rounds, strict=True)]
    rows = [(f"no cache: {STEPS} steps", reference)]
    for config, made, took in zip(ROWS[1:], others, seconds[1:], strict=True):
        psnr = quality.psnr(_tensor(made), _tensor(reference)).mean()
        rows.append((f"{config['budget']} steps computed: {seconds[0] / took:.1f}x as fast, {psnr:.0f} dB", made))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    strip(rows).save(OUT, optimize=True)
    print("\n".join(label for label, _ in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
