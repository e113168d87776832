"""Rotary encoding of DINOv3 (Simeoni et al., arXiv 2508.10104; dinov3/layers/rope_position_encoding.py).

u = 2 (x + 1/2) / W - 1 and v = 2 (y + 1/2) / H - 1; with ``normalize`` max or min both are divided by the longer or
the shorter side. Pair i = 0 .. d/4 - 1 of an axis turns by 2 pi u / theta^(4i/d). The d/2 angles are y's d/4 first,
then x's; channel c pairs with channel c + d/2. All heads turn alike. Prefix tokens are not turned.
"""

import math

import numpy as np

from tests.references.common import Array, Coordinates, Grid, places, rotate_halves


def sides(grid: Grid, normalize: str) -> tuple[int, int]:
    """What the rows and the columns are divided by."""
    return {"separate": grid, "max": (max(grid), max(grid)), "min": (min(grid), min(grid))}[normalize]


def angles(
    grid: Grid,
    head_dim: int,
    theta: float = 100.0,
    normalize: str = "separate",
    x: Coordinates = None,
    y: Coordinates = None,
) -> Array:
    """(M, d/2) in radians."""
    height, width = sides(grid, normalize)
    rows = []
    for column, row in places(grid, x, y):
        v = 2 * (row + 0.5) / height - 1
        u = 2 * (column + 0.5) / width - 1
        periods = [theta ** (4 * pair / head_dim) for pair in range(head_dim // 4)]
        rows.append([2 * math.pi * place / period for place in (v, u) for period in periods])
    return np.array(rows)


def rotate(
    q: Array,
    k: Array,
    grid: Grid,
    prefix: int = 0,
    theta: float = 100.0,
    normalize: str = "separate",
    x: Coordinates = None,
    y: Coordinates = None,
) -> tuple[Array, Array]:
    """q and k (B, h, N, d) after the rotation."""
    turns = np.stack([angles(grid, q.shape[-1], theta, normalize, x, y)] * q.shape[1])
    return rotate_halves(q, turns, prefix), rotate_halves(k, turns, prefix)
