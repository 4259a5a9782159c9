"""Captioned clips of one emoji that moves, turns, grows or shrinks, rendered from a seed.

A clip is uint8 [FRAMES, side, side, 3] with a caption: "a fox moves left on blue". The background is that of scenes.py,
and stands still. The caption does not say how large the emoji is, where exactly it starts, whether it is mirrored, how
fast it is, and whether the background is solid or a gradient.

The world is smaller than in scenes.py, 8 emoji on 6 colours, because a clip costs several times as much as a picture.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import EMOJI, Scene, artwork_at, background, is_held_out, with_article

__all__ = [
    "CLIP_COLOURS",
    "CLIP_EMOJI",
    "FRAMES",
    "MOTIONS",
    "all_clip_captions",
    "clip",
    "clip_caption",
    "clip_prompts",
]

FRAMES = 17
CLIP_EMOJI = ("red apple", "banana", "frog", "fox", "penguin", "octopus", "rocket", "ghost")
CLIP_COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")

SIZE, LARGE_SIZE = (0.46, 0.56), (0.66, 0.8)  # of the side; the second is the largest one of what grows or shrinks
OFF_CENTRE = 0.05  # of the side, either way: the middle of the path
TRAVEL = (0.3, 0.38)  # of the side
TURN = (90.0, 130.0)  # degrees, clockwise
GROWTH = (0.45, 0.6)  # the smaller size as a share of the larger one


@dataclass(frozen=True)
class Motion:
    """What changes from the first frame to the last: a path of `travel` along (x, y), a turn, a growth (1, -1, 0)."""

    across: int = 0
    down: int = 0
    turn: bool = False
    growth: int = 0


MOTIONS: dict[str, Motion] = {
    "moves left": Motion(across=-1),
    "moves right": Motion(across=1),
    "moves up": Motion(down=-1),
    "moves down": Motion(down=1),
    "turns": Motion(turn=True),
    "grows": Motion(growth=1),
    "shrinks": Motion(growth=-1),
}


def clip_caption(name: str, motion: str, colour: str) -> str:
    """ "a fox moves left on blue"."""
    return f"{with_article(name)} {motion} on {colour}"


def all_clip_captions() -> list[str]:
    """Every caption, including those that are never in training."""
    return [clip_caption(name, motion, colour) for name in CLIP_EMOJI for motion in MOTIONS for colour in CLIP_COLOURS]


def transformed(
    picture: Image.Image, side: int, centre: tuple[float, float], scale: float, angle: float
) -> Image.Image:
    """An RGBA picture on an empty square of `side` pixels, scaled and turned clockwise (degrees) around its centre."""
    cosine, sine = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    middle = picture.width / 2
    x, y = centre
    inverse = (cosine, sine, middle - cosine * x - sine * y, -sine, cosine, middle + sine * x - cosine * y)
    return picture.transform((side, side), Image.AFFINE, inverse, Image.BICUBIC)


def render_clip(rng: random.Random, stem: str, motion: Motion, colour: str, side: int) -> np.ndarray:
    """A clip of a Twemoji file, uint8 [FRAMES, side, side, 3]; everything that is not given is drawn from `rng`."""
    ground = background(rng, colour, side)
    largest = round(rng.uniform(*(LARGE_SIZE if motion.growth else SIZE)) * side)
    picture = artwork_at(stem, largest, rng.random() < 0.5)
    middle = [side / 2 + rng.uniform(-OFF_CENTRE, OFF_CENTRE) * side for _ in range(2)]
    travel, turn, smallest = rng.uniform(*TRAVEL) * side, rng.uniform(*TURN), rng.uniform(*GROWTH)
    frames = []
    for number in range(FRAMES):
        time = number / (FRAMES - 1)
        centre = tuple(
            m + way * travel * (time - 0.5) for m, way in zip(middle, (motion.across, motion.down), strict=True)
        )
        grown = {0: 1.0, 1: time, -1: 1.0 - time}[motion.growth]
        frame = ground.copy()
        frame.alpha_composite(
            transformed(picture, side, centre, smallest + (1.0 - smallest) * grown, turn * time * motion.turn)
        )
        frames.append(np.array(frame.convert("RGB")))
    return np.stack(frames)


def draw_clip(rng: random.Random, stem: str, side: int) -> np.ndarray:
    """A clip of a Twemoji file with any motion, on any colour."""
    return render_clip(rng, stem, rng.choice(list(MOTIONS.values())), rng.choice(CLIP_COLOURS), side)


def clip(seed: int, index: int, side: int = 64) -> tuple[Scene, np.ndarray]:
    """Clip number `index` of the endless set `seed`: its content, and uint8 [FRAMES, side, side, 3]."""
    rng = random.Random(f"clip/{seed}/{index}")
    while True:
        name, motion, colour = rng.choice(CLIP_EMOJI), rng.choice(list(MOTIONS)), rng.choice(CLIP_COLOURS)
        if not is_held_out((name,), colour):
            break
    content = Scene((name,), colour, clip_caption(name, motion, colour))
    return content, render_clip(rng, EMOJI[name], MOTIONS[motion], colour, side)


def clip_prompts(folder: Path, side: int) -> dict:
    """The content of prompts.json; writes no files. Every emoji with every motion, then emoji on colours that training
    never showed together."""
    rng = random.Random("clips")
    held_out = [(name, colour) for name in CLIP_EMOJI for colour in CLIP_COLOURS if is_held_out((name,), colour)]
    shown = []
    for name in CLIP_EMOJI:
        colours = [colour for colour in CLIP_COLOURS if (name, colour) not in held_out]
        shown += [clip_caption(name, motion, rng.choice(colours)) for motion in MOTIONS]
    return {
        "contact_sheet": shown,
        "held_out": [clip_caption(name, motion, colour) for name, colour in held_out for motion in MOTIONS],
        "vocabulary": {"emoji": CLIP_EMOJI, "motions": list(MOTIONS), "colours": CLIP_COLOURS},
    }
