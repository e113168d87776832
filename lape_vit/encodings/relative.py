"""Relative positions in two dimensions, in the logits and in the values.

Shapes: B batch, h heads, d head width, H x W patches, P prefix tokens, N = P + H*W tokens, k the largest distance told
apart, M = 2k + 2 buckets: 0 for every pair with a prefix token, 1 .. 2k+1 for distances -k .. k.

All that a key is to a query here is its column and its row, or that it is a prefix token. These are marks: one-hot
channels for W columns, H rows and one for prefix tokens, and some of zeros to fill up, E in all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, Grid
from lape_vit.encodings.views import LayerView, cosine_similarity


class Relative(AttentionEncoding):
    """Trained vectors for the clipped horizontal and vertical offsets from query to key, shared by the heads.

    Shaw et al. 2018 (https://arxiv.org/abs/1803.02155, Eq. 3 and 4) in two dimensions: the offset's column picks the
    first half of the vector, its row the second; one pair of tables for the keys, one for the values. Neither an
    (N, N, d) nor an (N, N) tensor is built: q is widened by what it adds for each mark, k by its marks, and attention
    gathers marks beside values.

    Args:
        max_relative_distance: k, in patches; longer offsets count as k.
    """

    name = "relative"
    widens = True

    def __init__(
        self, head_dim: int, num_heads: int, grid: Grid, num_prefix_tokens: int, *, max_relative_distance: int = 2
    ) -> None:
        if head_dim % 2:
            raise ValueError(f"pe='relative' needs a head width divisible by 2, not {head_dim}")
        if max_relative_distance < 1:
            raise ValueError(f"max_relative_distance={max_relative_distance}: it must be at least 1")
        super().__init__(head_dim, num_heads, grid, num_prefix_tokens)
        self.max_relative_distance = max_relative_distance
        shape = (2 * max_relative_distance + 2, head_dim // 2)
        self.key_x, self.key_y = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.value_x, self.value_y = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1) tables, as in the compact 2D-PE ViT."""
        for table in (self.key_x, self.key_y, self.value_x, self.value_y):
            nn.init.normal_(table)

    def no_weight_decay(self) -> set[str]:
        return {"key_x", "key_y", "value_x", "value_y"}

    def fixed_tables(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Bucket of each query and column (N, W), of each query and row (N, H), and the marks of each key (N, E)."""
        k, P, device = self.max_relative_distance, self.num_prefix_tokens, self.anchor.device
        patches = torch.arange(grid[0] * grid[1], device=device)
        x, y = patches % grid[1], torch.div(patches, grid[1], rounding_mode="floor")
        buckets_x = (torch.arange(grid[1], device=device) - x[:, None]).clamp(-k, k) + k + 1
        buckets_y = (torch.arange(grid[0], device=device) - y[:, None]).clamp(-k, k) + k + 1
        of_patches = F.pad(torch.cat([F.one_hot(x, grid[1]), F.one_hot(y, grid[0])], dim=1), (0, 1))
        of_prefix = F.pad(of_patches.new_ones(P, 1), (grid[0] + grid[1], 0))
        marks = torch.cat([of_prefix, of_patches])
        unused = -(self.head_dim + marks.shape[1]) % 8  # channels, a multiple of which fused kernels want
        return (
            F.pad(buckets_x, (0, 0, P, 0)),
            F.pad(buckets_y, (0, 0, P, 0)),
            F.pad(marks, (0, unused)).to(self.anchor.dtype),
        )

    def vectors(self, table_x: Tensor, table_y: Tensor, like: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Each query's vector for each mark (N, E, d), and the marks of each key (N, E), in the dtype of ``like``."""
        if torch.jit.is_scripting():
            buckets_x, buckets_y, marks = self.fixed_tables(grid)
        else:
            buckets_x, buckets_y, marks = self.cache.get(like, [], self.fixed_tables, grid)
        d, (N, E) = self.head_dim, marks.shape
        columns = F.pad(F.embedding(buckets_x, table_x), (0, d // 2))
        rows = F.pad(F.embedding(buckets_y, table_y), (d // 2, 0))
        prefix = torch.cat([table_x[0], table_y[0]]).expand(N, 1, d)
        vectors = F.pad(torch.cat([columns, rows, prefix], dim=1), (0, 0, 0, E - grid[0] - grid[1] - 1))
        return vectors.to(like.dtype), marks.to(like.dtype)

    def bias(self, q: Tensor, grid: Grid) -> Tensor:
        vectors, marks = self.vectors(self.key_x, self.key_y, q, grid)
        return torch.einsum("bhid,ied,je->bhij", q * self.head_dim**-0.5, vectors, marks)

    def widen(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        vectors, marks = self.vectors(self.key_x, self.key_y, q, grid)
        asked = torch.einsum("bhid,ied->bhie", q, vectors)
        marks = marks.expand(q.shape[0], q.shape[1], -1, -1)
        return torch.cat([q, asked], dim=-1), torch.cat([k, marks], dim=-1), torch.cat([v, marks], dim=-1)

    def narrow(self, x: Tensor, grid: Grid) -> Tensor:
        vectors, _ = self.vectors(self.value_x, self.value_y, x, grid)
        values, gathered = x.split([self.head_dim, vectors.shape[1]], dim=-1)
        return values + torch.einsum("bhie,ied->bhid", gathered, vectors)

    def views(self, queries: Tensor, grid: Grid) -> list[LayerView]:
        tables = {"key x": self.key_x, "key y": self.key_y, "value x": self.value_x, "value y": self.value_y}
        similarities = torch.stack([cosine_similarity(table) for table in tables.values()])
        k = self.max_relative_distance
        rows = ("prefix", *(f"{offset:+d}" if offset else "0" for offset in range(-k, k + 1)))
        title = "cosine similarity of table rows"
        table = LayerView("table", title, similarities, bounded=True, panels=tuple(tables), rows=rows)
        return [table, *super().views(queries, grid)]
