"""A trained bias for each offset between two patches.

Shapes: H x W patches, P prefix tokens, N = P + H*W tokens, h heads, O = (2H - 1)(2W - 1) offsets, row-major.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, Grid, resize_grid
from lape_vit.encodings.views import LayerView, offset_index, pairs_and_offsets


def offset_grid(grid: Grid) -> Grid:
    """The grid of offsets, (2H - 1, 2W - 1)."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


class RelativeBias(AttentionEncoding):
    """A bias per head and offset, added to the logits between patches; pairs with a prefix token have none.

    Swin (Liu et al. 2021, https://arxiv.org/abs/2103.14030, Eq. 4), one zero-initialised table per layer. Under LaPE a
    LayerNorm over the keys of each layer's bias (h, H*W, H*W) precedes the sum (eps 1e-5).
    """

    name = "2D_RPE"
    takes_norm = True

    def __init__(self, head_dim: int, num_heads: int, grid: Grid, num_prefix_tokens: int) -> None:
        super().__init__(head_dim, num_heads, grid, num_prefix_tokens)
        offsets = offset_grid(grid)
        self.table = nn.Parameter(torch.empty(offsets[0] * offsets[1], num_heads))
        self.norm: nn.LayerNorm | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A zero table, as in LaPE's code."""
        nn.init.zeros_(self.table)

    def add_norm(self) -> None:
        self.norm = nn.LayerNorm(self.grid[0] * self.grid[1], eps=1e-5)

    def no_weight_decay(self) -> set[str]:
        return {"table"}

    def table_bias(self, grid: Grid) -> Tensor:
        """The table's entry of each pair of patches (h, H*W, H*W), for a grid of any size."""
        table = resize_grid(self.table[None], offset_grid(self.grid), offset_grid(grid))[0]
        return table[offset_index(grid, self.anchor.device)].permute(2, 0, 1)

    def patch_bias(self, grid: Grid) -> Tensor:
        """The bias between patches (h, H*W, H*W), as it is added, for a grid of any size."""
        bias = self.table_bias(grid)
        if self.norm is not None:
            weight = resize_grid(self.norm.weight[None, :, None], self.grid, grid).flatten()
            shift = resize_grid(self.norm.bias[None, :, None], self.grid, grid).flatten()
            bias = F.layer_norm(bias, [grid[0] * grid[1]], weight, shift, self.norm.eps)
        return bias

    def bias(self, q: Tensor, grid: Grid) -> Tensor:
        if torch.jit.is_scripting():
            bias = self.token_bias(grid, q.dtype)
        else:
            bias = self.cache.get(q, list(self.parameters()), self.token_bias, grid, q.dtype)
        return bias

    def token_bias(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """The same between all tokens (h, N, N), in any dtype: zero with prefix tokens."""
        P = self.num_prefix_tokens
        return F.pad(self.patch_bias(grid), (P, 0, P, 0)).to(dtype)

    def views(self, queries: Tensor, grid: Grid) -> list[LayerView]:
        if self.norm is None:
            return super().views(queries, grid)
        before = pairs_and_offsets("bias", "bias before the norm", self.table_bias(grid), grid)
        return before + pairs_and_offsets("bias_normed", "bias after the norm", self.patch_bias(grid), grid)

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        table = resize_grid(self.table[None], offset_grid(self.grid), offset_grid(grid))[0]
        self.table = nn.Parameter(table, requires_grad=self.table.requires_grad)
        if self.norm is not None:
            self.norm.normalized_shape = (grid[0] * grid[1],)
            for name, part in list(self.norm.named_parameters()):
                resized = resize_grid(part[None, :, None], self.grid, grid).flatten()
                setattr(self.norm, name, nn.Parameter(resized, requires_grad=part.requires_grad))
        super().set_grid(grid)
