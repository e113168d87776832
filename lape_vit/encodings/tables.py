"""Trained tables over the cells of a grid: read at other grids, and at places between cells.

Shapes: T tables, H x W cells in row-major order, C channels, M places, B batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_vit.places import Grid, is_same_grid, is_same_side


def resize_grid(rows: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resample rows that stand for the cells of a grid: bicubic with antialiasing, by size, in float32.

    Args:
        rows: (T, H*W, C), row-major over ``old``.

    Returns:
        (T, H'*W', C), row-major over ``new``, in the dtype of ``rows``; ``rows`` itself where the grids agree.
    """
    if is_same_grid(old, new):
        return rows
    if torch.onnx.is_in_onnx_export() and torch.jit.is_tracing():
        raise NotImplementedError(
            "the older exporter to ONNX cannot resample a table of positions (bicubic, with antialiasing): use "
            "torch.onnx.export with dynamo=True, or a model without dynamic_img_size"
        )
    maps = rows.float().transpose(1, 2).reshape(rows.shape[0], rows.shape[2], old[0], old[1])
    maps = F.interpolate(maps, size=[new[0], new[1]], mode="bicubic", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(rows.dtype)


def read_between_cells(rows: Tensor, grid: Grid, x: Tensor, y: Tensor) -> Tensor:
    """Rows at real places, bilinear between the four cells around each; beyond the edge as at the edge.

    On a whole cell that is the cell's row, exactly.

    Args:
        rows: (H*W, C), row-major over ``grid``.
        x, y: columns and rows of the places, of any shape (...), in cells.

    Returns:
        (..., C), in the dtype of ``rows``.
    """
    height, width = grid
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, top = x.floor(), y.floor()
    of_right, of_bottom = ((place - cell)[..., None].to(rows.dtype) for place, cell in ((x, left), (y, top)))
    left, top = left.long(), top.long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    upper = rows[top * width + left] * (1 - of_right) + rows[top * width + right] * of_right
    lower = rows[bottom * width + left] * (1 - of_right) + rows[bottom * width + right] * of_right
    return upper * (1 - of_bottom) + lower * of_bottom


def resize_axis(rows: Tensor, old: int, new: int) -> Tensor:
    """Rows (old, C) that stand for the cells of one axis, resampled linearly: (new, C)."""
    if is_same_side(old, new):
        return rows
    return read_along(rows, torch.arange(new, dtype=torch.float64, device=rows.device), old, new)


def read_along(rows: Tensor, place: Tensor, old: int, new: int) -> Tensor:
    """Rows at real places of one axis, linear between the centres of its cells, without antialiasing.

    Args:
        rows: (old, C).
        place: of any shape (...), in cells of a grid that has ``new`` of them along this axis.

    Returns:
        (..., C), in the dtype of ``rows``.
    """
    place = ((place + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    low = place.floor()
    of_high = (place - low)[..., None].to(rows.dtype)
    low = low.long()
    return rows[low] * (1 - of_high) + rows[(low + 1).clamp(max=old - 1)] * of_high
