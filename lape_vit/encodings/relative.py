"""Relative positions in two dimensions, in the logits and in the values.

Shapes: B batch, h heads, d head width, H x W patches, P prefix tokens, N = P + H*W tokens, k the largest distance told
apart, M = 2k + 2 buckets: 0 for every pair with a prefix token, 1 .. 2k+1 for distances -k .. k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, Grid
from lape_vit.encodings.views import LayerView, cosine_similarity


class Relative(AttentionEncoding):
    """Trained vectors for the clipped horizontal and vertical offsets from query to key, shared by the heads.

    Shaw et al. 2018 (https://arxiv.org/abs/1803.02155, Eq. 3 and 4) in two dimensions: the offset's column picks the
    first half of the vector, its row the second; one pair of tables for the keys, one for the values. No (N, N, d)
    tensor is built: q meets the M table rows, not the keys, and attention is summed by bucket before it meets the
    values' table.

    Args:
        max_relative_distance: k, in patches; longer offsets count as k.
    """

    name = "relative"
    has_value_term = True

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

    def buckets(self, size: int, like: Tensor) -> Tensor:
        """One-hot buckets (query, key, M) along an axis of ``size`` patches, in the dtype of ``like``."""
        places = torch.arange(size, device=self.anchor.device)
        k = self.max_relative_distance
        offsets = (places[None, :] - places[:, None]).clamp(-k, k)
        return F.one_hot(offsets + k + 1, 2 * k + 2).to(like)

    def bias(self, q: Tensor, grid: Grid) -> Tensor:
        H, W = grid
        P, N, d = self.num_prefix_tokens, q.shape[2], self.head_dim
        q = q * d**-0.5
        by_x = q[..., : d // 2] @ self.key_x.T  # (B, h, N, M)
        by_y = q[..., d // 2 :] @ self.key_y.T
        x = torch.einsum("bhrcm,ckm->bhrck", by_x[:, :, P:].unflatten(2, (H, W)), self.buckets(W, by_x))
        y = torch.einsum("bhrcm,rkm->bhrck", by_y[:, :, P:].unflatten(2, (H, W)), self.buckets(H, by_y))
        patches = (y[..., :, None] + x[..., None, :]).flatten(4, 5).flatten(2, 3)  # (B, h, H*W, H*W)
        if P == 0:
            return patches
        with_prefix = by_x[..., :1] + by_y[..., :1]  # (B, h, N, 1)
        patches = torch.cat([with_prefix[:, :, P:].expand(-1, -1, -1, P), patches], dim=3)
        return torch.cat([with_prefix[:, :, :P].expand(-1, -1, -1, N), patches], dim=2)

    def value_term(self, attention: Tensor, grid: Grid) -> Tensor:
        H, W = grid
        P = self.num_prefix_tokens
        patches = attention[:, :, P:, P:].unflatten(3, (H, W)).unflatten(2, (H, W))
        by_x = torch.einsum("bhrck,ckm->bhrcm", patches.sum(4), self.buckets(W, attention)).flatten(2, 3)
        by_y = torch.einsum("bhrck,rkm->bhrcm", patches.sum(5), self.buckets(H, attention)).flatten(2, 3)
        term = torch.cat([by_x @ self.value_x, by_y @ self.value_y], dim=-1)
        if P == 0:
            return term
        prefix = torch.cat([attention[:, :, :P].sum(-1), attention[:, :, P:, :P].sum(-1)], dim=2)
        return F.pad(term, (0, 0, P, 0)) + prefix[..., None] * torch.cat([self.value_x[0], self.value_y[0]])

    def views(self, queries: Tensor, grid: Grid) -> list[LayerView]:
        tables = {"key x": self.key_x, "key y": self.key_y, "value x": self.value_x, "value y": self.value_y}
        similarities = torch.stack([cosine_similarity(table) for table in tables.values()])
        k = self.max_relative_distance
        rows = ("prefix", *(f"{offset:+d}" if offset else "0" for offset in range(-k, k + 1)))
        title = "cosine similarity of table rows"
        table = LayerView("table", title, similarities, bounded=True, panels=tuple(tables), rows=rows)
        return [table, *super().views(queries, grid)]
