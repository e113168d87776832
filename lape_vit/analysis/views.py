"""What an encoding in attention or of the tokens shows of itself: quantities between places, as tensors.

:func:`layer_views` shows any one in attention; an encoding with more to show registers a function of its own with it.

Shapes: H x W patches in row-major order, M = H*W, P prefix tokens, N = P + M tokens, D embedding width, h heads, d head
width, V values side by side (h heads, 1 where the heads agree, or tables).
"""

from functools import singledispatch
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_vit.encodings import AttentionEncoding, TokenEncoding
from lape_vit.encodings.offsets import offset_index
from lape_vit.encodings.relative import Relative
from lape_vit.encodings.relative_bias import RelativeBias
from lape_vit.encodings.rotary import Rotary
from lape_vit.places import Grid, Places


class LayerView(NamedTuple):
    """One quantity of one layer.

    Attributes:
        name: part of a file's name.
        title: for the eye, with the unit.
        values: (V, H*W, H*W) from query (row) to key (column) patch; with ``by_offset`` (V, 2H-1, 2W-1), the offset of
            the key from the query at [dy + H - 1, dx + W - 1]; with ``rows`` (V, M, M) between the M rows of tables.
        bounded: whether values lie in [-1, 1] by their nature.
        panels: a title of each of the V values where they are no heads.
        rows: a title of each of the M rows, where values are between rows of tables and not between patches.
    """

    name: str
    title: str
    values: Tensor
    by_offset: bool = False
    bounded: bool = False
    panels: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def cosine_similarity(rows: Tensor) -> Tensor:
    """Cosine of the angle between any two rows, in float64.

    It is exactly symmetric, exactly 1 on the diagonal and never outside [-1, 1]. A row of zeros has no direction: its
    similarity is 0 with every other row and, by the diagonal's rule, 1 with itself.

    Args:
        rows: (M, D), any floating dtype and any scale.

    Returns:
        (M, M).

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not rows.isfinite().all():
        raise ValueError("positions hold NaN or infinite values: they have no similarity")
    rows = rows.double()
    # Taken out first, since the squares of tiny or huge values leave float64's range.
    largest = rows.abs().amax(dim=1, keepdim=True)
    directions = F.normalize(rows / largest.where(largest > 0, 1), dim=1)
    similarity = directions @ directions.T
    similarity = ((similarity + similarity.T) / 2).clamp(-1, 1)
    return similarity.fill_diagonal_(1)


def mean_by_offset(values: Tensor, grid: Grid) -> Tensor:
    """(V, H*W, H*W) averaged over all pairs of patches with the same offset: (V, 2H-1, 2W-1)."""
    height, width = grid
    offsets = offset_index(grid, values.device).T.flatten()  # of the key from the query
    counts = offsets.bincount(minlength=(2 * height - 1) * (2 * width - 1))
    sums = values.new_zeros(len(values), len(counts)).index_add(1, offsets, values.flatten(1))
    return (sums / counts).unflatten(1, (2 * height - 1, 2 * width - 1))


def merge_equal_heads(values: Tensor) -> Tensor:
    """Values of all heads (h, ...); the first head's alone (1, ...) where all heads are equal."""
    return values[:1] if values.shape[0] > 1 and torch.equal(values, values[:1].expand_as(values)) else values


def pairs_and_offsets(name: str, title: str, values: Tensor, grid: Grid) -> list[LayerView]:
    """Logits (h, H*W, H*W) between patches: as a matrix, and their mean by offset."""
    values = merge_equal_heads(values)
    offsets = mean_by_offset(values, grid)
    return [
        LayerView(name, f"{title} (logits)", values),
        LayerView(f"{name}_offsets", f"mean {title} by offset (logits)", offsets, by_offset=True),
    ]


def factors(bias: Tensor, grid: Grid) -> list[LayerView]:
    """A bias (h, H*W, H*W) that is -inf for some pairs, as the factors exp(bias), since -inf has no colour."""
    values = merge_equal_heads(bias.exp())
    offsets = mean_by_offset(values, grid)
    title = "factor of attention weights, exp(bias)"
    return [
        LayerView("factor", title, values, bounded=True),
        LayerView("factor_offsets", f"mean {title} by offset", offsets, by_offset=True, bounded=True),
    ]


@singledispatch
def layer_views(encoding: AttentionEncoding, read: Tensor, q: Tensor, places: Places) -> list[LayerView]:
    """What there is to see of one layer's positions, in the order in which attention uses it.

    Args:
        encoding: of one layer.
        read: (1, N, D), what attention reads of tokens without content.
        q: (1, h, N, d), their queries, for a bias that depends on them.
        places: a whole grid.
    """
    views = []
    kernel = product_kernel(encoding, places, q)
    if kernel is not None:
        title = "mean q.k of equal q and k by offset"
        views.append(LayerView("kernel", title, kernel, by_offset=True))
    q, _ = encoding.rotate(q, q, places)
    bias = added_logits(encoding, q, read, places)
    without_query = added_logits(encoding, torch.zeros_like(q), torch.zeros_like(read), places)
    if bias is not None and without_query is not None:
        title = "bias" if torch.equal(bias, without_query) else "bias of queries without content"
        P, N = encoding.num_prefix_tokens, q.shape[2]
        patches = bias.expand(1, encoding.num_heads, N, N)[0, :, P:, P:]
        hides = bool(patches.isneginf().any())
        views += factors(patches, places.grid) if hides else pairs_and_offsets("bias", title, patches, places.grid)
    return views


@layer_views.register
def _(encoding: Relative, read: Tensor, q: Tensor, places: Places) -> list[LayerView]:
    tables = {name: getattr(encoding, name.replace(" ", "_")) for name in ("key x", "key y", "value x", "value y")}
    similarities = torch.stack([cosine_similarity(table) for table in tables.values()])
    k = encoding.max_relative_distance
    rows = ("prefix", *(f"{offset:+d}" if offset else "0" for offset in range(-k, k + 1)))
    title = "cosine similarity of table rows"
    table = LayerView("table", title, similarities, bounded=True, panels=tuple(tables), rows=rows)
    return [table, *layer_views.dispatch(AttentionEncoding)(encoding, read, q, places)]


@layer_views.register
def _(encoding: RelativeBias, read: Tensor, q: Tensor, places: Places) -> list[LayerView]:
    if encoding.norm is None:
        return layer_views.dispatch(AttentionEncoding)(encoding, read, q, places)
    before, after = encoding.table_bias(places, places), encoding.patch_bias(places)
    views = pairs_and_offsets("bias", "bias before the norm", before, places.grid)
    return views + pairs_and_offsets("bias_normed", "bias after the norm", after, places.grid)


def added_logits(encoding: AttentionEncoding, q: Tensor, read: Tensor, places: Places) -> Tensor | None:
    """All that an encoding adds to the logits of turned queries q (B, h, N, d), or None: broadcasts to (B, h, N, N)."""
    keys = torch.zeros_like(q)
    bias = encoding.logits_bias(q, keys, places)
    if "widen" not in encoding.overridden:
        return bias
    wide_q, wide_k, _ = encoding.widen(q, keys, keys, read, places)
    d = encoding.head_dim
    widened = wide_q[..., d:] @ wide_k[..., d:].mT * d**-0.5
    return widened if bias is None else bias + widened


def product_kernel(encoding: AttentionEncoding, places: Places, like: Tensor) -> Tensor | None:
    """The mean of q.k over random unit vectors q = k that lie as far apart as the offset says.

    The mean over all directions is the mean over an orthonormal basis, so that there is nothing to draw at random.

    Returns:
        (h, 2H-1, 2W-1), or (1, 2H-1, 2W-1) where the heads agree; None where the encoding turns nothing.
    """
    if "rotate" not in encoding.overridden:
        return None
    P, d = encoding.num_prefix_tokens, encoding.head_dim
    height, width = places.grid
    basis = torch.eye(d, dtype=like.dtype, device=like.device)
    basis = basis[:, None, None].expand(d, encoding.num_heads, P + height * width, d)
    q, k = encoding.rotate(basis, basis, places)
    products = torch.einsum("bhqd,bhkd->hqk", q[:, :, P:], k[:, :, P:]) / d
    return merge_equal_heads(mean_by_offset(products, places.grid))


def token_view(encoding: TokenEncoding, places: Places, like: Tensor) -> LayerView:
    """What an encoding of the tokens adds to a patch for each unit in all channels of one patch, by offset.

    Args:
        places: a whole grid.
        like: has the dtype and the device of the model.
    """
    height, width = places.grid
    silent = like.new_zeros(1, height * width, encoding.dim)
    of_nothing = encoding(silent, places)
    added = []
    for keys in torch.eye(height * width, dtype=like.dtype, device=like.device).split(64):  # as memory allows
        x = keys[..., None] + silent
        added.append((encoding(x, places) - of_nothing - x).square().mean(dim=-1).sqrt())
    title = "what is added to a patch per unit of another by offset (root mean square of channels)"
    return LayerView("response", title, mean_by_offset(torch.cat(added).T[None], places.grid), by_offset=True)


def plane_frequencies(encoding: AttentionEncoding, device: torch.device) -> Tensor | None:
    """How far each pair of channels turns per patch to the right and per patch down, in radians.

    Returns:
        (h, pairs, 2), or (1, pairs, 2) where the heads agree; None where nothing turns.
    """
    if not isinstance(encoding, Rotary):
        return None
    x, y = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64, device=device)
    angles = encoding.angles(Places(encoding.grid, x, y, device))
    corner, right, below = angles.reshape(-1, 3, encoding.head_dim // 2).unbind(1)
    return torch.stack([right - corner, below - corner], dim=-1)
