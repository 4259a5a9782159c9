"""The axes of our SVG plots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: The plot's width, and the margins on both sides. The values are written on the left, what the lines are on the right.
WIDTH, LEFT, RIGHT = 640, 56, 90


def axes(
    height: int, top: int, bottom: int, low: float, high: float, decimals: int = 0, title: str = ""
) -> tuple[list[str], Callable[[float], float]]:
    """The beginning of a plot: its head and five grid lines with their values. `</svg>` must follow.

    Args:
        height: the plot's height.
        top, bottom: margins.
        low, high: the values of the lowest and the highest grid line.
        decimals: the number of decimals of the values.
        title: SVG that is written before the lines.

    Returns:
        The parts of the SVG, and value → the y coordinate.
    """

    def y(value: float) -> float:
        return height - bottom - (height - bottom - top) * (value - low) / (high - low)

    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="#fff"/>{title}'
    )
    lines = [
        f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.{decimals}f}</text>'
        for value in np.linspace(low, high, 5)
    ]
    return [head, *lines], y
