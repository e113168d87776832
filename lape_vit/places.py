"""Where the patches are: what every encoding is a function of.

Shapes: B batch, H x W cells of a grid, M patches.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]


def is_same_side(one: Any, other: Any) -> bool:
    """Whether two sides are known to be the same; not where a graph is recorded for sides of any length."""
    is_recorded = any(isinstance(side, torch.SymInt | Tensor) for side in (one, other))
    return not is_recorded and one == other


def is_same_grid(one: Grid, other: Grid) -> bool:
    """Whether two grids are known to be the same, likewise."""
    return is_same_side(one[0], other[0]) and is_same_side(one[1], other[1])


class Places(NamedTuple):
    """A grid of cells, and the place of each patch on it.

    Columns and rows are counted in cells from 0, rows downwards, and may be real numbers: the centre of the cell in the
    first row and column is (0, 0). A place may lie outside the grid.

    Attributes:
        grid: (H, W), rows and columns of cells.
        x: column of each patch, (M,), or (B, M) where images differ; None where each cell has one patch, row by row.
        y: row of each patch, likewise.
        device: where coordinates are to be computed; None for torch's default.
    """

    grid: Grid
    x: Tensor | None = None
    y: Tensor | None = None
    device: torch.device | None = None

    @property
    def is_whole(self) -> bool:
        """Whether each cell has one patch, in row-major order: tables then need no interpolation."""
        return self.x is None

    @property
    def differs_by_image(self) -> bool:
        """Whether each image of a batch has places of its own: coordinates are (B, M)."""
        return self.x is not None and self.x.dim() == 2

    def coordinates(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Column x and row y of each patch: (M,) or (B, M)."""
        if self.x is not None and self.y is not None:
            return self.x.to(dtype), self.y.to(dtype)
        height, width = self.grid
        x = torch.arange(width, dtype=dtype, device=self.device)
        y = torch.arange(height, dtype=dtype, device=self.device)
        # Not by repeat_interleave, whose symbolic count onnxruntime cannot read.
        return x.expand(height, width).reshape(-1), y[:, None].expand(height, width).reshape(-1)

    def offsets(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Columns and rows from each patch, the query, to each other one, the key: (M, M) or (B, M, M)."""
        x, y = self.coordinates(dtype)
        return x[..., None, :] - x[..., :, None], y[..., None, :] - y[..., :, None]

    def keep(self, indices: Tensor) -> "Places":
        """The places of some of the patches.

        Args:
            indices: numbers of the patches that stay: (M',), or (B, M') where images differ.
        """
        x, y = (
            axis[indices] if axis.dim() == 1 else axis.gather(1, indices.expand(len(axis), -1))
            for axis in self.coordinates()
        )
        return self._replace(x=x, y=y)

    def permuted(self, order: Tensor) -> "Places":
        """Patch i gets the place of patch ``order[i]``: (M,), or (B, M) where images differ."""
        return self.keep(order)

    def on(self, grid: Grid) -> "Places":
        """The same places in the cells of another grid that covers the same image."""
        if grid == self.grid:
            return self
        x, y = self.coordinates()
        by_x, by_y = grid[1] / self.grid[1], grid[0] / self.grid[0]
        return self._replace(grid=grid, x=(x + 0.5) * by_x - 0.5, y=(y + 0.5) * by_y - 0.5)

    def shifted(self, dx: float | Tensor, dy: float | Tensor) -> "Places":
        """All places moved by (dx, dy) cells; a tensor (B, 1) moves each image by its own."""
        x, y = self.coordinates()
        return self._replace(x=x + dx, y=y + dy)

    def wrapped(self) -> "Places":
        """The same where opposite sides of the grid meet: a place outside it comes in on the other side."""
        height, width = self.grid
        x, y = self.coordinates()
        return self._replace(x=(x + 0.5) % width - 0.5, y=(y + 0.5) % height - 0.5)

    def scaled(self, by_x: float | Tensor, by_y: float | Tensor) -> "Places":
        """All distances from the centre of the grid multiplied by (by_x, by_y)."""
        x, y = self.coordinates()
        centre_y, centre_x = ((side - 1) / 2 for side in self.grid)
        return self._replace(x=centre_x + (x - centre_x) * by_x, y=centre_y + (y - centre_y) * by_y)
