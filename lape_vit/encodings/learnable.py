"""A trained vector per token."""

import torch
from torch import Tensor

from lape_vit.encodings.base import AbsoluteEncoding, Grid, resize_grid


class Learnable(AbsoluteEncoding):
    """A table with a row for each token (ViT, Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, Eq. 1).

    Prefix tokens have a row each, unless the model is built with ``no_embed_class``. On another grid than the table's,
    the patch rows are resampled and the prefix rows kept.
    """

    name = "learnable"
    learned = True

    def forward(self, grid: Grid, pos_embed: Tensor | None = None) -> Tensor:
        assert pos_embed is not None
        if grid == self.grid:
            return pos_embed
        prefix, patches = pos_embed[:, : self.prefix_rows], pos_embed[:, self.prefix_rows :]
        return torch.cat([prefix, resize_grid(patches, self.grid, grid)], dim=1)
