"""How an absolute encoding w reaches the layers, and which encodings each join can carry.

Shapes: B batch, T tables, R rows, N tokens, D embedding width, L layers; w is (1, R, D), or (B, R, D) where the places
of images differ. x_l is the residual stream entering block l.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit import encodings
from lape_vit.encodings import AbsoluteEncoding, AttentionEncoding, Resolved
from lape_vit.places import Places


class Terms(NamedTuple):
    """What a join adds, and where: each a tensor (1, N, D) or (B, N, D), or None. Any of them may be there together.

    Attributes:
        input: added to x_0.
        residual: of each block l, added to x_l before norm1; empty where no block has one.
        attention: of each block l, added to what its attention reads, after norm1; empty where no block has one.
        output: added after the last norm.
    """

    input: Tensor | None = None
    residual: Sequence[Tensor | None] = ()
    attention: Sequence[Tensor | None] = ()
    output: Tensor | None = None

    def of_block(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The terms of the residual and of attention in one block."""
        residual, attention = (terms[layer] if terms else None for terms in (self.residual, self.attention))
        return residual, attention

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Terms":
        """The same with every tensor changed."""

        def apply(term: Tensor | None) -> Tensor | None:
            return None if term is None else change(term)

        return Terms(apply(self.input), [*map(apply, self.residual)], [*map(apply, self.attention)], apply(self.output))


class Join(nn.Module):
    """Turns w into what each layer receives. A subclass defines :meth:`terms`.

    Args:
        encoding: where w comes from; None where there is nothing to join.
        num_prefix_tokens: P.
        depth: L.
        norm: makes one LayerNorm over D, with the model's own eps.
    """

    name: ClassVar[str]

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

    def forward(self, places: Places, like: Tensor, pos_embed: Tensor | None) -> Terms:
        """What is added, and where. It depends on the places of the patches, not on the images.

        Args:
            like: has the dtype of the model.
            pos_embed: the model's trained tables (T, R, D), None where the encoding has none.
        """
        if self.encoding is None:
            return Terms()
        if pos_embed is None:
            return self.terms(self.encoding(places, like))
        tables = [pos_embed[number : number + 1] for number in range(self.num_tables(self.depth))]
        return self.terms(*(self.encoding(places, like, table) for table in tables))

    def terms(self, *w: Tensor) -> Terms:
        """The same, from w of each of the T tables."""
        raise NotImplementedError

    def prepare(self, encoding: AttentionEncoding) -> None:
        """Adapt one layer's attention encoding to the join."""

    def keep_layers(self, depth: int) -> None:
        """Forget the layers from ``depth`` on."""
        self.depth = depth

    def to_tokens(self, rows: Tensor) -> Tensor:
        """(1 or B, R, D) to (1 or B, N, D): a prefix token without a row receives zeros."""
        return rows if self.rows_without == 0 else pad_rows(rows, self.rows_without)


class Basic(Join):
    """x_0 = tokens + w (ViT, DeiT)."""

    name = "basic"

    @classmethod
    def carries(cls, encoding: Resolved) -> bool:
        return True

    def terms(self, *w: Tensor) -> Terms:
        return Terms(input=self.to_tokens(w[0]))


class Share(Join):
    """The same w is added to the residual stream before every block: x_l + w."""

    name = "share"

    def terms(self, *w: Tensor) -> Terms:
        return Terms(residual=[self.to_tokens(w[0])] * self.depth)


class Unshare(Join):
    """Each layer has its own trained table: x_l + w_l."""

    name = "unshare"

    @classmethod
    def carries(cls, encoding: Resolved) -> bool:
        return encoding.absolute is not None and encoding.absolute.learned

    @classmethod
    def num_tables(cls, depth: int) -> int:
        return depth

    def terms(self, *w: Tensor) -> Terms:
        return Terms(residual=[self.to_tokens(rows) for rows in w])


class LaPE(Join):
    """Block l's attention reads LN(x_l) + w_{l+1} with w_{l+1} = LNpe_l(w_l), w_0 = w (Yu et al., ICCV 2023).

    A bias in the logits that stands alone is normalised in its place, independently in each layer.
    """

    name = "LaPE"

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

    def terms(self, *w: Tensor) -> Terms:
        rows, terms = w[0], []
        for norm in self.norms:
            rows = norm(rows)
            terms.append(self.to_tokens(rows))
        return Terms(attention=terms)


class LaPEShare(LaPE):
    """LaPE without the chain: block l's attention reads LN(x_l) + LNpe_l(w) ("sharing PE" in the paper's Table 7)."""

    name = "LaPE_share"

    @classmethod
    def carries(cls, encoding: Resolved) -> bool:
        return encoding.absolute is not None

    def terms(self, *w: Tensor) -> Terms:
        return Terms(attention=[self.to_tokens(norm(w[0])) for norm in self.norms])


class PVG(Join):
    """x_0 = tokens + w, and block l >= 1 reads LN(x_l) + w_l with w_l = LNpe_l(w_{l-1}), w_0 = w; L - 1 norms.

    Source: https://arxiv.org/abs/2502.02919, of which we found no code; it is made for models without class token whose
    output is the mean of their patches after the last norm (``class_token=False, global_pool="avg", fc_norm=False``).
    Other models take it, too: a prefix token with a row of its own has the terms of its row, one without has none.
    """

    name = "PVG"

    def __init__(
        self, encoding: AbsoluteEncoding | None, num_prefix_tokens: int, depth: int, norm: Callable[[], nn.Module]
    ) -> None:
        super().__init__(encoding, num_prefix_tokens, depth, norm)
        # by the number of the block whose term they make
        self.norms = nn.ModuleDict({str(layer): norm() for layer in range(1, depth)})

    def keep_layers(self, depth: int) -> None:
        super().keep_layers(depth)
        self.norms = nn.ModuleDict({str(layer): self.norms[str(layer)] for layer in range(1, depth)})

    def terms(self, *w: Tensor) -> Terms:
        rows = w[0]
        attention: list[Tensor | None] = [None]
        for norm in self.norms.values():
            rows = norm(rows)
            attention.append(self.to_tokens(rows))
        return Terms(input=self.to_tokens(w[0]), attention=attention)


class MPVG(PVG):
    """PVG, and LNpe_L(w) is added after the last norm, before the mean over patches; L norms (the same source).

    Our rule for prefix tokens, which the source has not: one with a row of its own gets LNpe_L of that row; one without
    counts as a row of zeros here and gets the norm's shift, so that no model leaves this norm without any effect.

    Where the mean over patches goes straight to a linear head, that term is the same vector for every image of one
    size. The last norm's shift can hold it: there MPVG and PVG are the same functions, and differ in training alone.
    """

    name = "MPVG"

    def __init__(
        self, encoding: AbsoluteEncoding | None, num_prefix_tokens: int, depth: int, norm: Callable[[], nn.Module]
    ) -> None:
        super().__init__(encoding, num_prefix_tokens, depth, norm)
        self.output_norm = norm()

    def terms(self, *w: Tensor) -> Terms:
        return super().terms(*w)._replace(output=self.output_norm(self.to_tokens(w[0])))


JOINS: dict[str, type[Join]] = {join.name: join for join in (Basic, Share, Unshare, LaPE, LaPEShare, PVG, MPVG)}


@torch.fx.wrap
def pad_rows(rows: Tensor, count: int) -> Tensor:
    """Rows of zeros before those (1 or B, R, D) that are there: (1 or B, count + R, D)."""
    if rows.shape[0] > 1:
        return F.pad(rows, (0, 0, count, 0))
    # As a matrix, so that the gradient is contiguous, which distributed training wants.
    return F.pad(rows[0], (0, 0, count, 0))[None]


def legal_joins(pe: str) -> list[str]:
    """Names of the joins that can carry an encoding."""
    encoding = encodings.resolve(pe)
    return [name for name, join in JOINS.items() if join.carries(encoding)]


def legal_pairs() -> list[tuple[str, str]]:
    """Every legal (pe, join_type) of single encodings."""
    return [(pe, join_type) for pe in encodings.names() for join_type in legal_joins(pe)]


def check_pair(pe: str, join_type: str) -> None:
    """Raise ValueError, naming what is legal, where an encoding or a join is unknown or the two do not go together."""
    legal = legal_joins(pe)
    if join_type not in JOINS:
        raise ValueError(f"unknown join_type={join_type!r}; known: {', '.join(JOINS)}")
    if join_type not in legal:
        raise ValueError(f"join_type={join_type!r} cannot carry pe={pe!r}; legal for it: {', '.join(legal)}")
