"""All pictures of one checkpoint's positions: a sheet of all layers, and single pictures of each."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lape_vit.analysis.positions import (
    PositionView,
    check_token,
    cosine_similarity,
    encoding_tables,
    layer_titles,
    nearest_starts,
    plane_frequencies,
    position_views,
    untrained_table,
)
from lape_vit.analysis.timm_positions import (
    patch_grid,
    timm_encoding,
    timm_grid,
    timm_position_views,
    timm_tables,
)
from lape_vit.drawing.panels import (
    Scale,
    Token,
    encoding_band,
    frequency_band,
    layer_band,
    limits_of,
    token_band,
    varies_by_patch,
    view_bands,
)
from lape_vit.drawing.sheet import Band, Sheet, draw_sheets, fit_page, single
from lape_vit.joins import Basic
from lape_vit.places import Grid
from lape_vit.vit import VisionTransformer

ORIGINAL_NAMES = {"similarity": ("sim", "sim_overall"), "bias": ("bias", "head{head}")}
"""What the original calls a view in its files' names: of one patch, and the whole of it."""

MOST_PATCHES = 64
"""Of a grid whose matrix of every patch to every patch can be read on an overview."""


@dataclass(frozen=True)
class Positions:
    """What the pictures show of a checkpoint.

    Attributes:
        source: the checkpoint's file, as it was given.
        model: the model's name.
        grid: (H, W).
        token: (row, column) of the chosen patch.
        views: see :func:`lape_vit.analysis.positions.position_views`.
        frequencies: (V, pairs, 2) of each layer of a rotary encoding.
        encoding: the similarity of the absolute encoding itself, (T, H*W, H*W) of T tables, or None.
        places: what the grid is made of.
        starts: where trained frequencies may have started, of each layer; empty where they are not trained.
        scale: of the colours, see :func:`limits_of`.
        untrained: the similarity of a table as it is before training, (1, H*W, H*W); None where none is trained.
        config: options of the training, where the checkpoint has them.
    """

    source: str
    model: str
    pe: str
    join_type: str
    grid: Grid
    token: Token
    views: list[PositionView]
    frequencies: list[Tensor]
    encoding: Tensor | None
    places: str = "patches"
    starts: Sequence[Tensor] = ()
    scale: Scale = "quantile"
    untrained: Tensor | None = None
    config: Mapping[str, Any] | None = None

    @property
    def heading(self) -> list[str]:
        height, width = self.grid
        size = f"{height} x {width} {self.places}"
        return [self.source, f"{self.model}, pe={self.pe}, join_type={self.join_type}, {size}"]

    @property
    def encoding_limits(self) -> tuple[float, float]:
        """Of the colours of the absolute encoding itself."""
        assert self.encoding is not None
        return limits_of([self.encoding], self.scale, (-1.0, 1.0))

    @property
    def uses_token(self) -> bool:
        """Whether a picture shows the chosen patch alone."""
        return self.encoding is not None or any(varies_by_patch(view, self.grid) for view in self.views)

    @property
    def layers(self) -> list[str]:
        """A title of each layer."""
        return layer_titles(len(self.frequencies), self.join_type)


@torch.no_grad()
def measure(model: Any, source: str, name: str, token: Token | None = None, scale: Scale = "quantile") -> Positions:
    """What there is to see of a model, ours or timm's; the chosen patch is, unless told, the one in the centre.

    Raises:
        ValueError: a token outside the grid, weights that are NaN or infinite, a model whose positions cannot be seen.
    """
    ours = isinstance(model, VisionTransformer)
    height, width = grid = model.patch_embed.grid_size if ours else timm_grid(model)
    token = token or (height // 2, width // 2)
    check_token(token, grid)
    views = position_views(model) if ours else timm_position_views(model)
    tables = encoding_tables(model) if ours else timm_tables(model)
    before = untrained_table(model) if ours else None
    return Positions(
        source,
        name,
        model.pe if ours else timm_encoding(model),
        model.join_type if ours else Basic.name,
        grid,
        token,
        views=[replace(view, limits=limits_of(view.values, scale, view.limits, view.by_offset)) for view in views],
        frequencies=plane_frequencies(model) if ours else [],
        encoding=torch.stack([cosine_similarity(table) for table in tables]) if tables is not None else None,
        places="patches" if patch_grid(model) else "places of a window",
        starts=nearest_starts(model) if ours else (),
        scale=scale,
        untrained=cosine_similarity(before)[None] if before is not None else None,
    )


@dataclass(frozen=True)
class Choice:
    """Which part of a model's positions is drawn.

    Attributes:
        layers: numbers of blocks; None for all.
        heads: numbers of heads, ``all`` or ``mean``; None for all where they fit a page, else their mean.
        full: whether overviews have matrices of every patch to every patch, however many there are.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | Literal["all", "mean"] | None = None
    full: bool = False

    def has(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def has_head(self, head: int) -> bool:
        return not isinstance(self.heads, tuple) or head in self.heads


EVERYTHING = Choice()


def check_choice(positions: Positions, choice: Choice) -> None:
    """Refuse blocks and heads that the model does not have.

    Raises:
        ValueError
    """
    if not positions.views:
        return
    blocks = [view.first + len(view.layers) for view in positions.views] + [len(positions.frequencies)]
    heads = [len(view.values[0]) for view in positions.views if not view.panels]
    for flag, what, asked, count in (
        ("--layers", "layers", choice.layers, max(blocks)),
        ("--heads", "heads", choice.heads if isinstance(choice.heads, tuple) else None, max(heads, default=1)),
    ):
        if beyond := [number for number in asked or () if number >= count]:
            known = f"{what} 0 to {count - 1}" if count > 1 else f"one to show, for all are alike: {what} 0"
            raise ValueError(f"{flag} {beyond[0]}: {positions.source} has {known}")


def select(view: PositionView, choice: Choice) -> PositionView | None:
    """The chosen layers and heads of a view; None where it has none of them."""
    layers = [layer for layer in range(len(view.layers)) if choice.has(view.first + layer)]
    if not layers:
        return None
    values, panels = [view.values[layer] for layer in layers], view.panels
    count, title = len(values[0]), view.title
    if count > 1 and not panels and choice.heads == "mean":
        values, title = [value.mean(dim=0, keepdim=True) for value in values], f"{title}, mean over {count} heads"
    elif count > 1 and not panels and isinstance(choice.heads, tuple):
        heads = [head for head in choice.heads if head < count]
        values, panels = [value[heads] for value in values], tuple(f"head {head}" for head in heads)
        title = title if len(heads) > 1 else f"{title}, {panels[0]}"
    return replace(view, values=values, layers=[view.layers[layer] for layer in layers], panels=panels, title=title)


def bands(positions: Positions, choice: Choice) -> list[Band]:
    """All that an overview shows, in the order in which a layer uses it."""
    names = {view.name for view in positions.views}
    patches = positions.grid[0] * positions.grid[1]
    found = []
    for view in positions.views:
        if (chosen := select(view, choice)) is not None:
            by_offset_too = f"{view.name}_offsets" in names
            with_matrix = choice.full or (patches <= MOST_PATCHES and not by_offset_too)
            if with_matrix or not by_offset_too or varies_by_patch(view, positions.grid):
                untrained = positions.untrained if view.name == "similarity" else None
                found += view_bands(chosen, positions.grid, positions.token, with_matrix, untrained)
    layers = [layer for layer in range(len(positions.frequencies)) if choice.has(layer)]
    if layers:
        titles, points = positions.layers, positions.frequencies
        found.append(
            frequency_band(
                [titles[layer] for layer in layers],
                [points[layer] for layer in layers],
                [positions.starts[layer] for layer in layers] if positions.starts else [],
            )
        )
    return found


def overviews(shown: Sequence[Positions], choice: Choice = EVERYTHING) -> list[list[Sheet]]:
    """A sheet of all layers for each, to be drawn below each other on as few pages as hold them."""
    tries = [replace(choice, heads="all"), replace(choice, heads="mean")] if choice.heads is None else [choice]
    for count in dict.fromkeys(math.ceil(len(shown) / pages) for pages in range(1, len(shown) + 1)):
        for attempt in tries:
            contents = [(positions.heading, bands(positions, attempt)) for positions in shown]
            pages = [fit_page(contents[first : first + count]) for first in range(0, len(shown), count)]
            if all(fits for _, fits in pages):
                break
        else:
            continue
        break
    return [sheets for sheets, _ in pages]


def overview(positions: Positions, choice: Choice = EVERYTHING) -> Sheet:
    """All layers on one page."""
    ((sheet,),) = overviews([positions], choice)
    return sheet


def pictures(positions: Positions, choice: Choice = EVERYTHING) -> Iterator[tuple[str, Figure]]:
    """Each picture with its file's name less the ending: the overview, then the single ones."""
    yield "overview", draw_sheets([overview(positions, choice)])
    for name, band in single_bands(positions, choice):
        yield name, draw_sheets([single(positions.heading, band)])


def single_bands(positions: Positions, choice: Choice = EVERYTHING) -> Iterator[tuple[str, Band]]:
    """Each single picture with its name: the original's where it has one, and others of the same form."""
    grid, token = positions.grid, positions.token
    chosen = f"{token[0] * grid[1] + token[1]}thToken"
    if positions.encoding is not None:
        yield (
            "PE_token_sim",
            encoding_band(positions.encoding, grid, token, positions.encoding_limits, positions.untrained),
        )
    for view in positions.views:
        by_patch = varies_by_patch(view, grid)
        name, whole = ORIGINAL_NAMES.get(view.name, (view.name, view.name))
        for layer in (layer for layer in range(len(view.layers)) if choice.has(view.first + layer)):
            stem, band = f"{positions.join_type}_layer{view.first + layer}", layer_band(view, layer, grid)
            if "{head}" in whole:
                for head, panel in enumerate(band.panels):
                    if choice.has_head(head):
                        yield f"{stem}_{whole.format(head=head)}", replace(band, panels=[panel])
            else:
                yield f"{stem}_{whole}", band
            if by_patch:
                yield f"{stem}_{name}_{chosen}", token_band(view, layer, grid, token)
    for layer, (title, points) in enumerate(zip(positions.layers, positions.frequencies, strict=True)):
        if choice.has(layer):
            stem = f"{positions.join_type}_layer{layer}"
            yield (
                f"{stem}_frequencies",
                frequency_band([title], [points], list(positions.starts[layer : layer + 1]), with_ticks=True),
            )


def raw_values(positions: Positions) -> dict[str, NDArray[Any]]:
    """All numbers behind the pictures: a view's are (L, V, ...), by its name."""
    values = {view.name: torch.stack(view.values).numpy() for view in positions.views}
    if positions.encoding is not None:
        values["encoding"] = positions.encoding.numpy()
    if positions.untrained is not None:
        values["untrained"] = positions.untrained.numpy()
    if positions.frequencies:
        values["frequencies"] = torch.stack(positions.frequencies).numpy()
    return {**values, "grid": np.array(positions.grid), "token": np.array(positions.token)}
