"""Edits of pictures by instruction: the instruction, and the true edited picture.

A reference is a scene of one emoji, drawn a little smaller than in scenes.py so that it can grow. The scene is known,
so the true edit can be drawn: uint8 [side, side, 3] like the reference. Edits that would change the picture very little
are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .scenes import COLOURS, EMOJI, Drawing, Sprite, background, is_held_out, with_article

__all__ = [
    "EDITS",
    "INSTRUCTIONS",
    "LISTED_PER_KIND",
    "Edit",
    "EditScene",
    "edit_scene",
    "every_result",
    "instruction_of",
    "listed_edits",
]

REFERENCE_SIZE = (0.45, 0.7)  # of the side
LARGER, SMALLER = 1.35, 0.65
FRAME = 8 / 64  # of the side: the width of the VAE's blocks, which reconstruct it better than thinner ones
DARKER = 0.5
LISTED_SEED, LISTED_PER_KIND = 8, 4
UNCHANGED = 0.004  # a picture counts as unchanged below this mean square difference of values in [0, 1]: 24 dB


@dataclass(frozen=True)
class Edit:
    """A kind of edit.

    Attributes:
        words: the instruction, with {} for the choice, or {a} for the choice with its article.
        choices: the possible choices; ONCE if there is no choice.
        result: (drawing, choice) → the true edit.
    """

    words: str
    choices: tuple[str, ...]
    result: Callable[[Drawing, str], np.ndarray]


def redrawn(drawing: Drawing, **changes: object) -> np.ndarray:
    return replace(drawing, sprites=(replace(drawing.sprites[0], **changes),)).picture()


def resized(drawing: Drawing, factor: float) -> np.ndarray:
    """The emoji scaled around its centre, and moved into the picture if necessary."""
    sprite, side = drawing.sprites[0], drawing.background.width
    size = min(round(sprite.size * factor), side)
    left, top = (
        min(max(round(start + (sprite.size - size) / 2), 0), side - size) for start in (sprite.left, sprite.top)
    )
    return redrawn(drawing, left=left, top=top, size=size)


def grey(picture: np.ndarray) -> np.ndarray:
    """Rec. 601 luma in all three channels."""
    return np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2).round().astype(np.uint8)


def darker(picture: np.ndarray) -> np.ndarray:
    return (picture * DARKER).round().astype(np.uint8)


def centred(drawing: Drawing) -> np.ndarray:
    start = (drawing.background.width - drawing.sprites[0].size) // 2
    return redrawn(drawing, left=start, top=start)


def on_colour(drawing: Drawing, colour: str) -> np.ndarray:
    solid = Image.new("RGBA", drawing.background.size, (*COLOURS[colour], 255))
    return replace(drawing, background=solid).picture()


def framed(picture: np.ndarray, colour: str) -> np.ndarray:
    width = round(FRAME * len(picture))
    result = np.empty_like(picture)
    result[:] = COLOURS[colour]
    result[width:-width, width:-width] = picture[width:-width, width:-width]
    return result


ONCE = ("",)
EDITS: dict[str, Edit] = {
    "mirror": Edit("mirror it", ONCE, lambda drawing, _: drawing.picture()[:, ::-1]),
    "upside_down": Edit("turn it upside down", ONCE, lambda drawing, _: drawing.picture()[::-1, ::-1]),
    "gray": Edit("make it gray", ONCE, lambda drawing, _: grey(drawing.picture())),
    "darker": Edit("make it darker", ONCE, lambda drawing, _: darker(drawing.picture())),
    "larger": Edit("make it larger", ONCE, lambda drawing, _: resized(drawing, LARGER)),
    "smaller": Edit("make it smaller", ONCE, lambda drawing, _: resized(drawing, SMALLER)),
    "middle": Edit("put it in the middle", ONCE, lambda drawing, _: centred(drawing)),
    "background": Edit("put it on {}", tuple(COLOURS), on_colour),
    "frame": Edit("add {a} frame", tuple(COLOURS), lambda drawing, colour: framed(drawing.picture(), colour)),
    "emoji": Edit(
        "turn it into {a}", tuple(EMOJI), lambda drawing, name: redrawn(drawing, stem=EMOJI[name], mirrored=False)
    ),
}


def instruction_of(kind: str, choice: str) -> str:
    """ "put it on red" for ("background", "red")."""
    return EDITS[kind].words.format(choice, a=choice and with_article(choice))


#: Every instruction: its words -> (kind, choice).
INSTRUCTIONS = {instruction_of(kind, choice): (kind, choice) for kind, edit in EDITS.items() for choice in edit.choices}


@dataclass(frozen=True)
class EditScene:
    """A reference (its drawing and its emoji's name), an instruction with its kind, and the true edit."""

    name: str
    drawing: Drawing
    kind: str
    instruction: str
    target: np.ndarray

    @property
    def reference(self) -> np.ndarray:
        """The picture to be edited."""
        return self.drawing.picture()


def is_unchanged(picture: np.ndarray, reference: np.ndarray) -> bool:
    return np.square(picture / 255.0 - reference / 255.0).mean() < UNCHANGED


def edit_scene(seed: int, index: int, side: int = 64, kind: str | None = None) -> EditScene:
    """Edit number `index` of the endless set `seed`, of any kind or of the given one."""
    rng = random.Random(f"edit/{seed}/{index}/{kind or ''}")
    while True:
        name = rng.choice(list(EMOJI))
        colour = rng.choice([*COLOURS, None])
        size = round(rng.uniform(*REFERENCE_SIZE) * side)
        left, top = rng.randint(0, side - size), rng.randint(0, side - size)
        sprite = Sprite(EMOJI[name], left, top, size, rng.random() < 0.5)
        drawing = Drawing(background(rng, colour, side), (sprite,))
        chosen = kind or rng.choice(list(EDITS))
        choice = rng.choice(EDITS[chosen].choices)
        target = np.ascontiguousarray(EDITS[chosen].result(drawing, choice))
        if not is_held_out((name,), colour) and not is_unchanged(target, drawing.picture()):
            return EditScene(name, drawing, chosen, instruction_of(chosen, choice), target)


def listed_edits(side: int) -> list[EditScene]:
    """The edits of the contact sheet, on references that are not in training.

    They are sorted by kind. So an evenly spaced choice of a few of them has all kinds equally often.
    """
    return [edit_scene(LISTED_SEED, number, side, kind) for kind in EDITS for number in range(LISTED_PER_KIND)]


def every_result(drawing: Drawing) -> dict[str, np.ndarray]:
    """The true result of each instruction on this reference; "" is the unchanged reference."""
    results = {words: EDITS[kind].result(drawing, choice) for words, (kind, choice) in INSTRUCTIONS.items()}
    return {"": drawing.picture(), **results}
