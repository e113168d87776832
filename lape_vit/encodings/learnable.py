"""A trained vector per token."""

import torch
from torch import Tensor

from lape_vit.encodings.base import AbsoluteEncoding
from lape_vit.encodings.tables import read_between_cells, resize_grid
from lape_vit.places import Places, is_same_grid


class Learnable(AbsoluteEncoding):
    """A table with a row for each token (ViT, Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, Eq. 1).

    Prefix tokens have a row each, unless the model is built with ``no_embed_class``. On another grid than the table's,
    the patch rows are resampled and the prefix rows kept; between cells rows are interpolated.
    """

    name = "learnable"
    learned = True

    def forward(self, places: Places, like: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        assert pos_embed is not None
        if places.is_whole and is_same_grid(places.grid, self.grid):
            return pos_embed
        prefix, patches = pos_embed[:, : self.prefix_rows], pos_embed[:, self.prefix_rows :]
        patches = resize_grid(patches, self.grid, places.grid)
        if not places.is_whole:
            patches = read_between_cells(patches[0], places.grid, *places.coordinates())
            patches = patches if patches.dim() == 3 else patches[None]
            prefix = prefix.expand(len(patches), -1, -1)
        return torch.cat([prefix, patches], dim=1)
