"""What a model's layers see of positions, as tensors only: cosine similarities, biases, kernels.

Shapes: P prefix tokens, grid (H, W) of patches in row-major order, N = P + H*W tokens, D embedding width, L layers,
h heads, V values side by side (h heads, 1 where the heads agree, or tables).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lape_vit.analysis import views
from lape_vit.analysis.views import LayerView, cosine_similarity, mean_by_offset
from lape_vit.attention import Attention, Block
from lape_vit.encodings.rotary import RopeMixed
from lape_vit.joins import Terms
from lape_vit.places import Grid, Places
from lape_vit.vit import VisionTransformer, VisionTransformerDistilled, draw_tables, first_weight

Model = VisionTransformer | VisionTransformerDistilled


@dataclass(frozen=True)
class PositionView:
    """One quantity between places, in every layer that has it; made of :class:`lape_vit.analysis.views.LayerView`.

    Attributes:
        name: part of a file's name, such as ``similarity``, ``bias``, ``bias_normed``, ``bias_offsets``, ``kernel``,
            ``table``; unique within a model.
        title: for the eye, with the unit.
        values: one per entry of ``layers``, (V, H*W, H*W) from query (row) to key (column) patch; with ``by_offset``
            (V, 2H-1, 2W-1), the key's offset from the query at [dy + H - 1, dx + W - 1]; with ``rows`` (V, M, M).
        limits: least and greatest value of a colour scale for all layers, symmetric about 0.
        layers: a title of each entry: the block's number and the join.
        panels: a title of each of the V values; empty where they are the heads, or one for all heads.
        rows: a title of each of M table rows between which the values are; empty where they are between patches.
        first: number of the block of the first entry.
    """

    name: str
    title: str
    values: list[Tensor]
    by_offset: bool
    limits: tuple[float, float]
    layers: list[str]
    panels: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    first: int = 0


@torch.no_grad()
def position_views(model: Model, grid: Grid | None = None) -> list[PositionView]:
    """Everything there is to see of a model's positions, in the order in which a layer uses it.

    Absolute encodings: ``similarity``, the cosine similarity of what :func:`layer_positions` gives. Encodings in
    attention: their :func:`~lape_vit.analysis.views.layer_views`. Encodings of the tokens: ``response``, in the one
    block after which they act (:func:`~lape_vit.analysis.views.token_view`). A sum has all, ``none`` has nothing.

    Args:
        grid: (H, W) patches; default: what the model is built for.

    Raises:
        ValueError: weights that are NaN or infinite.
    """
    places = whole_grid(model, grid)
    by_layer: list[list[LayerView]] = [[] for _ in model.blocks]
    if model.join.encoding is not None:
        for found, positions in zip(by_layer, layer_positions(model, grid), strict=True):
            similarity = cosine_similarity(positions)[None]
            found.append(LayerView("similarity", "cosine similarity of positions", similarity, bounded=True))
    for found, read, attn in zip(by_layer, content_free_tokens(model, places), attentions(model), strict=True):
        if attn.encoding is not None:
            found.extend(views.layer_views(attn.encoding, read, attn.project(read)[0], places))
    layers = layer_titles(len(by_layer), model.join_type)
    found_views = [over_layers(found, layers) for found in zip(*by_layer, strict=True)]
    if (of_tokens := model.token_encoding) is not None:
        response = views.token_view(of_tokens, places, model.patch_embed.proj.weight)
        found_views.append(replace(over_layers([response], [layers[of_tokens.after]]), first=of_tokens.after))
    return found_views


def whole_grid(model: Model, grid: Grid | None = None) -> Places:
    """The places of a whole grid (H, W), by default that of the model, on its device."""
    return Places(grid or model.patch_embed.grid_size, device=first_weight(model).device)


def layer_titles(count: int, join_type: str) -> list[str]:
    """A title of each layer."""
    return [f"block {layer}, {join_type}" for layer in range(count)]


def over_layers(views: Sequence[LayerView], layers: list[str]) -> PositionView:
    """The same quantity of every layer on one scale."""
    for layer, view in zip(layers, views, strict=True):
        if not view.values.isfinite().all():
            raise ValueError(f"{layer}: the {view.title} holds NaN or infinite values")
    first, most = views[0], max(len(view.values) for view in views)  # heads may agree in some layers only
    values = [view.values.expand(most, -1, -1) for view in views]
    largest = 1.0 if first.bounded else max(value.abs().max().item() for value in values)
    limits = (-largest, largest) if largest else (-1.0, 1.0)
    return PositionView(
        first.name, first.title, values, first.by_offset, limits, layers, panels=first.panels, rows=first.rows
    )


@torch.no_grad()
def plane_frequencies(model: Model) -> list[Tensor]:
    """Of rotary encodings, how far each pair of channels turns per patch to the right and down, in radians.

    Returns:
        (V, pairs, 2) per block; empty where nothing turns.
    """
    device = first_weight(model).device
    found = [views.plane_frequencies(attn.encoding, device) for attn in attentions(model) if attn.encoding is not None]
    return [frequencies for frequencies in found if frequencies is not None]


@torch.no_grad()
def nearest_starts(model: Model) -> list[Tensor]:
    """Where the frequencies of `rope_mixed` may have started, as near to where they are as can be.

    Returns:
        (h, pairs, 2) per block; empty for other encodings.
    """
    encodings = [attn.encoding for attn in attentions(model)]
    return [one.nearest_start().permute(1, 2, 0).double() for one in encodings if isinstance(one, RopeMixed)]


def mean_by_distance(view: PositionView, grid: Grid) -> tuple[list[int], Tensor]:
    """How a quantity between patches falls or rises with their distance: what is local in it.

    Args:
        view: of patches or by offset.
        grid: (H, W) of the patches; a view by offset has its own.

    Returns:
        Distances, in patches, rounded; and the mean over all pairs of different patches that lie so far apart, and over
        heads, in float64: (L, distances).
    """
    if view.by_offset:
        _, rows, columns = view.values[0].shape
        grid = ((rows + 1) // 2, (columns + 1) // 2)
    height, width = grid
    dy, dx = (torch.arange(1 - side, side)[:, None].abs() for side in grid)
    dx = dx.T
    pairs = ((height - dy) * (width - dx)).flatten().double()
    bins = (dy**2 + dx**2).double().sqrt().round().long().flatten()
    pairs[bins == 0] = 0
    means = []
    for values in view.values:
        offsets = values if view.by_offset else mean_by_offset(values, grid)
        sums = bins.bincount(offsets.double().mean(dim=0).flatten() * pairs)
        means.append(sums / bins.bincount(pairs))
    distances = sorted(set(bins.tolist()) - {0})
    return distances, torch.stack(means)[:, distances]


def layer_correlations(view: PositionView) -> Tensor:
    """Pearson's correlation of a quantity between successive layers, over all heads and pairs of different places.

    Returns:
        (L - 1,), in float64; NaN where a layer is constant. The nearer to 1, the less the layers adapt.
    """
    _, rows, columns = view.values[0].shape
    same = torch.zeros(rows, columns, dtype=torch.bool)
    if view.by_offset:
        same[rows // 2, columns // 2] = True
    else:
        same.fill_diagonal_(True)
    layers = torch.stack([values[:, ~same].flatten() for values in view.values]).double()
    layers = layers - layers.mean(dim=1, keepdim=True)
    lengths = layers.norm(dim=1)
    return (layers[:-1] * layers[1:]).sum(dim=1) / (lengths[:-1] * lengths[1:])


def attentions(model: Model) -> list[Attention]:
    """The attention of each block."""
    return [block.attn for block in cast("Iterable[Block]", model.blocks)]


def content_free_tokens(model: Model, places: Places) -> list[Tensor]:
    """What attention of each block reads of tokens that hold positions alone: (1, N, D) per block.

    Where nothing is added to the tokens, that is norm1 of the zero token: its shift.
    """
    height, width = places.grid
    tokens = torch.zeros(1, model.num_prefix_tokens + height * width, model.embed_dim)
    tokens = tokens.to(first_weight(model))
    terms = model.position_terms(places)
    if terms.input is not None:
        tokens = model.norm_pre(terms.input)
    read = []
    for layer, block in enumerate(cast("Iterable[Block]", model.blocks)):
        residual, attention = terms.of_block(layer)
        normed = block.norm1(tokens if residual is None else tokens + residual)
        read.append(normed if attention is None else normed + attention)
    return read


@torch.no_grad()
def layer_positions(model: Model, grid: Grid | None = None) -> list[Tensor]:
    """What the attention of block 0 .. L-1 reads of the patches' positions, by the model's own norms and their eps.

    Where positions are added after norm1 (LaPE), that is block l's term as it is. Where they are added before it, norm1
    is not linear, so the answer is what it makes of the positions alone: ``norm1_l(w)`` if w is added to the input,
    ``norm1_l(term_l)`` if block l adds a term of its own to the residual stream. Where a join adds in both places,
    it is the sum. What earlier blocks' terms have left in the residual stream counts as its content.

    Args:
        grid: (H, W) patches; default: what the model is built for.

    Returns:
        One (H*W, D) per block, without the prefix tokens.

    Raises:
        ValueError: the model's encoding has no absolute part.
    """
    if model.join.encoding is None:
        raise ValueError(f"pe={model.pe!r} is no absolute encoding: it has no vector per patch, so nothing to draw")
    terms = model.position_terms(whole_grid(model, grid))
    in_stream = None if terms.input is None else model.norm_pre(terms.input)
    blocks = enumerate(cast("Iterable[Block]", model.blocks))
    return [_read_of_terms(block, in_stream, terms, layer)[0, model.num_prefix_tokens :] for layer, block in blocks]


def _read_of_terms(block: Block, in_stream: Tensor | None, terms: Terms, layer: int) -> Tensor:
    residual, attention = terms.of_block(layer)
    before = [term for term in (in_stream, residual) if term is not None]
    read = [block.norm1(sum(before))] if before else []
    found = [*read, *([attention] if attention is not None else [])]
    if not found:
        raise ValueError(f"block {layer} reads no position: the join adds nothing before its attention")
    return cast("Tensor", sum(found))


@torch.no_grad()
def encoding_tables(model: Model) -> Tensor | None:
    """The absolute encoding itself, before any layer: (T, H*W, D) of its T tables; None where there is none."""
    encoding = model.join.encoding
    if encoding is None:
        return None
    places, weight = whole_grid(model), first_weight(model)
    tables = [None] if model.pos_embed is None else model.pos_embed.split(1)
    height, width = places.grid
    return torch.cat([encoding(places, weight, table)[:, -height * width :] for table in tables])


@torch.no_grad()
def untrained_table(model: Model, seed: int = 0) -> Tensor | None:
    """A table of positions as an untrained model of the same kind has it: (H*W, D); None where none is trained."""
    if model.join.encoding is None or model.pos_embed is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table = draw_tables((1, *model.pos_embed.shape[1:]), torch.empty(0))
    places = Places(model.patch_embed.grid_size)
    height, width = places.grid
    return model.join.encoding(places, table, table)[0, -height * width :]


def token_map(values: Tensor, grid: Grid, token: tuple[int, int]) -> Tensor:
    """What one patch, as the query, has with every patch, laid out as the patches are.

    Args:
        values: (..., H*W, H*W).
        grid: (H, W).
        token: (row, column) of the patch, from 0.

    Returns:
        (..., H, W).

    Raises:
        ValueError: the token lies outside the grid.
    """
    assert values.shape[-2:] == (grid[0] * grid[1], grid[0] * grid[1])
    check_token(token, grid)
    return values[..., token[0] * grid[1] + token[1], :].unflatten(-1, grid)


def check_token(token: tuple[int, int], grid: Grid) -> None:
    """Raise ValueError where a patch (row, column) lies outside the grid (H, W)."""
    (row, column), (height, width) = token, grid
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"token {row},{column} lies outside the grid of {height} x {width} patches: "
            f"rows are 0 to {height - 1}, columns 0 to {width - 1}"
        )
