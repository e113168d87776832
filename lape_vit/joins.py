"""How an absolute encoding w reaches the layers, and which encodings each join can carry.

Shapes: T tables, R rows, N tokens, D embedding width, L layers; w is (T, R, D). x_l is the residual stream entering
block l.
"""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit import encodings
from lape_vit.encodings import AbsoluteEncoding, AttentionEncoding, Grid, Resolved


class Join(nn.Module):
    """Turns w into what each block receives.

    Args:
        encoding: where w comes from; None where there is nothing to join.
        num_prefix_tokens: P.
        depth: L.
        norm: makes one LayerNorm over D, with the model's own eps.
    """

    name: ClassVar[str]
    target: ClassVar[str]
    """Where terms are added: ``input`` (to x_0), ``residual`` (to each x_l) or ``attention`` (after each norm1)."""

    def __init__(
        self, encoding: AbsoluteEncoding | None, num_prefix_tokens: int, depth: int, norm: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.encoding = encoding
        self.depth = depth
        self.rows_without = num_prefix_tokens - encoding.prefix_rows if encoding is not None else 0

    @classmethod
    def carries(cls, encoding: Resolved) -> bool:
        """Whether this join is legal for an encoding."""
        return encoding.absolute is not None

    @classmethod
    def num_tables(cls, depth: int) -> int:
        """T, the trained tables that the join needs of a learned encoding."""
        return 1

    def forward(self, grid: Grid, pos_embed: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        """Terms of the input and of block 0 .. L-1, each (1, N, D) or None. They do not depend on the batch.

        Args:
            grid: (H, W) of the input at hand.
            pos_embed: the model's trained tables, None where the encoding has none.
        """
        if self.encoding is None:
            return None, no_terms(self.depth)
        return self.terms(self.encoding(grid, pos_embed))

    def terms(self, w: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The same, from w (T, R, D)."""
        raise NotImplementedError

    def prepare(self, encoding: AttentionEncoding) -> None:
        """Adapt one layer's attention encoding to the join."""

    def keep_layers(self, depth: int) -> None:
        """Forget the layers from ``depth`` on."""
        self.depth = depth

    def to_tokens(self, rows: Tensor) -> Tensor:
        """(1, R, D) to (1, N, D): a prefix token without a row receives zeros."""
        if self.rows_without == 0:
            return rows
        # As a matrix, so that the gradient is contiguous, which distributed training wants.
        return F.pad(rows[0], (0, 0, self.rows_without, 0))[None]


def no_terms(depth: int) -> list[Tensor | None]:
    """Blocks that receive nothing."""
    terms: list[Tensor | None] = []
    for _ in range(depth):
        terms.append(None)
    return terms


class Basic(Join):
    """x_0 = tokens + w (ViT, DeiT)."""

    name = "basic"
    target = "input"

    @classmethod
    def carries(cls, encoding: Resolved) -> bool:
        return True

    def terms(self, w: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        return self.to_tokens(w), no_terms(self.depth)


class Share(Join):
    """The same w is added to the residual stream before every block: x_l + w."""

    name = "share"
    target = "residual"

    def terms(self, w: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        terms: list[Tensor | None] = [self.to_tokens(w)]
        return None, terms * self.depth


class Unshare(Join):
    """Each layer has its own trained table: x_l + w_l."""

    name = "unshare"
    target = "residual"

    @classmethod
    def carries(cls, encoding: Resolved) -> bool:
        return encoding.absolute is not None and encoding.absolute.learned

    @classmethod
    def num_tables(cls, depth: int) -> int:
        return depth

    def terms(self, w: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        terms: list[Tensor | None] = []
        for layer in range(self.depth):
            terms.append(self.to_tokens(w[layer : layer + 1]))
        return None, terms


class LaPE(Join):
    """Block l's attention reads LN(x_l) + w_{l+1} with w_{l+1} = LNpe_l(w_l), w_0 = w (Yu et al., ICCV 2023).

    A bias in the logits that stands alone is normalised in its place, independently in each layer.
    """

    name = "LaPE"
    target = "attention"

    def __init__(
        self, encoding: AbsoluteEncoding | None, num_prefix_tokens: int, depth: int, norm: Callable[[], nn.Module]
    ) -> None:
        super().__init__(encoding, num_prefix_tokens, depth, norm)
        self.norms = nn.ModuleList(norm() for _ in range(depth) if encoding is not None)

    @classmethod
    def carries(cls, encoding: Resolved) -> bool:
        return encoding.absolute is not None or (encoding.attention is not None and encoding.attention.takes_norm)

    def prepare(self, encoding: AttentionEncoding) -> None:
        if self.encoding is None:
            encoding.add_norm()

    def keep_layers(self, depth: int) -> None:
        super().keep_layers(depth)
        self.norms = self.norms[:depth]

    def terms(self, w: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        terms: list[Tensor | None] = []
        for norm in self.norms:
            w = norm(w)
            terms.append(self.to_tokens(w))
        return None, terms


class LaPEShare(LaPE):
    """LaPE without the chain: block l's attention reads LN(x_l) + LNpe_l(w) ("sharing PE" in the paper's Table 7)."""

    name = "LaPE_share"

    @classmethod
    def carries(cls, encoding: Resolved) -> bool:
        return encoding.absolute is not None

    def terms(self, w: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        terms: list[Tensor | None] = []
        for norm in self.norms:
            terms.append(self.to_tokens(norm(w)))
        return None, terms


JOINS: dict[str, type[Join]] = {join.name: join for join in (Basic, Share, Unshare, LaPE, LaPEShare)}


def legal_joins(pe: str) -> list[str]:
    """Names of the joins that can carry an encoding."""
    encoding = encodings.resolve(pe)
    return [name for name, join in JOINS.items() if join.carries(encoding)]


def legal_pairs() -> list[tuple[str, str]]:
    """Every legal (pe, join_type), sums of encodings included."""
    return [(pe, join_type) for pe in encodings.names() for join_type in legal_joins(pe)]


def check_pair(pe: str, join_type: str) -> None:
    """Raise ValueError, naming what is legal, where an encoding or a join is unknown or the two do not go together."""
    legal = legal_joins(pe)
    if join_type not in JOINS:
        raise ValueError(f"unknown join_type={join_type!r}; known: {', '.join(JOINS)}")
    if join_type not in legal:
        raise ValueError(f"join_type={join_type!r} cannot carry pe={pe!r}; legal for it: {', '.join(legal)}")
