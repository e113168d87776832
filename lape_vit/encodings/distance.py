"""Logits that fall with the distance between two patches; nothing is trained.

Shapes: h heads, Q queries, K keys. D = (dx, dy) is the offset from query to key, in cells, y downwards.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lape_vit.encodings.base import AttentionEncoding, LayerSpec


def fall_with_distance(dx: Tensor, dy: Tensor, slopes: list[float]) -> Tensor:
    """-slope ||D|| of each head: (..., h, Q, K) for offsets (..., 1, Q, K)."""
    distance = (dx**2 + dy**2).sqrt()
    return -torch.tensor(slopes, dtype=dx.dtype, device=dx.device)[:, None, None] * distance


class ALiBi(AttentionEncoding):
    """-m_t ||D||_2 for head t = 1 .. h (CROMA, Fuller et al. 2023, https://arxiv.org/abs/2311.00566).

    The slopes are ALiBi's (Press et al. 2022, https://arxiv.org/abs/2108.12409): 2^(-8t/h) where h is a power of two;
    otherwise those of the next smaller power of two p, and then every second one of those of 2p. CROMA knows no prefix
    tokens; here pairs with one have no term.
    """

    name = "alibi"

    def offset_bias(self, dx: Tensor, dy: Tensor) -> Tensor:
        return fall_with_distance(dx, dy, alibi_slopes(self.num_heads))


def alibi_slopes(num_heads: int) -> list[float]:
    """m_1 .. m_h, as ALiBi has them."""
    power = 2 ** math.floor(math.log2(num_heads))
    regular = [2 ** (-8 * t / power) for t in range(1, power + 1)]
    between = [2 ** (-8 * t / (2 * power)) for t in range(1, 2 * power, 2)]
    return regular + between[: num_heads - power]


TOLERANCE = 1e-4
"""In cells: how far beyond a border a key still belongs to a field of view. Places that were moved by a fraction of a
cell are off by rounding, and a key on the border would otherwise come and go."""

View = Callable[[Tensor, Tensor], Tensor]
"""From the offsets (dx, dy) to whether the key is seen."""


def up(dx: Tensor, dy: Tensor) -> Tensor:
    return -dy >= dx.abs() - TOLERANCE


def down(dx: Tensor, dy: Tensor) -> Tensor:
    return up(dx, -dy)


def left(dx: Tensor, dy: Tensor) -> Tensor:
    return up(dy, dx)


def right(dx: Tensor, dy: Tensor) -> Tensor:
    return up(dy, -dx)


def not_beyond(offset: Tensor) -> Tensor:
    """Whether an offset is negative or 0."""
    return offset <= TOLERANCE


KINDS: dict[str, tuple[View, View, View, View]] = {
    "corners": (
        lambda dx, dy: not_beyond(dx) & not_beyond(dy),
        lambda dx, dy: not_beyond(-dx) & not_beyond(dy),
        lambda dx, dy: not_beyond(dx) & not_beyond(-dy),
        lambda dx, dy: not_beyond(-dx) & not_beyond(-dy),
    ),
    "triangles": (up, down, left, right),
    "halves": (
        lambda dx, dy: not_beyond(dy),
        lambda dx, dy: not_beyond(-dy),
        lambda dx, dy: not_beyond(dx),
        lambda dx, dy: not_beyond(-dx),
    ),
    "diagonals": (
        lambda dx, dy: up(dx, dy) | right(dx, dy),
        lambda dx, dy: up(dx, dy) | left(dx, dy),
        lambda dx, dy: down(dx, dy) | right(dx, dy),
        lambda dx, dy: down(dx, dy) | left(dx, dy),
    ),
    "first eighths": (
        lambda dx, dy: up(dx, dy) & not_beyond(dx),
        lambda dx, dy: down(dx, dy) & not_beyond(dx),
        lambda dx, dy: left(dx, dy) & not_beyond(dy),
        lambda dx, dy: right(dx, dy) & not_beyond(dy),
    ),
    "second eighths": (
        lambda dx, dy: up(dx, dy) & not_beyond(-dx),
        lambda dx, dy: down(dx, dy) & not_beyond(-dx),
        lambda dx, dy: left(dx, dy) & not_beyond(-dy),
        lambda dx, dy: right(dx, dy) & not_beyond(-dy),
    ),
}
"""The directions of each kind; borders belong to a field of view, and every patch sees itself."""

KINDS_OF_VIEW = {
    45: ("first eighths", "second eighths"),
    90: ("corners", "triangles"),
    180: ("halves", "diagonals"),
}
"""By the angle of the field of view: the two kinds of four directions each."""


def everywhere(dx: Tensor, dy: Tensor) -> Tensor:
    return not_beyond(-dx.abs())  # not by ones_like, whose size the older exporter to ONNX fixes


def lookhere_heads(view: int, num_heads: int, layer: int) -> list[tuple[View, float]]:
    """Field of view and slope m_t of each head; the rule is :class:`LookHere`'s."""
    first, second = (KINDS[kind] for kind in KINDS_OF_VIEW[view])
    if num_heads < 5:
        turns = [(first + second)[(layer * (num_heads - 1) + head) % 8] for head in range(num_heads - 1)]
        return [*((seen, 0.5) for seen in turns), (everywhere, 0.25)]
    undirected = (num_heads - 1) % 4 + 1
    fours = (num_heads - undirected) // 4
    directed = [
        (seen, 0.5 ** (round_ + 1))
        for kind, rounds in ((first, (fours + 1) // 2), (second, fours // 2))
        for round_ in range(rounds)
        for seen in kind
    ]
    return directed + [(everywhere, 0.25**power) for power in range(1, undirected + 1)]


class LookHere(AttentionEncoding):
    """-g s_l m_t ||D||_2 where the key lies in the head's field of view, -inf outside of it.

    Fuller et al. 2024, https://arxiv.org/abs/2405.13985. g = 2; s_l falls from 1.5 in the first layer to 0.5 in the
    last; a model of one layer has 1.5. Rows and columns of prefix tokens are 0. The authors know 6, 12 and 16 heads:
    directed heads in groups of four directions (m = 1/2; 1/4 the second time), and 2 to 4 heads that look everywhere
    (m = 1/4, 1/16, 1/64, 1/256). Their code rounds the bias to bfloat16, and has a large finite number for -inf.

    Three rules are ours. Any number of heads from 5 on has 1 to 4 heads that look everywhere, such that groups of four
    are left; the groups take turns between the two kinds of a view, and the slope halves each time that a kind comes
    again. This gives the authors' heads at 6, 12 and 16. Fewer than 5 heads have no group: the last one looks
    everywhere, and the others take turns through the eight directions from layer to layer. Keys up to 1e-4 cells
    beyond the border of a field of view belong to it.

    Args:
        lookhere_view: the angle of a directed head's field of view, in degrees.
    """

    name = "lookhere"
    differs_by_layer = True
    global_slope: ClassVar[float] = 2.0

    def __init__(self, spec: LayerSpec, *, lookhere_view: Literal[45, 90, 180] = 90) -> None:
        super().__init__(spec)
        self.lookhere_view = lookhere_view
        self.layer = spec.layer
        self.layer_slope = 1.5 - spec.layer / max(spec.depth - 1, 1)

    def offset_bias(self, dx: Tensor, dy: Tensor) -> Tensor:
        heads = lookhere_heads(self.lookhere_view, self.num_heads, self.layer)
        seen = torch.cat([view(dx, dy) for view, _ in heads], dim=-3)
        bias = fall_with_distance(dx, dy, [self.global_slope * self.layer_slope * slope for _, slope in heads])
        return bias.masked_fill(~seen, -math.inf)
