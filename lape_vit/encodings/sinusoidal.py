"""Fixed sines and cosines, computed in float64 for the places at hand: no cast, device or resolution spoils them."""

import math

import torch
from torch import Tensor

from lape_vit.encodings.base import AbsoluteEncoding
from lape_vit.places import Places


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Sines in the even channels, cosines in the odd ones.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, Sec. 3.5.

    Args:
        positions: (..., M), in tokens.
        dim: even number of channels.

    Returns:
        (..., M, dim), channel 2i is sin(p / 10000^(2i / dim)), channel 2i + 1 its cosine.
    """
    exponents = torch.arange(0, dim, 2, dtype=positions.dtype, device=positions.device) / dim
    angles = positions[..., None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Sinusoidal1D(AbsoluteEncoding):
    """Sines over the flattened sequence (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), prefix rows first.

    Rows are numbered from 0. The place of a patch in the sequence is y W + x, so that a column between two cells is a
    place between two patches.
    """

    name = "1D_sin"
    divisor = 2

    def patch_vectors(self, places: Places) -> Tensor:
        x, y = places.coordinates()
        return sinusoid(self.prefix_rows + y * places.grid[1] + x, self.dim)

    def prefix_vectors(self, patches: Tensor) -> Tensor:
        return sinusoid(torch.arange(self.prefix_rows, dtype=patches.dtype, device=patches.device), self.dim)


class Sinusoidal2D(AbsoluteEncoding):
    """The first half of the channels codes a patch's column x, the second its row y; prefix rows are zero.

    Source: the sines of Vaswani et al. 2017 per axis, as in MoCo v3 (https://arxiv.org/abs/2104.02057) and LaPE.
    """

    name = "2D_sin"
    divisor = 4

    def patch_vectors(self, places: Places) -> Tensor:
        return torch.cat([sinusoid(axis, self.dim // 2) for axis in places.coordinates()], dim=-1)
