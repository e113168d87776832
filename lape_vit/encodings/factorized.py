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
        super().set_grid(grid)
        for name, side in zip(("pos_embed_y", "pos_embed_x"), grid, strict=True):
            old = getattr(self, name)
            if old.shape[1] != side:
                setattr(self, name, nn.Parameter(resize_axis(old[0], side)[None], requires_grad=old.requires_grad))

    def patch_vectors(self, places: Places) -> Tensor:
        (height, width), of_rows, of_columns = places.grid, self.pos_embed_y[0], self.pos_embed_x[0]
        if places.is_whole:
            return (resize_axis(of_rows, height)[:, None] + resize_axis(of_columns, width)).flatten(0, 1)
        x, y = places.coordinates()
        return read_along(of_rows, y, height) + read_along(of_columns, x, width)
