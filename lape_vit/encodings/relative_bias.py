"""A trained bias for each offset between two patches.

Shapes: H x W cells, M patches, h heads, O = (2H - 1)(2W - 1) offsets, row-major: query less key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, LayerSpec
from lape_vit.encodings.offsets import offset_grid, spread_offsets
from lape_vit.encodings.tables import read_between_cells, resize_grid
from lape_vit.places import Grid, Places


class KeyNorm(nn.LayerNorm):
    """LayerNorm of a bias over its keys, with a weight and a shift for each cell of the grid."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid[0] * grid[1], eps=1e-5)
        self.grid = grid

    def forward(  # type: ignore[override]  # it needs the places, too
        self, bias: Tensor, places: Places, over_cells: Tensor | None = None
    ) -> Tensor:
        """The bias (..., h, M, M), normalised.

        Args:
            over_cells: (..., h, M, H*W), the bias with every cell as the key; None where the keys are these cells.
        """
        weight, shift = (resize_grid(part[None, :, None], self.grid, places.grid) for part in (self.weight, self.bias))
        if over_cells is None:
            return F.layer_norm(bias, bias.shape[-1:], weight.flatten(), shift.flatten(), self.eps)
        variance, mean = torch.var_mean(over_cells, dim=-1, correction=0, keepdim=True)
        weight, shift = (
            read_between_cells(part[0], places.grid, *places.coordinates()).movedim(-1, -2)[..., None, :, :]
            for part in (weight, shift)
        )
        return (bias - mean) / (variance + self.eps).sqrt() * weight + shift

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Resample weight and shift."""
        for name, part in list(self.named_parameters()):
            resized = resize_grid(part[None, :, None], self.grid, grid).flatten()
            setattr(self, name, nn.Parameter(resized, requires_grad=part.requires_grad))
        self.normalized_shape = (grid[0] * grid[1],)
        self.grid = grid


class RelativeBias(AttentionEncoding):
    """A bias per head and offset, added to the logits between patches; pairs with a prefix token have none.

    Swin (Liu et al. 2021, https://arxiv.org/abs/2103.14030, Eq. 4), one zero-initialised table per layer. Under LaPE a
    LayerNorm over the keys of each layer's bias (h, H*W, H*W) precedes the sum (eps 1e-5). Between whole offsets the
    table is interpolated; LaPE's norm then takes mean and deviation over all cells, as on a whole grid.
    """

    name = "2D_RPE"
    takes_norm = True

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        offsets = offset_grid(spec.grid)
        self.table = nn.Parameter(torch.empty(offsets[0] * offsets[1], spec.num_heads))
        self.norm: KeyNorm | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A zero table, as in LaPE's code."""
        nn.init.zeros_(self.table)

    def add_norm(self) -> None:
        self.norm = KeyNorm(self.grid)

    def no_weight_decay(self) -> set[str]:
        return {"table"}

    def table_bias(self, queries: Places, keys: Places) -> Tensor:
        """The table's entry of each pair, (..., h, M, M'), of queries at some places and keys at others."""
        grid, offsets = queries.grid, offset_grid(queries.grid)
        table = resize_grid(self.table[None], offset_grid(self.grid), offsets)[0]
        if queries.is_whole and keys.is_whole:
            return spread_offsets(table.T.unflatten(1, offsets), grid)
        (x, y), (key_x, key_y) = queries.coordinates(), keys.coordinates()
        dx = x[..., :, None] - key_x[..., None, :] + grid[1] - 1
        dy = y[..., :, None] - key_y[..., None, :] + grid[0] - 1
        return read_between_cells(table, offsets, dx, dy).movedim(-1, -3)

    def patch_bias(self, places: Places) -> Tensor:
        bias = self.table_bias(places, places)
        if self.norm is None:
            return bias
        if places.is_whole:
            return self.norm(bias, places)
        return self.norm(bias, places, self.table_bias(places, Places(places.grid, device=places.device)))

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        table = resize_grid(self.table[None], offset_grid(self.grid), offset_grid(grid))[0]
        self.table = nn.Parameter(table, requires_grad=self.table.requires_grad)
        if self.norm is not None:
            self.norm.set_grid(grid)
        super().set_grid(grid)
