"""Trained vectors for classes of offsets, in the products with queries, keys and attention.

Shapes: B batch, h heads, d head width, P prefix tokens, M patches, N = P + M tokens.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, LayerSpec
from lape_vit.encodings.offsets import for_each_pair
from lape_vit.places import Places

ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2
SIDE = 2 * int(BETA) + 1
"""Classes of offsets along an axis."""
NUM_BUCKETS = SIDE**2 + 1
"""One for each pair of classes, and one for pairs with a prefix token."""


def classes(offset: Tensor) -> Tensor:
    """The class of each offset in cells, -3 .. 3: iRPE's piecewise function, cut to an integer."""
    size = offset.abs()
    far = ALPHA + (size.clamp(min=ALPHA) / ALPHA).log() / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
    near_or_far = torch.where(size <= ALPHA, size.round(), far.round().clamp(max=BETA))
    return (offset.sign() * near_or_far.floor()).long()


def bucket_of(dx: Tensor, dy: Tensor) -> Tensor:
    """The number of the bucket of each offset from query to key, of query less key."""
    return SIDE * (classes(-dy) + int(BETA)) + classes(-dx) + int(BETA)


@torch.fx.wrap
def of_pairs(of_buckets: Tensor, buckets: Tensor) -> Tensor:
    """What each token has for each bucket (B, h, N, 50), for the buckets of its pairs: (B, h, N, N)."""
    # In float32 or better, since its gradient is a sum over many pairs.
    exact = of_buckets.to(torch.promote_types(of_buckets.dtype, torch.float32))
    return exact.gather(-1, buckets.expand(*exact.shape[:-1], -1)).to(of_buckets.dtype)


@torch.fx.wrap
def sum_over_pairs(weights: Tensor, buckets: Tensor) -> Tensor:
    """The sum of each query's weights (B, h, N, N) over the keys of each bucket: (B, h, N, 50)."""
    exact = weights.to(torch.promote_types(weights.dtype, torch.float32))
    sums = exact.new_zeros(*exact.shape[:-1], NUM_BUCKETS)
    return sums.scatter_add(-1, buckets.expand_as(exact), exact).to(weights.dtype)


class IRPE(AttentionEncoding):
    """Image relative position encoding: product method, contextual mode, 50 buckets, shared by the heads.

    Wu et al. 2021, https://arxiv.org/abs/2107.14222. With B(i, j) the bucket of query i less key j: on keys a logit
    gains d^-1/2 q_i . r^K[B(i, j)]; on queries d^-1/2 k_j . r^Q[B(j, i)]; on values attention also gathers
    sum_j a_ij r^V[B(i, j)]. Tables are of each layer's own and start at zero, as in the code. Each axis has 7 classes:
    0, 1, 2 and all from 3 on, to both sides (alpha : beta : gamma = 1.9 : 3.8 : 15.2). In the code they are cut to
    integers only after they are clipped to 3.8, so that there is no class of 4. All pairs with a prefix token share
    bucket 49, as in the code, which skips any number of tokens.

    The source has it on top of a trained absolute encoding, which is ``learnable+irpe`` here; it also stands alone. Our
    rule: real offsets are rounded by the same function.

    Args:
        irpe_on: ``k``, on keys, as in the authors' recommended models; ``qk`` also on queries; ``qkv`` also on values.
    """

    name = "irpe"
    reads_real_places = False

    def __init__(self, spec: LayerSpec, *, irpe_on: Literal["k", "qk", "qkv"] = "k") -> None:
        super().__init__(spec)
        self.irpe_on = irpe_on
        self.key_table, self.query_table, self.value_table = (
            nn.Parameter(torch.empty(NUM_BUCKETS, spec.head_dim)) if side in irpe_on else None for side in "kqv"
        )
        # What attention gathers of the values' table takes part in the sums of attention; without it a bias does.
        self.overridden -= {"widen", "narrow"} if self.value_table is None else {"bias"}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero tables."""
        for table in self.parameters():
            nn.init.zeros_(table)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}

    def buckets(self, places: Places, dtype: torch.dtype | None = None) -> Tensor:
        """The bucket of each query (row) and key: (N, N), or (B, 1, N, N) where images differ."""
        P = self.num_prefix_tokens
        buckets = F.pad(for_each_pair(bucket_of, places), (P, 0, P, 0), value=NUM_BUCKETS - 1)
        return buckets[:, None] if places.differs_by_image else buckets

    def term(self, q: Tensor, k: Tensor, places: Places, scale: float) -> Tensor:
        """What the logits gain, scaled: (B, h, N, N)."""
        buckets = self.fixed(self.buckets, places, q)
        assert self.key_table is not None
        term = of_pairs(q @ (self.key_table.T * scale).to(q.dtype), buckets)
        if self.query_table is None:
            return term
        return term + of_pairs(k @ (self.query_table.T * scale).to(k.dtype), buckets).mT

    def bias(self, q: Tensor, k: Tensor, places: Places) -> Tensor:
        return self.term(q, k, places, self.head_dim**-0.5)

    def marks(self, places: Places, dtype: torch.dtype) -> Tensor:
        """A mark of its own for each key, and channels of zeros up to a multiple of 8: (N, E)."""
        x, _ = places.coordinates()
        marks = torch.eye(self.num_prefix_tokens + x.shape[-1], dtype=torch.float32, device=x.device)
        return F.pad(marks, (0, -(self.head_dim + len(marks)) % 8)).to(dtype)

    def widen(self, q: Tensor, k: Tensor, v: Tensor, read: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """On values: v is widened by marks, and so is k, by which the term of the logits needs no place of its own."""
        marks = self.fixed(self.marks, places, q)
        of_marks = F.pad(self.term(q, k, places, scale=1.0), (0, marks.shape[1] - marks.shape[0]))
        marks = marks.expand(q.shape[0], q.shape[1], -1, -1)
        return torch.cat([q, of_marks], dim=-1), torch.cat([k, marks], dim=-1), torch.cat([v, marks], dim=-1)

    def narrow(self, x: Tensor, places: Places) -> Tensor:
        assert self.value_table is not None
        buckets = self.fixed(self.buckets, places, x)
        weights = x[..., self.head_dim : self.head_dim + buckets.shape[-1]]
        of_buckets = sum_over_pairs(weights, buckets)
        return x[..., : self.head_dim] + of_buckets @ self.value_table.to(x.dtype)
