"""Functions of the offset between two patches, which a whole grid has few of.

Shapes: H x W cells, M = H*W patches, row-major; O = (2H - 1)(2W - 1) offsets, query less key, the row's first:
entry (H - 1 + a, W - 1 + b) is of queries a rows below and b columns right of their keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lape_vit.places import Grid, Places


def offset_grid(grid: Grid) -> Grid:
    """The grid of offsets, (2H - 1, 2W - 1)."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def for_each_pair(formula: Callable[[Tensor, Tensor], Tensor], places: Places) -> Tensor:
    """A formula of the offset, for each pair of patches: (..., M, M).

    Args:
        formula: from columns dx and rows dy from query to key, (..., Q, K) in float64, to values (..., Q, K).
    """
    if not places.is_whole:
        return formula(*places.offsets())
    height, width = places.grid
    offsets = offset_grid(places.grid)
    x, y = (axis.unflatten(0, offsets) for axis in Places(offsets, device=places.device).coordinates())
    return spread_offsets(formula(width - 1 - x, height - 1 - y), places.grid)


def offset_index(grid: Grid, device: torch.device) -> Tensor:
    """The number of each pair's offset, row-major: (M, M)."""
    offsets = offset_grid(grid)
    numbers = torch.arange(offsets[0] * offsets[1], device=device).unflatten(0, offsets)
    return spread_offsets(numbers, grid)


def spread_offsets(values: Tensor, grid: Grid) -> Tensor:
    """The value of each pair's offset.

    Args:
        values: (..., 2H - 1, 2W - 1).

    Returns:
        (..., M, M).
    """
    height, width = grid
    y, x = torch.arange(height, device=values.device), torch.arange(width, device=values.device)
    # Pairs of columns first, which are few: then a pair of rows copies a run of W values at a time.
    columns = x[:, None] - x + width - 1
    by_row = values.index_select(-1, columns.flatten()).unflatten(-1, columns.shape).flatten(-3, -2)
    rows = (y[:, None, None] - y + height - 1) * width + x[:, None]
    return by_row.index_select(-2, rows.flatten()).flatten(-2).unflatten(-1, (height * width, height * width))
