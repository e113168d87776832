"""Factorised table (NaViT, Dehghani et al., arXiv 2307.06304, the additive form; timm's NaFlexViT).

w = a_y + b_x: one vector per row and one per column. On another grid, and at places between cells, each axis is read by
itself, linearly, with the cells' centres as knots (half-pixel centres, no antialiasing) and the outermost cells
continued: place p of a side of n' cells is place (p + 1/2) n / n' - 1/2 of the table's n. Prefix tokens get zeros.
"""

import math

import numpy as np

from tests.references.common import Array, Coordinates, Grid, places


def read(axis: Array, place: float) -> Array:
    """The vector of ``axis`` (n, D) at a place, counted in its own cells from 0."""
    place = min(max(place, 0.0), len(axis) - 1.0)
    low = math.floor(place)
    high = min(low + 1, len(axis) - 1)
    return (1 - (place - low)) * axis[low] + (place - low) * axis[high]


def table(
    axis_y: Array, axis_x: Array, grid: Grid, prefix: int = 0, x: Coordinates = None, y: Coordinates = None
) -> Array:
    """(N, D) on ``grid``.

    Args:
        axis_y: the vectors of the trained grid's rows (n, D).
        axis_x: those of its columns.
    """
    height, width = len(axis_y), len(axis_x)
    rows = [np.zeros(axis_x.shape[1]) for _ in range(prefix)]
    for column, row in places(grid, x, y):
        vertical = read(axis_y, (row + 0.5) * height / grid[0] - 0.5)
        horizontal = read(axis_x, (column + 0.5) * width / grid[1] - 0.5)
        rows.append(vertical + horizontal)
    return np.array(rows)
