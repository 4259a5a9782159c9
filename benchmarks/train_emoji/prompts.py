"""The prompts in the folders of the models that draw from captions."""

from __future__ import annotations

import random
from pathlib import Path

from .scenes import COLOURS, EMOJI, HELD_OUT_COLOURS, HELD_OUT_PAIRS, VOCABULARY, caption_of, is_held_out

__all__ = ["caption_prompts"]


def contact_sheet_prompts(count: int = 64) -> list[str]:
    """Every emoji alone, every emoji on a colour, then pairs, half of them on a colour; none of them is held out."""
    rng = random.Random("contact sheet")
    prompts = [caption_of((name,), article=number % 2 == 1) for number, name in enumerate(EMOJI)]
    for name in EMOJI:
        allowed = [colour for colour in COLOURS if not is_held_out((name,), colour)]
        prompts.append(caption_of((name,), rng.choice(allowed)))
    while len(prompts) < count:
        names = tuple(rng.sample(list(EMOJI), 2))
        colour = rng.choice(list(COLOURS)) if len(prompts) % 2 else None
        if not is_held_out(names, colour):
            prompts.append(caption_of(names, colour))
    return prompts[:count]


def held_out_prompts(count: int = 32) -> list[str]:
    """Compositions that are never in training: half on a colour ("a penguin on pink" first), half pairs."""
    rng = random.Random("held out")
    colours = sorted(HELD_OUT_COLOURS - {("penguin", "pink")})
    chosen = [("penguin", "pink"), *rng.sample(colours, count // 2 - 1)]
    pairs = rng.sample(sorted(tuple(sorted(pair)) for pair in HELD_OUT_PAIRS), count // 2)
    return [caption_of((name,), colour) for name, colour in chosen] + [caption_of(pair) for pair in pairs]


def caption_prompts(folder: Path, side: int) -> dict:
    """The content of prompts.json; writes no files."""
    return {"contact_sheet": contact_sheet_prompts(), "held_out": held_out_prompts(), "vocabulary": VOCABULARY}
