"""LookHere (Fuller et al., arXiv 2405.13985; GreenCUBIC/lookhere).

bias_ij = -g s_l m_t ||D|| where the key lies inside the head's field of view, -inf outside; D = key minus query, in
patches, y downwards. g = 2; s_l goes linearly from 1.5 in the first layer to 0.5 in the last. Rows and columns of
prefix tokens are 0. Borders of a field of view belong to it, and every patch sees itself.

Fields of view of the directed heads, four of a kind, in this order:

- corners (90 degrees): up-left, up-right, down-left, down-right
- triangles (90): up, down, left, right, where the wider of the two offsets points
- halves (180): up, down, left, right
- diagonals (180): two triangles together: up and right, up and left, down and right, down and left
- eighths1 (45): halves of the triangles up, down, left, right: the left halves of up and down, the upper of left, right
- eighths2 (45): the other halves

View 90 is corners and triangles, 180 halves and diagonals, 45 eighths1 and eighths2. With 12 heads: four of the first
kind and four of the second (m = 1/2), then four that look everywhere (m = 1/4, 1/16, 1/64, 1/256). 16 heads have the
first kind a second time with m = 1/4, between the two. 6 heads have the first kind and two that look everywhere
(m = 1/4, 1/16). The source knows no other numbers of heads, and neither does this file.
"""

import math
from collections.abc import Callable

import numpy as np

from tests.references.common import Array, Coordinates, Grid, places, with_prefix

View = Callable[[float, float], bool]
"""Whether an offset (dx, dy), key minus query, is seen."""


def up(dx: float, dy: float) -> bool:
    return -dy >= abs(dx)


def down(dx: float, dy: float) -> bool:
    return dy >= abs(dx)


def left(dx: float, dy: float) -> bool:
    return -dx >= abs(dy)


def right(dx: float, dy: float) -> bool:
    return dx >= abs(dy)


def everywhere(dx: float, dy: float) -> bool:
    return True


KINDS: dict[str, list[View]] = {
    "corners": [
        lambda dx, dy: dx <= 0 and dy <= 0,
        lambda dx, dy: dx >= 0 and dy <= 0,
        lambda dx, dy: dx <= 0 and dy >= 0,
        lambda dx, dy: dx >= 0 and dy >= 0,
    ],
    "triangles": [up, down, left, right],
    "halves": [
        lambda dx, dy: dy <= 0,
        lambda dx, dy: dy >= 0,
        lambda dx, dy: dx <= 0,
        lambda dx, dy: dx >= 0,
    ],
    "diagonals": [
        lambda dx, dy: up(dx, dy) or right(dx, dy),
        lambda dx, dy: up(dx, dy) or left(dx, dy),
        lambda dx, dy: down(dx, dy) or right(dx, dy),
        lambda dx, dy: down(dx, dy) or left(dx, dy),
    ],
    "eighths1": [
        lambda dx, dy: up(dx, dy) and dx <= 0,
        lambda dx, dy: down(dx, dy) and dx <= 0,
        lambda dx, dy: left(dx, dy) and dy <= 0,
        lambda dx, dy: right(dx, dy) and dy <= 0,
    ],
    "eighths2": [
        lambda dx, dy: up(dx, dy) and dx >= 0,
        lambda dx, dy: down(dx, dy) and dx >= 0,
        lambda dx, dy: left(dx, dy) and dy >= 0,
        lambda dx, dy: right(dx, dy) and dy >= 0,
    ],
}
VIEWS = {45: ("eighths1", "eighths2"), 90: ("corners", "triangles"), 180: ("halves", "diagonals")}


def heads(view: int, num_heads: int) -> list[tuple[View, float]]:
    """Field of view and slope m_t of each head, for the 6, 12 or 16 heads that the source knows."""
    first, second = (KINDS[kind] for kind in VIEWS[view])
    undirected = [(everywhere, 4.0**-power) for power in (1, 2, 3, 4)]
    directed_first, directed_second = [(seen, 0.5) for seen in first], [(seen, 0.5) for seen in second]
    again = [(seen, 0.25) for seen in first]
    return {
        6: directed_first + undirected[:2],
        12: directed_first + directed_second + undirected,
        16: directed_first + again + directed_second + undirected,
    }[num_heads]


def layer_slope(layer: int, depth: int) -> float:
    """s_l, from 1.5 to 0.5 over the depth; 1.5 in a model of one layer."""
    return 1.5 - layer / max(depth - 1, 1)


def bias(
    grid: Grid,
    num_heads: int,
    layer: int,
    depth: int,
    view: int = 90,
    prefix: int = 0,
    global_slope: float = 2.0,
    x: Coordinates = None,
    y: Coordinates = None,
) -> Array:
    """(h, N, N) of layer ``layer``, counted from 0."""
    where = places(grid, x, y)
    table = np.zeros((num_heads, len(where), len(where)))
    for head, (sees, slope) in enumerate(heads(view, num_heads)):
        for query, (x_query, y_query) in enumerate(where):
            for key, (x_key, y_key) in enumerate(where):
                dx, dy = x_key - x_query, y_key - y_query
                distance = global_slope * layer_slope(layer, depth) * slope * math.hypot(dx, dy)
                table[head, query, key] = -distance if sees(dx, dy) else -math.inf
    return with_prefix(table, prefix)
