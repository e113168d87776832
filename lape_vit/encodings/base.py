"""The contracts that every encoding keeps.

Shapes: B batch, P prefix tokens (class, distillation, registers), H x W patches in row-major order, N = P + H*W tokens,
R rows of an absolute encoding (N, or H*W where prefix tokens have no row), T tables, D embedding width, h heads, head
width d.
"""

import inspect
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_vit.encodings.caching import Cache
from lape_vit.encodings.views import LayerView, mean_by_offset, one_where_heads_agree, pairs_and_offsets

Grid = tuple[int, int]


class Encoding(nn.Module):
    """What position information looks like.

    Options of an encoding are the keyword-only arguments of its ``__init__``; they reach it from ``timm.create_model``.
    """

    name: ClassVar[str]
    anchor: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.cache = Cache()
        # Without data: it knows the model's dtype and device, for encodings that have no parameter to ask.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options that this encoding takes, with their defaults."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {
            parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
        }

    def train(self, mode: bool = True) -> "Encoding":
        self.cache.clear()
        return super().train(mode)

    def set_grid(self, grid: Grid) -> None:
        """Rebuild for another grid. The model calls it after its trained tables were resampled."""
        self.grid = grid

    def no_weight_decay(self) -> set[str]:
        """Names of this module's own parameters that an optimiser must not decay."""
        return set()


class AbsoluteEncoding(Encoding):
    """A vector per token: w in ``forward(grid) -> (T, R, D)``.

    Args:
        dim: D.
        grid: (H, W) that the model is built for.
        prefix_rows: how many prefix tokens have a row of their own; they come first.
    """

    learned: ClassVar[bool] = False
    """True where w is a trained table. The model keeps it, under timm's own name ``pos_embed``, and hands it in."""

    def __init__(self, dim: int, grid: Grid, prefix_rows: int) -> None:
        super().__init__(grid)
        self.dim = dim
        self.prefix_rows = prefix_rows

    def forward(self, grid: Grid, pos_embed: Tensor | None = None) -> Tensor:
        """w for a grid of any size, in the model's dtype and on its device.

        Args:
            grid: (H, W) of the input at hand.
            pos_embed: the model's trained tables (T, R, D) for ``self.grid``; None where ``learned`` is False.
        """
        raise NotImplementedError


class NoEncoding(Encoding):
    """No position information at all: without it a transformer sees a bag of patches."""

    name = "none"


class AttentionEncoding(Encoding):
    """Position inside attention; one module per layer. Every hook defaults to doing nothing.

    Args:
        head_dim: d.
        num_heads: h.
        grid: (H, W) that the model is built for.
        num_prefix_tokens: P.
    """

    widens: ClassVar[bool] = False
    """True where :meth:`widen` and :meth:`narrow` are defined: attention then uses them in place of :meth:`bias`."""
    takes_norm: ClassVar[bool] = False
    """True where a join may normalise the bias: :meth:`add_norm` is defined."""

    def __init__(self, head_dim: int, num_heads: int, grid: Grid, num_prefix_tokens: int) -> None:
        super().__init__(grid)
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens

    def add_norm(self) -> None:
        """Normalise the bias before it is added, from now on."""
        raise NotImplementedError

    def rotate(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """q and k (B, h, N, d) turned by their positions."""
        return q, k

    def bias(self, q: Tensor, grid: Grid) -> Tensor | None:
        """A term of the logits that broadcasts to (B, h, N, N), or None; q (B, h, N, d) is not yet scaled by d^-1/2."""
        return None

    def widen(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, h, N, d) with more channels E, alike: (B, h, N, d + E).

        The product of the new channels of q and k is the term of the logits, not yet scaled by d^-1/2. What attention
        gathers from those of v is for :meth:`narrow`. So no term is ever held for each pair of tokens, and fused
        kernels can be used.
        """
        return q, k, v

    def narrow(self, x: Tensor, grid: Grid) -> Tensor:
        """What attention gathers from wide values (B, h, N, d + E), to (B, h, N, d)."""
        return x

    def views(self, queries: Tensor, grid: Grid) -> list[LayerView]:
        """What there is to see of this layer's positions, in the order in which attention uses it.

        Args:
            queries: (1, h, N, d) of tokens without content, for a bias that depends on them.
            grid: (H, W).
        """
        views = []
        kernel = self.kernel(grid)
        if kernel is not None:
            title = "mean q.k of equal q and k by offset"
            views.append(LayerView("kernel", title, kernel, by_offset=True))
        q, _ = self.rotate(queries, queries, grid)
        bias, without_query = self.bias(q, grid), self.bias(torch.zeros_like(q), grid)
        if bias is not None and without_query is not None:
            title = "bias" if torch.equal(bias, without_query) else "bias of queries without content"
            P, N = self.num_prefix_tokens, queries.shape[2]
            patches = bias.expand(1, self.num_heads, N, N)[0, :, P:, P:]
            views += pairs_and_offsets("bias", title, patches, grid)
        return views

    def kernel(self, grid: Grid) -> Tensor | None:
        """The mean of q.k over random unit vectors q = k that lie as far apart as the offset says.

        The mean over all directions is the mean over an orthonormal basis, so that there is nothing to draw at random.

        Returns:
            (h, 2H-1, 2W-1), or (1, 2H-1, 2W-1) where the heads agree; None where ``rotate`` does nothing.
        """
        P, d = self.num_prefix_tokens, self.head_dim
        basis = torch.eye(d, dtype=self.anchor.dtype, device=self.anchor.device)
        basis = basis[:, None, None].expand(d, self.num_heads, P + grid[0] * grid[1], d)
        q, k = self.rotate(basis, basis, grid)
        if q is basis and k is basis:
            return None
        products = torch.einsum("bhqd,bhkd->hqk", q[:, :, P:], k[:, :, P:]) / d
        return one_where_heads_agree(mean_by_offset(products, grid))

    def plane_frequencies(self) -> Tensor | None:
        """How far each pair of channels turns per patch to the right and per patch down, in radians.

        Returns:
            (h, pairs, 2), or (1, pairs, 2) where the heads agree; None where nothing turns.
        """
        return None


def resize_grid(rows: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resample rows that stand for the cells of a grid: bicubic with antialiasing, by size, in float32.

    Args:
        rows: (T, H*W, C), row-major over ``old``.

    Returns:
        (T, H'*W', C), row-major over ``new``, in the dtype of ``rows``; ``rows`` itself where the grids agree.
    """
    if old == new:
        return rows
    maps = rows.float().transpose(1, 2).reshape(rows.shape[0], rows.shape[2], old[0], old[1])
    maps = F.interpolate(maps, size=[new[0], new[1]], mode="bicubic", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(rows.dtype)
