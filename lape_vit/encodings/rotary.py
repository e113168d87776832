"""Rotations of q and k by angles that grow with a patch's place, so that q.k depends on the offset alone.

Shapes: B batch, h heads, d head width, P prefix tokens, M patches, N = P + M tokens. Channels 2i and 2i + 1 form pair
i, which turns by one angle; there are d/2 pairs. Fixed angles are computed in float64 for the places at hand.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, LayerSpec
from lape_vit.places import Places


@torch.fx.wrap
def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of channels of x (..., d), in float32 or better.

    Args:
        turns: cosine and sine of each pair's angle, (..., d/2, 2) in float32 or float64.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    turns = turns.to(pairs.dtype)
    # Compilers and readers of a traced graph know no complex numbers, and need none to be fast.
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(turns)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    (even, odd), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


@torch.fx.wrap
def in_float32_or_better(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype, or in float32 where that one is shorter."""
    return x.to(torch.promote_types(dtype, torch.float32))


class Rotary(AttentionEncoding):
    """The common part: subclasses give the angles. Prefix tokens are not turned."""

    divisor = 4

    def angles(self, places: Places) -> Tensor:
        """In radians, per patch and pair: broadcasts to (h, M, d/2), or to (B, h, M, d/2) where images differ."""
        raise NotImplementedError

    def turns(self, places: Places, dtype: torch.dtype) -> Tensor:
        """Cosine and sine of each token's angles, in float32 or better: broadcasts to (B, h, N, d/2, 2)."""
        angles = F.pad(self.angles(places), (0, 0, self.num_prefix_tokens, 0))
        return in_float32_or_better(torch.stack([angles.cos(), angles.sin()], dim=-1), dtype)

    def rotate(self, q: Tensor, k: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        turns = self.compute(self.turns, places, q)
        return turn(q, turns), turn(k, turns)


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

    def no_weight_decay(self) -> set[str]:
        return {"frequencies"}

    def angles(self, places: Places) -> Tensor:
        frequencies = self.frequencies.to(torch.promote_types(self.frequencies.dtype, torch.float32))
        x, y = (axis[..., None, :, None] for axis in places.coordinates(frequencies.dtype))
        return x * frequencies[0, :, None] + y * frequencies[1, :, None]


def axial_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-4i / d) for i = 0 .. d/4 - 1, in float64, radians per patch."""
    return theta ** (-torch.arange(0, head_dim, 4, dtype=torch.float64)[: head_dim // 4] / head_dim)


def check_theta(rope_theta: float) -> float:
    """``rope_theta`` if it is a base, else ValueError."""
    if not rope_theta > 1:
        raise ValueError(f"rope_theta={rope_theta}: the base of the frequencies must be greater than 1")
    return rope_theta
