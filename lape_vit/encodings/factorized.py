"""A trained vector per row and one per column."""

import torch
from torch import Tensor, nn

from lape_vit.encodings.base import AbsoluteEncoding
from lape_vit.encodings.tables import read_along, resize_axis
from lape_vit.places import Grid, Places


class Factorized(AbsoluteEncoding):
    """w = a_y + b_x: one trained vector for each row and one for each column; prefix tokens get zeros.

    The additive form of NaViT (Dehghani et al. 2023, https://arxiv.org/abs/2307.06304, Sec. 3.1), with the names,
    shapes, initialisation and linear interpolation of timm's NaFlexViT. On another grid, and between cells, each axis
    is read by itself, linearly between the centres of its cells; beyond the outermost centres as there. It has
    (H + W) D parameters.
    """

    name = "factorized"

    def __init__(self, dim: int, grid: Grid, prefix_rows: int) -> None:
        super().__init__(dim, grid, prefix_rows)
        self.pos_embed_y = nn.Parameter(torch.empty(1, grid[0], dim))
        self.pos_embed_x = nn.Parameter(torch.empty(1, grid[1], dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.pos_embed_y, std=0.02)
        nn.init.normal_(self.pos_embed_x, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed_y", "pos_embed_x"}

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        for name, old, new in zip(("pos_embed_y", "pos_embed_x"), self.grid, grid, strict=True):
            if old != new:
                table = getattr(self, name)
                resized = resize_axis(table[0], old, new)[None]
                setattr(self, name, nn.Parameter(resized, requires_grad=table.requires_grad))
        super().set_grid(grid)

    def patch_vectors(self, places: Places) -> Tensor:
        (rows, columns), (height, width) = self.grid, places.grid
        if places.is_whole:
            of_rows = resize_axis(self.pos_embed_y[0], rows, height)
            of_columns = resize_axis(self.pos_embed_x[0], columns, width)
            return (of_rows[:, None] + of_columns).flatten(0, 1)
        x, y = places.coordinates()
        return read_along(self.pos_embed_y[0], y, rows, height) + read_along(self.pos_embed_x[0], x, columns, width)
