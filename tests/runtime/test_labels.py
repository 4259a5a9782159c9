"""Names beside the points of a plot."""

import itertools
import random

import pytest

from omni_runtime.compare import labels

FRAME = (46.0, 14.0, 542.0, 338.0)


def points_of(kind: str, count: int) -> list[labels.Point]:
    chance = random.Random(f"{kind} {count}")
    if kind == "same":
        return [(100.0, 100.0)] * count
    if kind == "cluster":
        return [(chance.gauss(300, 20), chance.gauss(150, 20)) for _ in range(count)]
    return [(60.0 + chance.randrange(6) * 80, chance.uniform(20, 330)) for _ in range(count)]


@pytest.mark.parametrize(("kind", "count"), [("columns", 40), ("cluster", 15), ("same", 8), ("columns", 0)])
def test_each_point_has_a_label_that_meets_nothing(kind: str, count: int) -> None:
    points = points_of(kind, count)
    names = [f"a name of some length, {number}"[: 8 + number % 20] + f" {number}" for number in range(count)]
    own = (46.0, 8.0, 126.0, 24.0)
    placed = labels.place(names, points, FRAME, [own], first=3)
    assert [label.point for label in placed] == list(range(count))
    assert [label.text for label in placed] == [
        str(3 + label.point) if label.numbered else names[label.point] for label in placed
    ]
    boxes = [label.box for label in placed]
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    assert not [pair for pair in itertools.combinations(boxes, 2) if labels.meet(*pair)]
    assert not [pair for pair in itertools.product(boxes, [*marks, own]) if labels.meet(*pair)]
    for left, top, right, bottom in boxes:
        assert FRAME[0] <= left < right <= FRAME[2]
        assert FRAME[1] <= top < bottom <= FRAME[3]
    for label in placed:
        if label.line:
            start, (x, y) = label.line
            left, top, right, bottom = label.box
            assert start == points[label.point]
            assert left <= x <= right, "the line ends at its label"
            assert top <= y <= bottom, "the line ends at its label"


def test_a_name_is_beside_its_point_before_all_else() -> None:
    (label,) = labels.place(["alone"], [(200.0, 100.0)], FRAME)
    assert label == labels.Label(0, "alone", 209.0, 104.0, "start")
    (label,) = labels.place(["at the right edge"], [(530.0, 100.0)], FRAME)
    assert label.box[2] == label.at == 530 - 9
    assert label.anchor == "end", "a text that is narrower than was estimated still ends at its point"


def test_a_name_further_off_has_a_line_that_passes_through_nothing() -> None:
    around = [(x, y, x + 40, y + 16) for x in range(120, 281, 40) for y in (76, 92, 108) if (x, y) != (200, 92)]
    hole = [(200.0, 92.0, 212.0, 108.0), (228.0, 92.0, 240.0, 97.0), (228.0, 103.0, 240.0, 108.0)]
    (label,) = labels.place(["far"], [(220.0, 100.0)], FRAME, [*around[:-6], *hole])
    assert label.line is not None
    assert not label.numbered
    (x, y), (to_x, to_y) = label.line
    passed = [(x + part / 50 * (to_x - x), y + part / 50 * (to_y - y)) for part in range(10, 51)]
    taken = [*around[:-6], *hole]
    assert not [place for place in passed for box in taken if labels.meet((*place, *place), box)]


def test_a_name_that_fits_nowhere_is_a_number() -> None:
    (label,) = labels.place(["w" * 60], [(200.0, 100.0)], FRAME, first=7)
    assert label == labels.Label(0, "7", 209.0, 104.0, "start", None, True)


def test_where_there_is_no_room_at_all_there_is_no_label() -> None:
    assert labels.place(["a", "b"], [(60.0, 30.0), (70.0, 30.0)], FRAME, [FRAME]) == []


def test_widths_are_of_letters() -> None:
    assert labels.width("") == 0
    assert labels.width("ill") < labels.width("aaa") < labels.width("WWW") == labels.width("猫猫猫") == 33
    assert labels.width("e\u0301") == labels.width("e"), "an accent of its own has no width"
