"""ALiBi in two dimensions (CROMA, Fuller et al., arXiv 2311.00566; slopes: ALiBi, Press et al., arXiv 2108.12409).

bias_ij = -m_t ||D||_2 with D the offset between query and key in patches. For h a power of two the slopes are
m_t = 2^(-8t/h), t = 1 .. h. For other h: those of the next smaller power of two, p, and then, of those of 2p, the
first, third, fifth, ... as many as are missing. The source has no prefix tokens; here pairs with one have bias 0.
"""

import math

import numpy as np

from tests.references.common import Array, Coordinates, Grid, places, with_prefix


def slopes(num_heads: int) -> list[float]:
    """m_1 .. m_h."""
    power = 1
    while 2 * power <= num_heads:
        power *= 2
    regular = [2 ** (-8 * t / power) for t in range(1, power + 1)]
    between = [2 ** (-8 * t / (2 * power)) for t in range(1, 2 * power + 1, 2)]
    return regular + between[: num_heads - power]


def bias(grid: Grid, num_heads: int, prefix: int = 0, x: Coordinates = None, y: Coordinates = None) -> Array:
    """(h, N, N)."""
    where = places(grid, x, y)
    table = np.zeros((num_heads, len(where), len(where)))
    for head, slope in enumerate(slopes(num_heads)):
        for query, (x_query, y_query) in enumerate(where):
            for key, (x_key, y_key) in enumerate(where):
                table[head, query, key] = -slope * math.hypot(x_key - x_query, y_key - y_query)
    return with_prefix(table, prefix)
