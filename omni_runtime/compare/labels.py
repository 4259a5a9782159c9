"""Names beside the points of a plot: every point has one, and no two meet.

    labels = place(names, points, frame)  # a label per point

A name stands beside its point where there is room. Else it stands further off, with a line to its point. Where that is
too far, the point's number stands for the name, for a list of numbers and names beneath the plot.

Everything is in px, with y downward. A box is (left, top, right, bottom).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Line = tuple[Point, Point]

#: A name that is further from its point than this is a number instead.
REACH = 110.0

#: Half the size of a point's mark, with a little room.
MARK = 6.0

#: The height of a name above its baseline, and below.
ABOVE, BELOW = 10.0, 3.0

#: So many free places, the nearest, are tried for a line that passes through nothing.
TRIED = 40


@dataclass(frozen=True)
class Label:
    """A text at a point.

    Attributes:
        point: which one, from 0.
        text: the name, or the number that stands for it.
        x, y: where the text begins at most, and its baseline.
        anchor: its side that is nearest to the point, as SVG calls it: "start", "middle" or "end".
        line: from the point to the text; None where the text is beside the point.
        numbered: whether the text is a number.
    """

    point: int
    text: str
    x: float
    y: float
    anchor: str
    line: Line | None = None
    numbered: bool = False

    @property
    def at(self) -> float:
        """Where the anchor is."""
        return self.x + width(self.text) * ("start", "middle", "end").index(self.anchor) / 2

    @property
    def box(self) -> Box:
        """What the text covers, at most."""
        return _box(self.x, self.y, width(self.text))


def place(
    names: Sequence[str],
    points: Sequence[Point],
    frame: Box,
    taken: Sequence[Box] = (),
    first: int = 1,
    favoured: int = 0,
) -> list[Label]:
    """A label for each point, in their order. Only of several hundred points, some may have none.

    Args:
        names: one per point.
        points: their centres.
        frame: the labels stay inside.
        taken: no label meets these boxes.
        first: the number of the first point.
        favoured: so many of the first points get their names before the others.
    """
    room = _Room(frame, [*taken, *((x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points)])
    numbers = [str(first + index) for index in range(len(names))]
    found: dict[int, Label] = {}
    every, some = range(len(names)), range(favoured)
    ways = [(False, find, of) for of in (some, every) for find in (room.beside, room.near)]
    ways += [(True, find, every) for find in (room.beside, room.near, room.anywhere)]
    for numbered, find, of in ways:
        for index in of:
            point, text = points[index], (numbers if numbered else names)[index]
            if index not in found and (where := find(point, width(text))):
                x, y, line = where
                found[index] = Label(index, text, x, y, _anchor(point[0], x, x + width(text)), line, numbered)
    return [found[index] for index in sorted(found)]


def width(text: str) -> float:
    """An upper estimate of a text's width at 11 px, in the widest of the usual fonts (DejaVu Sans)."""
    return sum(map(_letter, text))


def meet(a: Box, b: Box) -> bool:
    """Whether two boxes have some area in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class _Room:
    """What is still free. Each of its questions takes the place that it answers with."""

    def __init__(self, frame: Box, boxes: Sequence[Box]) -> None:
        self._frame = frame
        self._taken = np.ones((math.ceil(frame[3]), math.ceil(frame[2])), dtype=bool)  # a row per px of height
        self._set(frame, False)
        for box in boxes:
            self._set(box)

    def beside(self, point: Point, wide: float) -> tuple[float, float, None] | None:
        """Where a text so wide can begin right beside a point, and no line; None where there is no room."""
        for place in self._free(_beside(point, wide), wide):
            self._set(_box(*place, wide))
            return (*place, None)
        return None

    def near(self, point: Point, wide: float) -> tuple[float, float, Line] | None:
        """Where a text can begin within reach of a point, and the line to it, which passes through nothing."""
        for place in self._around(point, wide, REACH)[:TRIED]:
            line = _line(point, _box(*place, wide))
            if self._clear(line):
                return self._joined(place, wide, line)
        return None

    def anywhere(self, point: Point, wide: float) -> tuple[float, float, Line] | None:
        """Where a text can begin at all, as near as may be, and the line to it."""
        for place in self._around(point, wide, math.inf):
            return self._joined(place, wide, _line(point, _box(*place, wide)))
        return None

    def _joined(self, place: Point, wide: float, line: Line) -> tuple[float, float, Line]:
        self._set(_box(*place, wide))
        self._taken[tuple(_along(line).T)] = True
        return (*place, line)

    def _set(self, box: Box, taken: bool = True) -> None:
        left, top, right, bottom = _pixels(np.array(box))
        self._taken[max(top, 0) : bottom, max(left, 0) : right] = taken

    def _around(self, point: Point, wide: float, reach: float) -> list[Point]:
        """The free places of a text, the nearest first."""
        left, top, right, bottom = self._frame
        grid = np.meshgrid(np.arange(left + 1, right - wide, 6), np.arange(top + ABOVE + 1, bottom - BELOW, 4))
        places = np.stack([axis.ravel() for axis in grid], axis=-1)
        boxes = _boxes(places, wide)
        ends = np.clip(point, boxes[:, :2], boxes[:, 2:])
        distances = np.hypot(*(ends - point).T)
        order = np.argsort(distances, kind="stable")
        return self._free(places[order[distances[order] <= reach]], wide)

    def _free(self, places: Any, wide: float) -> list[Point]:
        """Those of the places (array of n × 2) where a text meets nothing, and is inside the frame."""
        height, width = self._taken.shape
        left, top, right, bottom = _pixels(_boxes(places, wide)).T
        inside = (left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)
        sums = np.zeros((height + 1, width + 1), dtype=np.int32)  # how many px are taken above, and to the left
        sums[1:, 1:] = self._taken.cumsum(0).cumsum(1)
        left, top, right, bottom = left[inside], top[inside], right[inside], bottom[inside]
        met = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return [(float(x), float(y)) for x, y in places[inside][met == 0]]

    def _clear(self, line: Line) -> bool:
        """Whether a line passes through nothing but the mark where it begins."""
        along = _along(line)
        return not self._taken[tuple(along[np.abs(along - line[0][::-1]).max(-1) > MARK + 1].T)].any()


def _pixels(boxes: Any) -> Any:
    """The px that boxes (… × 4) cover, the last of each excluded."""
    return np.concatenate([np.floor(boxes[..., :2]), np.ceil(boxes[..., 2:])], axis=-1).astype(int)


def _letter(letter: str) -> float:
    if letter in "fijlrtI.,:;'|!()[] ":
        return 4.7
    if not letter.isascii() or letter in "mwMW@%":
        return 0.0 if unicodedata.combining(letter) else 11.0
    return 9.3 if letter.isupper() or letter in "+<=>~#&^" else 7.0


def _box(x: float, y: float, wide: float) -> Box:
    return x, y - ABOVE, x + wide, y + BELOW


def _boxes(places: Any, wide: float) -> Any:
    """The box of a text at each of the places: n × 4."""
    x, y = places.T
    return np.stack([x, y - ABOVE, x + wide, y + BELOW], axis=-1)


def _beside(point: Point, wide: float) -> Any:
    """Where a text that is so wide begins beside a point: the best place first. An array of 8 × 2."""
    right, left, middle = 7, -7 - wide, -wide / 2
    sides = [(9, 4), (-9 - wide, 4), (middle, -10), (middle, 18), (right, -8), (right, 16), (left, -8), (left, 16)]
    return np.array(point) + sides


def _anchor(x: float, left: float, right: float) -> str:
    """Which side of a text is nearest to a point at x."""
    return "start" if x <= left else "end" if x >= right else "middle"


def _line(point: Point, box: Box) -> Line:
    """From a point to the nearest place of a box."""
    return point, (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))


def _along(line: Line) -> Any:
    """The px under a line, each as row and column."""
    places = np.linspace(*line, math.ceil(math.dist(*line)) + 1)
    return places[:, ::-1].astype(int)
