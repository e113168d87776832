"""What several references share: where the patches are, prefix tokens, rotation of pairs of channels."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Grid = tuple[int, int]
Coordinates = Sequence[float] | None


def places(grid: Grid, x: Coordinates = None, y: Coordinates = None) -> list[tuple[float, float]]:
    """(x, y) of each patch."""
    if x is None and y is None:
        return [(float(column), float(row)) for row in range(grid[0]) for column in range(grid[1])]
    assert x is not None
    assert y is not None
    return list(zip(x, y, strict=True))


def with_prefix(bias: Array, prefix: int) -> Array:
    """(..., M, M) to (..., N, N): zero for every pair with a prefix token."""
    tokens = prefix + bias.shape[-1]
    padded = np.zeros((*bias.shape[:-2], tokens, tokens))
    padded[..., prefix:, prefix:] = bias
    return padded


def rotate_halves(tokens: Array, angles: Array, prefix: int) -> Array:
    """Turn the pair of channels (c, c + d/2) of every patch by its angle; prefix tokens stay as they are.

    (a, b) becomes (a cos - b sin, b cos + a sin).

    Args:
        tokens: queries or keys (B, h, N, d).
        angles: (h, M, d/2) in radians.
    """
    turned = tokens.copy()
    batch, heads, _, width = tokens.shape
    half = width // 2
    for index in range(batch):
        for head in range(heads):
            for patch in range(angles.shape[1]):
                for pair in range(half):
                    angle = angles[head, patch, pair]
                    a = tokens[index, head, prefix + patch, pair]
                    b = tokens[index, head, prefix + patch, pair + half]
                    turned[index, head, prefix + patch, pair] = a * math.cos(angle) - b * math.sin(angle)
                    turned[index, head, prefix + patch, pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def gelu(value: float) -> float:
    """value Phi(value), exact."""
    return 0.5 * value * (1 + math.erf(value / math.sqrt(2)))


def softmax(logits: Array) -> Array:
    """Over one vector."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
