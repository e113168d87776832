"""DINOv3's augmentation of coordinates (arXiv 2508.10104; dinov3/layers/rope_position_encoding.py).

In training a coordinate u in [-1, 1] becomes (u + shift) jitter rescale, in this order: shift is uniform in [-s, s] and
jitter log-uniform in [1/j, j], each drawn per axis; rescale is log-uniform in [1/r, r], one number for both axes. There
is one draw per forward, the same for all images, heads and layers.

In cells, with n the side that u is divided by (u = 2 (x + 1/2) / n - 1): the centre of the grid, x = (n - 1)/2, stays
where it is under jitter and rescale, and a shift of 1 is half a side.
"""

from tests.references.common import Coordinates, Grid, places
from tests.references.rope_dinov3 import sides


def augmented(
    grid: Grid,
    shift: tuple[float, float] = (0.0, 0.0),
    jitter: tuple[float, float] = (1.0, 1.0),
    rescale: float = 1.0,
    normalize: str = "separate",
    x: Coordinates = None,
    y: Coordinates = None,
) -> tuple[list[float], list[float]]:
    """x and y in cells after a draw; ``shift`` and ``jitter`` are (y, x), row first, as in the source."""
    columns, rows = [], []
    height, width = sides(grid, normalize)
    for column, row in places(grid, x, y):
        u = (2 * (column + 0.5) / width - 1 + shift[1]) * jitter[1] * rescale
        v = (2 * (row + 0.5) / height - 1 + shift[0]) * jitter[0] * rescale
        columns.append((u + 1) * width / 2 - 0.5)
        rows.append((v + 1) * height / 2 - 0.5)
    return columns, rows
