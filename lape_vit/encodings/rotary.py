"""Rotations of q and k by angles that grow with a patch's place, so that q.k depends on the offset alone.

Shapes: B batch, h heads, d head width, P prefix tokens, M patches, N = P + M tokens. Channels 2i and 2i + 1 form pair
i, or channels i and i + d/2, where the source has that order; a pair turns by one angle; there are d/2 pairs. Fixed
angles are computed in float64 for the places at hand.
"""

import math
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, LayerSpec, autograd_keeps
from lape_vit.places import Grid, Places


@torch.fx.wrap
def turn(x: Tensor, turns: Tensor, halves: bool) -> Tensor:
    """Turn each pair of channels of x (..., d), in float32 or better.

    Args:
        turns: of :meth:`Rotary.turns`, in float32 or float64.
        halves: whether channels i and i + d/2 form pair i, and not channels 2i and 2i + 1.
    """
    # Compilers and readers of a traced graph know no complex numbers, and need none to be fast.
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not halves and not is_recorded:
        return TrainedTurn.apply(x, turns) if turns.requires_grad and autograd_keeps() else turn_pairs(x, turns)
    channels = x.to(torch.promote_types(x.dtype, torch.float32))
    turns = turns.to(channels.dtype)
    if halves:
        of_itself, of_partner = turns.unbind(0)
        first, second = channels.chunk(2, dim=-1)
        return torch.addcmul(channels * of_itself, torch.cat([second, first], dim=-1), of_partner).to(x.dtype)
    (first, second), (cos, sin) = (one.unflatten(-1, (-1, 2)).unbind(-1) for one in (channels, turns))
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).to(x.dtype)


def as_complex(x: Tensor, like: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 of x (..., d) as one number: (..., d/2), as exact as those of ``like``, or float32."""
    exact = x.to(torch.promote_types(like.dtype, torch.float32))
    return torch.view_as_complex((exact if exact.stride(-1) == 1 else exact.contiguous()).unflatten(-1, (-1, 2)))


def as_real(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`as_complex`, in the dtype of ``like``."""
    return torch.view_as_real(x).flatten(-2).to(like.dtype)


def turn_pairs(x: Tensor, turns: Tensor) -> Tensor:
    return as_real(as_complex(x, x) * as_complex(turns, x), x)


class TrainedTurn(torch.autograd.Function):
    """:func:`turn_pairs` by trained angles.

    The gradient of an angle needs x before the turn. It is the result turned back, since a turn has length 1. So only
    the result is kept for the backward pass, which attention keeps anyway.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, turns: Tensor) -> Tensor:
        return turn_pairs(x, turns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        turned, turns = ctx.saved_tensors
        grad_, turned_, turns_ = (as_complex(one, turned) for one in (grad, turned, turns))
        of_turns = (grad_ * turned_.conj()).sum_to_size(turns_.shape) * turns_
        return as_real(grad_ * turns_.conj(), grad), as_real(of_turns, turns)


@torch.fx.wrap
def in_float32_or_better(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype, or in float32 where that one is shorter."""
    return x.to(torch.promote_types(dtype, torch.float32))


class Rotary(AttentionEncoding):
    """The common part: subclasses give the angles. Prefix tokens are not turned."""

    divisor = 4

    halves: ClassVar[bool] = False
    """Whether channels i and i + d/2 form pair i, and not channels 2i and 2i + 1."""

    def angles(self, places: Places) -> Tensor:
        """In radians, per patch and pair: broadcasts to (h, M, d/2), or to (B, h, M, d/2) where images differ."""
        raise NotImplementedError

    def turns(self, places: Places, dtype: torch.dtype) -> Tensor:
        """What :func:`turn` multiplies channels by, (h, N, d) or (B, h, N, d), in float32 or better.

        Cosine and sine of each pair, side by side; of halves, two such tensors (2, ...): what a channel is multiplied
        by, and what its partner is.
        """
        angles = F.pad(self.angles(places), (0, 0, self.num_prefix_tokens, 0))
        cos, sin = angles.cos(), angles.sin()
        if self.halves:
            turns = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
        else:
            turns = torch.stack([cos, sin], dim=-1).flatten(-2)
        heads = turns.expand(*(-1,) * (self.halves + places.differs_by_image), self.num_heads, -1, -1)
        # As q lies in memory, where heads and channels are one run: a product then takes half of the time.
        in_order = heads.transpose(-3, -2).contiguous().transpose(-3, -2)
        return in_float32_or_better(in_order, dtype)

    def rotate(self, q: Tensor, k: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        turns = self.compute(self.turns, places, q)
        return turn(q, turns, self.halves), turn(k, turns, self.halves)


def per_axis(places: Places, frequencies: Tensor, first: float = 0.0) -> Tensor:
    """Angles of axial forms, (1, M, d/2) or (B, 1, M, d/2): columns turn the first d/4 pairs, rows the others.

    Args:
        frequencies: (d/4,), in radians per cell.
        first: what the first column and row count as.
    """
    angles = [(axis[..., None] + first) * frequencies.to(axis.device) for axis in places.coordinates(frequencies.dtype)]
    return torch.cat(angles, dim=-1).unsqueeze(-3)


class Rope(Rotary):
    """The compact 2D-PE ViT's form: columns turn the first d/4 pairs, rows the others.

    Places count from 1, pair i = 1 .. d/4 of an axis turns by 10000^(-2i / (d/2)) per patch (Su et al. 2021,
    https://arxiv.org/abs/2104.09864, Eq. 15, per axis).
    """

    name = "rope"

    def angles(self, places: Places) -> Tensor:
        pairs = torch.arange(1, self.head_dim // 4 + 1, dtype=torch.float64)
        return per_axis(places, torch.exp(-math.log(10000.0) * pairs / (self.head_dim / 4)), first=1)


class RopeAxial(Rotary):
    """RoPE-ViT's axial form: columns turn the first d/4 pairs, rows the others.

    Places count from 0, pair i = 0 .. d/4 - 1 of an axis turns by theta^(-4i / d) per patch (Heo et al. 2024,
    https://arxiv.org/abs/2403.13298, Sec. 3.2).

    Args:
        rope_theta: the base of the frequencies.
    """

    name = "rope_axial"

    def __init__(self, spec: LayerSpec, *, rope_theta: float = 100.0) -> None:
        super().__init__(spec)
        self.rope_theta = check_theta(rope_theta)

    def angles(self, places: Places) -> Tensor:
        return per_axis(places, axial_frequencies(self.head_dim, self.rope_theta))


class RopeDINOv3(Rotary):
    """DINOv3's form: rotations over coordinates from -1 to 1, so that a grid of any size turns as far in all.

    With u = 2 (x + 1/2) / W - 1 and v = 2 (y + 1/2) / H - 1, pair i = 0 .. d/4 - 1 of an axis turns by
    2 pi u / theta^(4i / d); rows turn the first d/4 pairs, columns the others, and channel c pairs with c + d/2
    (Simeoni et al. 2025, https://arxiv.org/abs/2508.10104, and the order of its code). H and W are those of the grid
    at hand. The code computes in bfloat16 by default, we in float64.

    Args:
        rope_theta: the base of the periods.
        rope_normalize: what both axes are divided by: each by its own side, or both by the longer or shorter one.
    """

    name = "rope_dinov3"
    halves = True

    def __init__(
        self,
        spec: LayerSpec,
        *,
        rope_theta: float = 100.0,
        rope_normalize: Literal["separate", "max", "min"] = "separate",
    ) -> None:
        super().__init__(spec)
        self.rope_theta = check_theta(rope_theta)
        self.rope_normalize = rope_normalize

    def angles(self, places: Places) -> Tensor:
        longest, shortest = max(places.grid), min(places.grid)
        sides = {"separate": places.grid, "max": (longest, longest), "min": (shortest, shortest)}[self.rope_normalize]
        u, v = centred(places, sides)
        frequencies = 2 * math.pi * axial_frequencies(self.head_dim, self.rope_theta).to(u.device)
        return torch.cat([axis[..., None] * frequencies for axis in (v, u)], dim=-1).unsqueeze(-3)


class RopeGolden(Rotary):
    """Golden-ratio form: fixed frequencies in the plane, in directions that fill it evenly over all heads and pairs.

    Pair i of every head turns by magnitude min (max / min)^(i / (d/2 - 1)) along a direction of its own. With phi the
    root of phi^3 = phi + 1, pair n = 1 .. h d/2, counted through all heads, has the fractions of n / phi (rows) and
    n / phi^2 (columns); the inverse of the normal distribution makes of them a vector, and its direction is taken.
    Channel c pairs with c + d/2. Source: vit-pytorch's rotary encoding in n dimensions
    (https://github.com/lucidrains/vit-pytorch, vit_nd_rotary.py). Its code stops 4e-8 above the root, and leaves the
    coordinates to its caller. Ours go from -1 to 1, as DINOv3's, over the grid at hand.

    Args:
        rope_min_frequency: of pair 0, in radians per half a side of the grid.
        rope_max_frequency: of the last pair.
    """

    name = "rope_golden"
    divisor = 2
    halves = True

    def __init__(self, spec: LayerSpec, *, rope_min_frequency: float = 0.2, rope_max_frequency: float = 20.0) -> None:
        if not 0 < rope_min_frequency <= rope_max_frequency:
            raise ValueError(
                f"rope_min_frequency={rope_min_frequency}, rope_max_frequency={rope_max_frequency}: "
                "they must be greater than 0, the first no greater than the second"
            )
        super().__init__(spec)
        self.rope_min_frequency, self.rope_max_frequency = rope_min_frequency, rope_max_frequency
        # Neither parameter nor buffer, so that no cast rounds them.
        ends = rope_min_frequency, rope_max_frequency
        self.frequencies = golden_frequencies(self.num_heads, self.head_dim // 2, *ends)

    def angles(self, places: Places) -> Tensor:
        u, v = (axis[..., None, :, None] for axis in centred(places, places.grid))
        of_row, of_column = self.frequencies.to(u.device)[:, None].unbind(-1)
        return v * of_row + u * of_column


class RopeMixed(Rotary):
    """RoPE-ViT's mixed form: each pair of each head has a trained frequency in the plane, of its own in every layer.

    Heo et al. 2024, https://arxiv.org/abs/2403.13298, Sec. 3.2: the angle at column x and row y is x f_x + y f_y. At
    init the two frequencies of each magnitude theta^(-4i / d) stand at right angles to each other, turned at random per
    head.

    Args:
        rope_theta: the base of the initial frequencies.
    """

    name = "rope_mixed"

    def __init__(self, spec: LayerSpec, *, rope_theta: float = 10.0) -> None:
        super().__init__(spec)
        self.rope_theta = check_theta(rope_theta)
        # of x and y, in radians per patch
        self.frequencies = nn.Parameter(torch.empty(2, spec.num_heads, spec.head_dim // 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        magnitude = axial_frequencies(self.head_dim, self.rope_theta).to(self.frequencies)
        direction = torch.rand(self.num_heads, 1).to(self.frequencies) * 2 * math.pi
        x, y = magnitude * direction.cos(), magnitude * direction.sin()
        self.frequencies.copy_(torch.stack([torch.cat([x, -y], dim=-1), torch.cat([y, x], dim=-1)]))

    @torch.no_grad()
    def nearest_start(self) -> Tensor:
        """Of all that :meth:`reset_parameters` may draw, what is nearest to the frequencies: (2, h, pairs)."""
        magnitude = axial_frequencies(self.head_dim, self.rope_theta).to(self.frequencies)
        unturned = torch.cat([magnitude, magnitude * 1j])
        frequencies = torch.complex(*self.frequencies)
        start = unturned * torch.exp(1j * (frequencies * unturned.conj()).sum(dim=-1, keepdim=True).angle())
        return torch.stack([start.real, start.imag])

    def no_weight_decay(self) -> set[str]:
        return {"frequencies"}

    def angles(self, places: Places) -> Tensor:
        frequencies = self.frequencies.to(torch.promote_types(self.frequencies.dtype, torch.float32))
        x, y = (axis[..., None, :, None] for axis in places.coordinates(frequencies.dtype))
        return x * frequencies[0, :, None] + y * frequencies[1, :, None]


PLASTIC = 1.324717957244746
"""The root of phi^3 = phi + 1: the golden ratio of the plane."""


def golden_frequencies(num_heads: int, pairs: int, least: float, most: float) -> Tensor:
    """Frequencies in the plane, (h, pairs, 2), of rows and of columns, in float64, on the CPU."""
    normal = NormalDist()
    sequence = [
        [normal.inv_cdf(number / PLASTIC**axis % 1) for axis in (1, 2)] for number in range(1, num_heads * pairs + 1)
    ]
    directions = F.normalize(torch.tensor(sequence, dtype=torch.float64, device="cpu"), dim=-1)
    steps = torch.arange(pairs, dtype=torch.float64, device="cpu") / max(pairs - 1, 1)
    return least * (most / least) ** steps[:, None] * directions.unflatten(0, (num_heads, pairs))


def centred(places: Places, sides: Grid) -> tuple[Tensor, Tensor]:
    """Columns and rows, from -1 at the outer edge of the first cell to 1 at that of the last, for sides (H, W)."""
    height, width = sides
    x, y = places.coordinates()
    return 2 * (x + 0.5) / width - 1, 2 * (y + 0.5) / height - 1


def axial_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-4i / d) for i = 0 .. d/4 - 1, in float64, radians per patch."""
    return theta ** (-torch.arange(0, head_dim, 4, dtype=torch.float64)[: head_dim // 4] / head_dim)


def check_theta(rope_theta: float) -> float:
    """``rope_theta`` if it is a base, else ValueError."""
    if not rope_theta > 1:
        raise ValueError(f"rope_theta={rope_theta}: the base of the frequencies must be greater than 1")
    return rope_theta
