"""Log-spaced continuous position bias (Swin V2, Liu et al., arXiv 2111.09883; timm's RelPosMlp).

bias_ij = f(c(dy), c(dx)) with (dy, dx) = query minus key in patches, row first; f is a small MLP, W2 relu(W1 c + b1):

- ``swin``: c(a) = sign(a) log2(1 + 8 |a| / (n - 1)) / log2(8), n the side of the grid that the model was trained on
  (Swin V2's 8 keeps [-1, 1] in [-1, 1]); bias = 16 sigmoid(f), and W2 has no bias.
- ``cr``: c(a) = sign(a) ln(1 + |a|), with no side in it; bias = f + b2, without sigmoid.

Pairs with a prefix token have bias 0. Where an axis of the trained grid has one cell, n - 1 is taken as 1; this rule is
ours, since the source divides by zero there.
"""

import math

import numpy as np

from tests.references.common import Array, Coordinates, Grid, places, with_prefix


def log_offset(offset: float, mode: str, trained_side: int) -> float:
    if mode == "swin":
        size = math.log2(1 + 8 * abs(offset) / max(trained_side - 1, 1)) / math.log2(8)
    else:
        size = math.log(1 + abs(offset))
    return math.copysign(size, offset)


def coordinates(grid: Grid, mode: str, trained_grid: Grid) -> Array:
    """(2H - 1, 2W - 1, 2): (c(dy), c(dx)) of every offset of a whole grid, from -(H - 1) and -(W - 1) upwards."""
    height, width = grid
    return np.array(
        [
            [
                [log_offset(dy, mode, trained_grid[0]), log_offset(dx, mode, trained_grid[1])]
                for dx in range(1 - width, width)
            ]
            for dy in range(1 - height, height)
        ]
    )


def bias(
    grid: Grid,
    weight1: Array,
    bias1: Array,
    weight2: Array,
    bias2: Array | None = None,
    mode: str = "swin",
    trained_grid: Grid | None = None,
    prefix: int = 0,
    x: Coordinates = None,
    y: Coordinates = None,
) -> Array:
    """(h, N, N) of one layer.

    Args:
        weight1: (m, 2), the row's column first.
        bias1: (m,).
        weight2: (h, m).
        bias2: (h,), for ``cr``.
        trained_grid: None where it is ``grid``.
    """
    trained_grid = trained_grid or grid
    where = places(grid, x, y)
    table = np.zeros((len(weight2), len(where), len(where)))
    for query, (x_query, y_query) in enumerate(where):
        for key, (x_key, y_key) in enumerate(where):
            row = log_offset(y_query - y_key, mode, trained_grid[0])
            column = log_offset(x_query - x_key, mode, trained_grid[1])
            hidden = np.maximum(weight1[:, 0] * row + weight1[:, 1] * column + bias1, 0)
            for head, weights in enumerate(weight2):
                value = float(weights @ hidden) + (0.0 if bias2 is None else bias2[head])
                table[head, query, key] = 16 / (1 + math.exp(-value)) if mode == "swin" else value
    return with_prefix(table, prefix)
