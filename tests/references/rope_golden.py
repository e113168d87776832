"""Golden-ratio rotary encoding in n dimensions (vit-pytorch, vit_pytorch/vit_nd_rotary.py).

Each head and pair of channels has a fixed frequency vector in the plane: its length goes geometrically from
``min_frequency`` (pair 0) to ``max_frequency`` (pair d/2 - 1), the same in every head; its direction comes from a
low-discrepancy sequence. For the n-th pair counted through all heads, n = 1 .. h d/2, with phi the root of
phi^3 = phi + 1: z_a = fraction(n / phi^a) for the axes a = 1 (rows), 2 (columns), each z_a goes through the inverse of
the normal distribution, and the vector is normalised. A patch turns by frequency . (its row, its column); channel c
pairs with c + d/2. Prefix tokens are not turned.

The published code takes phi from ten steps of phi -> (1 + phi)^(1/3), which leaves it 4e-8 above the root.
"""

from statistics import NormalDist

import numpy as np

from tests.references.common import Array, Coordinates, Grid, places, rotate_halves


def golden_ratio() -> float:
    """The root of phi^3 = phi + 1, by bisection."""
    low, high = 1.0, 2.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle**3 < middle + 1 else (low, middle)
    return low


def golden_ratio_as_published() -> float:
    phi = 2.0
    for _ in range(10):
        phi = (1 + phi) ** (1 / 3)
    return phi


def frequencies(
    num_heads: int, head_dim: int, min_frequency: float, max_frequency: float, phi: float | None = None
) -> Array:
    """(h, d/2, 2): angle per unit of the row and per unit of the column."""
    phi = phi or golden_ratio()
    pairs = head_dim // 2
    normal = NormalDist()
    table = np.zeros((num_heads, pairs, 2))
    for head in range(num_heads):
        for pair in range(pairs):
            n = head * pairs + pair + 1
            down, right = (normal.inv_cdf(n * (1 / phi) ** axis % 1.0) for axis in (1, 2))
            length = (down**2 + right**2) ** 0.5
            magnitude = min_frequency * (max_frequency / min_frequency) ** (pair / (pairs - 1) if pairs > 1 else 0.0)
            table[head, pair] = magnitude * down / length, magnitude * right / length
    return table


def positions(grid: Grid, kind: str = "centred", x: Coordinates = None, y: Coordinates = None) -> Array:
    """(M, 2), row first: ``index`` in cells from 0; ``centred`` 2 (p + 1/2) / n - 1; ``ends`` -1 to 1 from the first
    cell to the last (-1 where an axis has one cell)."""

    def position(place: float, side: int) -> float:
        return {
            "index": place,
            "centred": 2 * (place + 0.5) / side - 1,
            "ends": 2 * place / max(side - 1, 1) - 1,
        }[kind]

    return np.array([[position(row, grid[0]), position(column, grid[1])] for column, row in places(grid, x, y)])


def rotate(
    q: Array,
    k: Array,
    grid: Grid,
    prefix: int = 0,
    min_frequency: float = 0.2,
    max_frequency: float = 20.0,
    kind: str = "centred",
    phi: float | None = None,
    x: Coordinates = None,
    y: Coordinates = None,
) -> tuple[Array, Array]:
    """q and k (B, h, N, d) after the rotation."""
    table, where = frequencies(q.shape[1], q.shape[-1], min_frequency, max_frequency, phi), positions(grid, kind, x, y)
    turns = np.zeros((q.shape[1], len(where), q.shape[-1] // 2))
    for head in range(q.shape[1]):
        for patch, (row, column) in enumerate(where):
            for pair in range(q.shape[-1] // 2):
                turns[head, patch, pair] = table[head, pair, 0] * row + table[head, pair, 1] * column
    return rotate_halves(q, turns, prefix), rotate_halves(k, turns, prefix)
