"""A convolution over the patches between two blocks.

Shapes: B batch, H x W cells of the grid, M patches, D embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import TokenEncoding
from lape_vit.places import Grid, Places


class PEG(TokenEncoding):
    """Position encoding generator: x + a 3 x 3 convolution of x, each channel by itself, with zeros around the grid.

    CPVT (Chu et al. 2021, https://arxiv.org/abs/2102.10882, Sec. 3.2) after the first block. As in timm's Twins,
    weights start as N(0, 2/9), and no parameter is decayed. Prefix tokens pass by. It has 10 D parameters.

    Where patches are left out, in another order or between cells, the source has no rule. Ours: the offset between two
    patches is rounded to whole cells; where nobody stands, there is zero, and where several stand, their mean.

    Args:
        after: number of the block after which it acts, from 0; negative numbers count from the end.
    """

    name = "peg"
    reads_real_places = False

    def __init__(self, dim: int, grid: Grid, *, after: int = 0) -> None:
        super().__init__(dim, grid, after=after)
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(2 / 9))
        nn.init.zeros_(self.bias)

    def no_weight_decay(self) -> set[str]:
        return {"weight", "bias"}

    def forward(self, x: Tensor, places: Places) -> Tensor:
        if places.is_whole:
            maps = x.transpose(1, 2).unflatten(2, places.grid)
            around = F.conv2d(maps, self.weight, self.bias, padding=1, groups=self.dim)
            return x + around.flatten(2).transpose(1, 2)
        around = (neighbours(x, places) * self.weight.flatten(1).T[:, None]).sum(dim=1) + self.bias
        return x + around


def neighbours(x: Tensor, places: Places) -> Tensor:
    """What stands at each of the 3 x 3 cells around each patch, in the order of a kernel: (B, 9, M, D).

    Args:
        x: patch tokens (B, M, D).
    """
    dx, dy = (offset.round() for offset in places.offsets())
    at = torch.stack([(dy == down) & (dx == right) for down in (-1, 0, 1) for right in (-1, 0, 1)], dim=-3).to(x.dtype)
    shares = at / at.sum(dim=-1, keepdim=True).clamp(min=1)
    return shares @ x[:, None]
