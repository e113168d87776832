"""Parabolas over the offset between two patches, which the query's token shapes.

Shapes: B batch, h heads, d head width, D width, P prefix tokens, M patches, N = P + M tokens, m parabolas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, LayerSpec
from lape_vit.encodings.rotary import in_float32_or_better
from lape_vit.places import Places


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a sum of two parts: its first 8 bits, exact in bfloat16, and the rest, through which the gradient flows."""
    # Not by a cast to bfloat16 and back, which torch.compile leaves out.
    constant = x.detach()
    unit = 2.0 ** (constant.abs().clamp(min=1e-30).log2().floor() - 7)
    first = (constant / unit).round() * unit
    return first, x - first


class Parabolic(AttentionEncoding):
    """d^-1/2 times the sum over m of -a_m(x_i) (D . u_m)^2 + b_m(x_i) D . u_m, for query i and the offset D to its key.

    PaPE (Ohrstrom et al. 2026, https://arxiv.org/abs/2602.01418). x_i is what attention reads of the query's token;
    a = softplus(W_a x_i), b = W_b x_i. W_a, W_b and the directions u_m of each head are trained, without bias, of each
    layer's own. They start as the authors' linear maps do, uniform within +-1/sqrt(inputs).

    D is key less query. The published code has query less key in its linear part, so that its W_b is the negative of
    ours. It gives the class token the place (0, 0) and counts patches from 1, so that the class token takes part; here
    pairs with a prefix token have no term. Its default is 50 parabolas, an eighth of a DeiT's parameters. For each
    query all parabolas of a head add up to a quadratic form of three numbers and a slope of two, so that ours is 8.

    The term is a sum over six products of a number of the query and one of the key, x^2, xy, y^2, x, y and 1, whatever
    m: no tensor over pairs is built. The products are large where the term is small. So places count from their
    mean, and each factor is split into a part of 8 bits and a rest: attention in 16 bits is then more exact than with a
    bias rounded to 16 bits. With six plain products it would be off by more than half a logit.

    Args:
        pape_parabolas: m, of each head.
    """

    name = "pape"

    def __init__(self, spec: LayerSpec, *, pape_parabolas: int = 8) -> None:
        if pape_parabolas < 1:
            raise ValueError(f"pape_parabolas={pape_parabolas}: it must be at least 1")
        super().__init__(spec)
        self.pape_parabolas = pape_parabolas
        self.directions = nn.Parameter(torch.empty(spec.num_heads, pape_parabolas, 2))  # x before y
        self.curvature_and_slope = nn.Linear(spec.dim, 2 * spec.num_heads * pape_parabolas, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.directions, -(2**-0.5), 2**-0.5)
        self.curvature_and_slope.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """The directions: decay would flatten all parabolas alike, whatever tokens say."""
        return {"directions"}

    def monomials(self, places: Places, dtype: torch.dtype) -> Tensor:
        """x^2, xy, y^2, x, y and 1 of each patch, counted from their mean; zeros of prefix tokens; float32 or better.

        (1, N, 6), or (B, 1, N, 6) where images differ.
        """
        x, y = (axis - axis.mean(dim=-1, keepdim=True) for axis in places.coordinates())
        of_patches = torch.stack([x**2, x * y, y**2, x, y, torch.ones_like(x)], dim=-1)
        return in_float32_or_better(F.pad(of_patches, (0, 0, self.num_prefix_tokens, 0)).unsqueeze(-3), dtype)

    def coefficients(self, read: Tensor, monomials: Tensor) -> Tensor:
        """What each query multiplies the key's monomials by, (B, h, N, 6)."""
        a, b = self.curvature_and_slope(read).unflatten(-1, (2, self.num_heads, -1)).transpose(1, 3).unbind(2)
        x, y = self.directions.unbind(-1)
        # Rounded at most here, before they are multiplied by places: a rounded parabola is a parabola still.
        form = F.softplus(a) @ torch.stack([x**2, 2 * x * y, y**2], dim=-1).to(a.dtype)
        slope = b @ self.directions.to(b.dtype)
        xx, xy, yy = in_float32_or_better(form, form.dtype).unbind(-1)
        along_x, along_y = in_float32_or_better(slope, slope.dtype).unbind(-1)
        of_xx, of_xy, of_yy, of_x, of_y, one = monomials.unbind(-1)
        constant = -(xx * of_xx + xy * of_xy + yy * of_yy + along_x * of_x + along_y * of_y)
        linear_x = 2 * xx * of_x + xy * of_y + along_x * one
        linear_y = 2 * yy * of_y + xy * of_x + along_y * one
        return torch.stack([-xx * one, -xy * one, -yy * one, linear_x, linear_y, constant], dim=-1)

    def widen(self, q: Tensor, k: Tensor, v: Tensor, read: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        monomials = self.fixed(self.monomials, places, q)
        first, rest = split(self.coefficients(read, monomials))
        of_query = torch.cat([first, rest, first, rest], dim=-1).to(q.dtype)
        first, rest = split(monomials)
        of_key = torch.cat([first, first, rest, rest], dim=-1).to(k.dtype)
        of_key = of_key.expand(q.shape[0], q.shape[1], -1, -1)
        return torch.cat([q, of_query], dim=-1), torch.cat([k, of_key], dim=-1), F.pad(v, (0, of_key.shape[-1]))

    def narrow(self, x: Tensor, places: Places) -> Tensor:
        return x[..., : self.head_dim]
