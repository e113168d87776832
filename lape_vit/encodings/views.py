"""What an encoding shows of itself: quantities between places, as tensors.

Shapes: H x W patches in row-major order, h heads, V values side by side (h heads, 1 where the heads agree, or tables).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerView(NamedTuple):
    """One quantity of one layer.

    Attributes:
        name: part of a file's name.
        title: for the eye, with the unit.
        values: (V, H*W, H*W) from query (row) to key (column) patch; with ``by_offset`` (V, 2H-1, 2W-1), the offset of
            the key from the query at [dy + H - 1, dx + W - 1]; with ``rows`` (V, M, M) between the M rows of tables.
        bounded: whether values lie in [-1, 1] by their nature.
        panels: a title of each of the V values where they are no heads.
        rows: a title of each of the M rows, where values are between rows of tables and not between patches.
    """

    name: str
    title: str
    values: Tensor
    by_offset: bool = False
    bounded: bool = False
    panels: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def cosine_similarity(rows: Tensor) -> Tensor:
    """Cosine of the angle between any two rows, in float64.

    It is exactly symmetric, exactly 1 on the diagonal and never outside [-1, 1]. A row of zeros has no direction: its
    similarity is 0 with every other row and, by the diagonal's rule, 1 with itself.

    Args:
        rows: (M, D), any floating dtype and any scale.

    Returns:
        (M, M).

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not rows.isfinite().all():
        raise ValueError("positions hold NaN or infinite values: they have no similarity")
    rows = rows.double()
    # Taken out first, since the squares of tiny or huge values leave float64's range.
    largest = rows.abs().amax(dim=1, keepdim=True)
    directions = F.normalize(rows / largest.where(largest > 0, 1), dim=1)
    similarity = directions @ directions.T
    similarity = ((similarity + similarity.T) / 2).clamp(-1, 1)
    return similarity.fill_diagonal_(1)


def offset_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """The number of each pair's offset, query (first) less key: (H*W, H*W), row-major over (2H-1, 2W-1)."""
    height, width = grid
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = y[:, None] - y[None, :] + height - 1
    columns = x[:, None] - x[None, :] + width - 1
    index = rows[:, None, :, None] * (2 * width - 1) + columns[None, :, None, :]
    return index.flatten(2, 3).flatten(0, 1)


def mean_by_offset(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """(V, H*W, H*W) averaged over all pairs of patches with the same offset: (V, 2H-1, 2W-1)."""
    height, width = grid
    offsets = offset_index(grid, values.device).T.flatten()  # of the key from the query
    counts = offsets.bincount(minlength=(2 * height - 1) * (2 * width - 1))
    sums = values.new_zeros(len(values), len(counts)).index_add(1, offsets, values.flatten(1))
    return (sums / counts).unflatten(1, (2 * height - 1, 2 * width - 1))


def one_where_heads_agree(values: Tensor) -> Tensor:
    """(h, ...) as it is, or its first as (1, ...) where all heads are the same."""
    return values[:1] if values.shape[0] > 1 and torch.equal(values, values[:1].expand_as(values)) else values


def pairs_and_offsets(name: str, title: str, values: Tensor, grid: tuple[int, int]) -> list[LayerView]:
    """Logits (h, H*W, H*W) between patches: as a matrix, and their mean by offset."""
    values = one_where_heads_agree(values)
    offsets = mean_by_offset(values, grid)
    return [
        LayerView(name, f"{title} (logits)", values),
        LayerView(f"{name}_offsets", f"mean {title} by offset (logits)", offsets, by_offset=True),
    ]
