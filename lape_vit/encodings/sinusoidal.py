"""Fixed sines and cosines, computed in float64 for the grid at hand: no cast, device or resolution spoils them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_vit.encodings.base import AbsoluteEncoding, Grid


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Sines in the even channels, cosines in the odd ones.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, Sec. 3.5.

    Args:
        positions: (M,), in tokens.
        dim: even number of channels.

    Returns:
        (M, dim), channel 2i is sin(p / 10000^(2i / dim)), channel 2i + 1 its cosine.
    """
    exponents = torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device) / dim
    angles = positions[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Sinusoidal1D(AbsoluteEncoding):
    """Sines over the flattened sequence (Vaswani et al. 2017). Rows are numbered from 0, prefix rows first."""

    name = "1D_sin"

    def __init__(self, dim: int, grid: Grid, prefix_rows: int) -> None:
        if dim % 2:
            raise ValueError(f"pe='1D_sin' needs an embed_dim divisible by 2, not {dim}")
        super().__init__(dim, grid, prefix_rows)

    def forward(self, grid: Grid, pos_embed: Tensor | None = None) -> Tensor:
        rows = self.prefix_rows + grid[0] * grid[1]
        table = sinusoid(torch.arange(rows, dtype=torch.float64, device=self.anchor.device), self.dim)
        return table[None].to(self.anchor.dtype)


class Sinusoidal2D(AbsoluteEncoding):
    """The first half of the channels codes a patch's column x, the second its row y; prefix rows are zero.

    Source: the sines of Vaswani et al. 2017 per axis, as in MoCo v3 (https://arxiv.org/abs/2104.02057) and LaPE.
    """

    name = "2D_sin"

    def __init__(self, dim: int, grid: Grid, prefix_rows: int) -> None:
        if dim % 4:
            raise ValueError(f"pe='2D_sin' needs an embed_dim divisible by 4, not {dim}")
        super().__init__(dim, grid, prefix_rows)

    def forward(self, grid: Grid, pos_embed: Tensor | None = None) -> Tensor:
        height, width = grid
        y = sinusoid(torch.arange(height, dtype=torch.float64, device=self.anchor.device), self.dim // 2)
        x = sinusoid(torch.arange(width, dtype=torch.float64, device=self.anchor.device), self.dim // 2)
        table = torch.cat([x[None].expand(height, -1, -1), y[:, None].expand(-1, width, -1)], dim=-1).flatten(0, 1)
        return F.pad(table, (0, 0, self.prefix_rows, 0))[None].to(self.anchor.dtype)
