"""Learnable Fourier features (Li et al., arXiv 2106.02795, eq. 1 to 3, algorithm 1, with one group, G = 1).

    r = F^-1/2 [cos(W_r p), sin(W_r p)],     w = W2 gelu(W1 r + b1) + b2

W_r is (F/2, 2), drawn from N(0, gamma^-2) and trained; gelu is exact. Assumed, since the paper leaves it to the task:
p = ((x + 1/2) / W, (y + 1/2) / H), in [0, 1]^2, column first, on the grid at hand; prefix tokens get zeros.
"""

import math

import numpy as np

from tests.references.common import Array, Coordinates, Grid, gelu, places


def table(
    grid: Grid,
    frequencies: Array,
    weight1: Array,
    bias1: Array,
    weight2: Array,
    bias2: Array,
    prefix: int = 0,
    x: Coordinates = None,
    y: Coordinates = None,
) -> Array:
    """(N, D).

    Args:
        frequencies: W_r (F/2, 2), the column's first.
        weight1: (m, F), cosines first.
        weight2: (D, m).
    """
    rows = [np.zeros(len(weight2)) for _ in range(prefix)]
    for column, row in places(grid, x, y):
        p = (column + 0.5) / grid[1], (row + 0.5) / grid[0]
        phases = [w[0] * p[0] + w[1] * p[1] for w in frequencies]
        features = [math.cos(phase) for phase in phases] + [math.sin(phase) for phase in phases]
        hidden = []
        for weights, bias in zip(weight1, bias1, strict=True):
            total = sum(w * f / math.sqrt(len(features)) for w, f in zip(weights, features, strict=True))
            hidden.append(gelu(total + bias))
        rows.append(weight2 @ np.array(hidden) + bias2)
    return np.array(rows)
