"""Relative positions in two dimensions, in the logits and in the values.

Shapes: B batch, h heads, d head width, H x W cells, P prefix tokens, M patches, N = P + M tokens, k the largest
distance told apart, 2k + 2 buckets per axis: 0 for every pair with a prefix token, 1 .. 2k+1 for distances -k .. k;
A = 4k + 4 buckets of both axes, columns before rows; E marks.

A key is described by marks. On a whole grid these are its column and its row: a channel for each of W columns, one
for each of H - 1 rows (a key without one is in the last row), and one for prefix tokens. At other places each key has a
mark of its own. Channels of zeros fill up to a multiple of 8, counted with d.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, LayerSpec, autograd_keeps
from lape_vit.places import Places


@torch.fx.wrap
def to_buckets(of_marks: Tensor, buckets: Tensor) -> Tensor:
    """What each query has for marks (B, h, N, E), summed by buckets (N, A, E) or (B, N, A, E): (B, N, h, A)."""
    return torch.einsum("bhie,bime->bihm" if buckets.dim() == 4 else "bhie,ime->bihm", of_marks, buckets)


@torch.fx.wrap
def widen_query(q: Tensor, vectors: Tensor, buckets: Tensor) -> Tensor:
    """q (B, h, N, d) and, beside it, its product with each mark (B, h, N, d + E).

    Args:
        vectors: of each bucket, (A, d).
        buckets: how often each mark counts for each bucket of a query, (N, A, E) or (B, N, A, E).
    """
    if autograd_keeps():
        return WidenQuery.apply(q, vectors, buckets)
    of_buckets = q.transpose(1, 2) @ vectors.T  # in the order of q's memory
    of_marks = torch.einsum("bihm,bime->bhie" if buckets.dim() == 4 else "bihm,ime->bhie", of_buckets, buckets)
    return torch.cat([q, of_marks], dim=-1)


class WidenQuery(torch.autograd.Function):
    """:func:`widen_query`, which keeps its result alone for the backward pass: attention keeps it anyway, and q is a
    part of it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, vectors: Tensor, buckets: Tensor) -> Tensor:
        return widen_query(q, vectors, buckets)  # autograd keeps nothing in here

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        wide, vectors, buckets = ctx.saved_tensors
        width = vectors.shape[-1]
        of_buckets = to_buckets(grad[..., width:], buckets)
        of_q = grad[..., :width] + (of_buckets @ vectors).transpose(1, 2)
        of_vectors = torch.einsum("bihm,bihd->md", of_buckets, wide[..., :width].transpose(1, 2))
        return of_q, of_vectors, None


class Relative(AttentionEncoding):
    """Trained vectors for the clipped horizontal and vertical offsets from query to key, shared by the heads.

    Shaw et al. 2018 (https://arxiv.org/abs/1803.02155, Eq. 3 and 4) in two dimensions: the offset's column picks the
    first half of the vector, its row the second; one pair of tables for the keys, one for the values. On a whole grid
    neither an (N, N, d) nor an (N, N) tensor is built: a query's product with each bucket is spread over the marks, by
    which q is widened as k is by its marks; attention gathers marks beside values, and the tables weigh their buckets.
    Real offsets are rounded.

    Args:
        max_relative_distance: k, in patches; longer offsets count as k.
    """

    name = "relative"
    divisor = 2
    reads_real_places = False

    def __init__(self, spec: LayerSpec, *, max_relative_distance: int = 2) -> None:
        if max_relative_distance < 1:
            raise ValueError(f"max_relative_distance={max_relative_distance}: it must be at least 1")
        super().__init__(spec)
        self.max_relative_distance = max_relative_distance
        shape = (2 * max_relative_distance + 2, spec.head_dim // 2)
        self.key_x, self.key_y = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.value_x, self.value_y = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1) tables, as in the compact 2D-PE ViT."""
        for table in (self.key_x, self.key_y, self.value_x, self.value_y):
            nn.init.normal_(table)

    def no_weight_decay(self) -> set[str]:
        return {"key_x", "key_y", "value_x", "value_y"}

    def buckets(self, places: Places, dtype: torch.dtype) -> Tensor:
        """How often each mark counts for each bucket of a query: (N, A, E), or (B, N, A, E) where images differ."""
        P, k = self.num_prefix_tokens, self.max_relative_distance
        num_buckets = 2 * k + 2
        if places.is_whole:
            # The marks of a column and of a row add up to the buckets of both offsets. So the last row, which has no
            # mark, is counted with each column, and taken off again with any other row.
            (height, width), (x, y) = places.grid, places.coordinates(torch.long)
            to_columns = (torch.arange(width, device=x.device) - x[:, None]).clamp(-k, k) + k + 1
            to_rows = (torch.arange(height, device=x.device) - y[:, None]).clamp(-k, k) + k + 1
            columns = F.one_hot(F.pad(to_columns, (0, 0, P, 0)), 2 * num_buckets)
            rows = F.one_hot(F.pad(to_rows, (0, 0, P, 0)) + num_buckets, 2 * num_buckets)
            last_row = rows[:, -1:]
            # Not by cat, whose indices torch's compiler cannot work out on a GPU.
            buckets = columns.new_zeros(columns.shape[0], width + height, 2 * num_buckets)
            buckets[:, :width] = columns + last_row
            buckets[:, width:-1] = rows[:, :-1] - last_row
            buckets[:, -1, ::num_buckets] = 1
        else:
            dx, dy = (offset.round().long().clamp(-k, k) + k + 1 for offset in places.offsets())
            dx, dy = F.pad(dx, (P, 0, P, 0)), F.pad(dy, (P, 0, P, 0)) + num_buckets
            buckets = F.one_hot(dx, 2 * num_buckets) + F.one_hot(dy, 2 * num_buckets)
        return self._filled_up(buckets.transpose(-2, -1)).to(dtype)

    def marks(self, places: Places, dtype: torch.dtype) -> Tensor:
        """Each key's marks, (N, E)."""
        P = self.num_prefix_tokens
        if places.is_whole:
            (height, width), (x, y) = places.grid, places.coordinates(torch.long)
            # Not by one_hot, which cannot be recorded for grids of any size.
            of_column = x[:, None] == torch.arange(width, device=x.device)
            of_row = y[:, None] == torch.arange(height - 1, device=x.device)
            of_patches = F.pad(torch.cat([of_column, of_row], dim=1).long(), (0, 1))
            marks = torch.cat([F.pad(of_patches.new_ones(P, 1), (width + height - 1, 0)), of_patches])
        else:
            x, _ = places.coordinates()
            marks = torch.eye(P + x.shape[-1], dtype=torch.long, device=x.device)
        return self._filled_up(marks).to(dtype)

    def _filled_up(self, marks: Tensor) -> Tensor:
        return F.pad(marks, (0, -(self.head_dim + marks.shape[-1]) % 8))  # a multiple of which fused kernels want

    def vectors(self, table_x: Tensor, table_y: Tensor, like: Tensor) -> Tensor:
        """What each bucket adds to a key or value (A, d), in the dtype of ``like``."""
        half = self.head_dim // 2
        return torch.cat([F.pad(table_x, (0, half)), F.pad(table_y, (half, 0))]).to(like.dtype)

    def widen(self, q: Tensor, k: Tensor, v: Tensor, read: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        buckets, marks = self.fixed(self.buckets, places, q), self.fixed(self.marks, places, q)
        vectors = self.vectors(self.key_x, self.key_y, q)
        wide = widen_query(q, vectors, buckets)
        marks = marks.expand(q.shape[0], q.shape[1], -1, -1)
        return wide, torch.cat([k, marks], dim=-1), torch.cat([v, marks], dim=-1)

    def narrow(self, x: Tensor, places: Places) -> Tensor:
        buckets = self.fixed(self.buckets, places, x)
        values, gathered = x.split([self.head_dim, buckets.shape[-1]], dim=-1)
        of_buckets = to_buckets(gathered, buckets)
        return values + (of_buckets @ self.vectors(self.value_x, self.value_y, x)).transpose(1, 2)
