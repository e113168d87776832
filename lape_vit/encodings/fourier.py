"""Trained Fourier features of a patch's place, and a small MLP."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AbsoluteEncoding
from lape_vit.places import Grid, Places


class Fourier(AbsoluteEncoding):
    """w = W2 gelu(W1 r + b1) + b2, with r = D^-1/2 [cos W_r p, sin W_r p], p = ((x + 1/2) / W, (y + 1/2) / H).

    Li et al. 2021, https://arxiv.org/abs/2106.02795, Eq. 1 to 3, with one group of coordinates. W_r is (D/2, 2), starts
    as N(0, gamma^-2), and is trained, too: there are D + D m + m + m D + D parameters. The paper leaves the sizes and
    the range of p to the task. Our rules are: as many features as channels, the place in [0, 1]^2 of the grid at hand,
    the defaults below, zeros for prefix tokens. No part of it is decayed, W1 and W2 included: they stand for a table.

    Args:
        fourier_gamma: at init two places are alike up to about this distance, in sides of the grid.
        fourier_hidden: m, the hidden width of the MLP.
    """

    name = "fourier"
    divisor = 2

    def __init__(
        self, dim: int, grid: Grid, prefix_rows: int, *, fourier_gamma: float = 0.1, fourier_hidden: int = 32
    ) -> None:
        if not fourier_gamma > 0:
            raise ValueError(f"fourier_gamma={fourier_gamma}: it must be greater than 0")
        if fourier_hidden < 1:
            raise ValueError(f"fourier_hidden={fourier_hidden}: it must be at least 1")
        super().__init__(dim, grid, prefix_rows)
        self.fourier_gamma = fourier_gamma
        self.frequencies = nn.Parameter(torch.empty(dim // 2, 2))  # W_r, of x and y
        self.fc1, self.fc2 = nn.Linear(dim, fourier_hidden), nn.Linear(fourier_hidden, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.frequencies, std=1 / self.fourier_gamma)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}

    def patch_vectors(self, places: Places) -> Tensor:
        x, y = (axis[..., None] for axis in places.coordinates())
        height, width = places.grid
        # In float64, as the places are, and no product of matrices, which autocast would compute in half precision.
        phases = (x + 0.5) / width * self.frequencies[:, 0] + (y + 0.5) / height * self.frequencies[:, 1]
        features = torch.cat([phases.cos(), phases.sin()], dim=-1) / math.sqrt(self.dim)
        return self.fc2(F.gelu(self.fc1(features.to(self.frequencies.dtype))))
