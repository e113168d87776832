"""Relative positions in two dimensions, in the logits and in the values.

Shapes: B batch, h heads, d head width, H x W patches, P prefix tokens, N = P + H*W tokens, k the largest distance told
apart, M = 2k + 2 buckets: 0 for every pair with a prefix token, 1 .. 2k+1 for distances -k .. k.

All that a key is to a query here is its column and its row, or that it is a prefix token. These are marks, E channels:
one for each of W columns, one for each of H - 1 rows (who has none of them is in the last row), one for prefix tokens,
and some of zeros to fill up.
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
    (N, N, d) nor an (N, N) tensor is built: a query's product with each bucket is spread over the marks, by which q is
    widened as k is by its marks; attention gathers marks beside values, and their buckets are what the tables weigh.

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

    def fixed_tables(self, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """How often each mark counts for each bucket of a query (N, 2M, E), x before y, and each key's marks (N, E).

        The marks of a column and of a row add up to the buckets of both offsets. So the last row, which has no mark, is
        counted with each column, and taken off again with any other row.
        """
        (H, W), P, k = grid, self.num_prefix_tokens, self.max_relative_distance
        M = 2 * k + 2
        patches = torch.arange(H * W, device=self.anchor.device)
        x, y = patches % W, torch.div(patches, W, rounding_mode="floor")
        to_columns = (patches[:W] - x[:, None]).clamp(-k, k) + k + 1
        to_rows = (patches[:H] - y[:, None]).clamp(-k, k) + k + 1
        columns = F.one_hot(F.pad(to_columns, (0, 0, P, 0)), 2 * M)
        rows = F.one_hot(F.pad(to_rows, (0, 0, P, 0)) + M, 2 * M)
        last_row, prefix = rows[:, -1:], columns.new_zeros(P + H * W, 1, 2 * M)
        prefix[:, :, 0::M] = 1
        buckets = torch.cat([columns + last_row, rows[:, :-1] - last_row, prefix], dim=1)

        of_patches = F.pad(torch.cat([F.one_hot(x, W), F.one_hot(y, H)[:, :-1]], dim=1), (0, 1))
        of_prefix = F.pad(of_patches.new_ones(P, 1), (W + H - 1, 0))
        marks = torch.cat([of_prefix, of_patches])
        unused = -(self.head_dim + W + H) % 8  # channels, a multiple of which fused kernels want
        return F.pad(buckets, (0, 0, 0, unused)).mT.to(dtype), F.pad(marks, (0, unused)).to(dtype)

    def tables_for(self, like: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The fixed tables in the dtype of ``like``."""
        if torch.jit.is_scripting():
            tables = self.fixed_tables(grid, like.dtype)
        else:
            tables = self.cache.get(like, [], self.fixed_tables, grid, like.dtype)
        return tables

    def vectors(self, table_x: Tensor, table_y: Tensor, like: Tensor) -> Tensor:
        """What each bucket adds to a key or value (2M, d), x before y, in the dtype of ``like``."""
        half = self.head_dim // 2
        return torch.cat([F.pad(table_x, (0, half)), F.pad(table_y, (half, 0))]).to(like.dtype)

    def asked(self, q: Tensor, buckets: Tensor) -> Tensor:
        """What each query q (B, h, N, d) adds for each mark: (B, h, N, E)."""
        of_buckets = q.transpose(1, 2) @ self.vectors(self.key_x, self.key_y, q).T  # in the order of q's memory
        return torch.einsum("bihm,ime->bhie", of_buckets, buckets)

    def bias(self, q: Tensor, grid: Grid) -> Tensor:
        buckets, marks = self.tables_for(q, grid)
        return self.asked(q * self.head_dim**-0.5, buckets) @ marks.T

    def widen(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        buckets, marks = self.tables_for(q, grid)
        asked = self.asked(q, buckets)
        marks = marks.expand(q.shape[0], q.shape[1], -1, -1)
        return torch.cat([q, asked], dim=-1), torch.cat([k, marks], dim=-1), torch.cat([v, marks], dim=-1)

    def narrow(self, x: Tensor, grid: Grid) -> Tensor:
        buckets, marks = self.tables_for(x, grid)
        values, gathered = x.split([self.head_dim, marks.shape[1]], dim=-1)
        of_buckets = torch.einsum("bhie,ime->bihm", gathered, buckets)
        return values + (of_buckets @ self.vectors(self.value_x, self.value_y, x)).transpose(1, 2)

    def views(self, queries: Tensor, grid: Grid) -> list[LayerView]:
        tables = {"key x": self.key_x, "key y": self.key_y, "value x": self.value_x, "value y": self.value_y}
        similarities = torch.stack([cosine_similarity(table) for table in tables.values()])
        k = self.max_relative_distance
        rows = ("prefix", *(f"{offset:+d}" if offset else "0" for offset in range(-k, k + 1)))
        title = "cosine similarity of table rows"
        table = LayerView("table", title, similarities, bounded=True, panels=tuple(tables), rows=rows)
        return [table, *super().views(queries, grid)]
