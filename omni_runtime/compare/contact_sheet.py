"""The contact sheet: one picture with a labelled grid of images, a row per prompt and a column per run.

Pillow's built-in font has neither × nor …: labels are written without them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

CELL = 192
GAP = 10
ROW_LABEL = 190
HEADING_LINE = 17
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


def draw(
    images: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[Sequence[str]],
) -> Image.Image:
    """Draw the grid as an RGB image.

    Args:
        images: [row][column], of any sizes; each is scaled into a square cell.
        captions: [row][column], a few words below each image.
        rows: the label of each row: its prompt.
        columns: the lines above each column; the first line is its name.

    Raises:
        ValueError: the numbers of rows, columns, images and captions do not match.
    """
    for grid in (images, captions):
        if len(grid) != len(rows) or any(len(row) != len(columns) for row in grid):
            raise ValueError(f"the grid is not {len(rows)} rows of {len(columns)} columns")
    heading = HEADING_LINE * max(len(lines) for lines in columns) + GAP
    row_height = CELL + HEADING_LINE + GAP
    size = (ROW_LABEL + len(columns) * (CELL + GAP) + GAP, heading + GAP + len(rows) * row_height)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    name_font, font = _font(14), _font(12)
    for column, lines in enumerate(columns):
        x = ROW_LABEL + column * (CELL + GAP)
        for number, line in enumerate(lines):
            heading_font = name_font if number == 0 else font
            ink = INK if number == 0 else FAINT
            pen.text((x, GAP + number * HEADING_LINE), _fitted(pen, line, heading_font), ink, heading_font)
    for row, label in enumerate(rows):
        y = heading + GAP + row * row_height
        pen.multiline_text((GAP, y), _wrapped(label), INK, font, spacing=4)
        for column, image in enumerate(images[row]):
            x = ROW_LABEL + column * (CELL + GAP)
            sheet.paste(_scaled(image), (x, y))
            pen.text((x, y + CELL + 2), captions[row][column], FAINT, font)
    return sheet


def _scaled(image: Image.Image) -> Image.Image:
    """Scale an image into a square cell: small ones by a whole factor, pixel by pixel; large ones with a filter."""
    image = image.convert("RGB")
    longest = max(image.size)
    if longest <= CELL:
        factor = CELL // longest
        scaled = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        scaled = image.copy()
        scaled.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    cell.paste(scaled, (0, CELL - scaled.height))  # at the bottom left: right above its caption
    return cell


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow 10.0: one size only
        return ImageFont.load_default()


def _fitted(pen: ImageDraw.ImageDraw, line: str, font: Any) -> str:
    while line and pen.textlength(line, font) > CELL:
        line = f"{line.removesuffix('...')[:-1]}..." if len(line) > 4 else ""
    return line


def _wrapped(label: str) -> str:
    lines = textwrap.wrap(label, 26)
    return "\n".join([*lines[:7], "..."] if len(lines) > 8 else lines)
