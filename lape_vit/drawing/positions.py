"""All pictures of one checkpoint's positions: a sheet of all layers, and single pictures of each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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
    plane_frequencies,
    position_views,
)
from lape_vit.analysis.timm_positions import (
    patch_grid,
    timm_encoding,
    timm_grid,
    timm_position_views,
    timm_tables,
)
from lape_vit.drawing.panels import (
    Token,
    encoding_band,
    frequency_band,
    layer_band,
    token_band,
    varies_by_patch,
    view_bands,
)
from lape_vit.drawing.sheet import Band, Sheet, draw_sheets, single
from lape_vit.joins import Basic
from lape_vit.places import Grid
from lape_vit.vit import VisionTransformer

ORIGINAL_NAMES = {"similarity": ("sim", "sim_overall"), "bias": ("bias", "head{head}")}
"""What the original calls a view in its files' names: of one patch, and the whole of it."""


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

    @property
    def heading(self) -> list[str]:
        height, width = self.grid
        size = f"{height} x {width} {self.places}"
        return [self.source, f"{self.model}, pe={self.pe}, join_type={self.join_type}, {size}"]

    @property
    def uses_token(self) -> bool:
        """Whether a picture shows the chosen patch alone."""
        return self.encoding is not None or any(varies_by_patch(view, self.grid) for view in self.views)

    @property
    def layers(self) -> list[str]:
        """A title of each layer."""
        return layer_titles(len(self.frequencies), self.join_type)


@torch.no_grad()
def measure(model: Any, source: str, name: str, token: Token | None = None) -> Positions:
    """What there is to see of a model, ours or timm's; the chosen patch is, unless told, the one in the centre.

    Raises:
        ValueError: a token outside the grid, weights that are NaN or infinite, a model whose positions cannot be seen.
    """
    ours = isinstance(model, VisionTransformer)
    height, width = grid = model.patch_embed.grid_size if ours else timm_grid(model)
    token = token or (height // 2, width // 2)
    check_token(token, grid)
    tables = encoding_tables(model) if ours else timm_tables(model)
    return Positions(
        source,
        name,
        model.pe if ours else timm_encoding(model),
        model.join_type if ours else Basic.name,
        grid,
        token,
        views=position_views(model) if ours else timm_position_views(model),
        frequencies=plane_frequencies(model) if ours else [],
        encoding=torch.stack([cosine_similarity(table) for table in tables]) if tables is not None else None,
        places="patches" if patch_grid(model) else "places of a window",
    )


def bands(positions: Positions) -> list[Band]:
    """All that the overview shows, in the order in which a layer uses it."""
    found = [band for view in positions.views for band in view_bands(view, positions.grid, positions.token)]
    if positions.frequencies:
        found.append(frequency_band(positions.layers, positions.frequencies))
    return found


def overview(positions: Positions) -> Sheet:
    """All layers on one page."""
    return Sheet(positions.heading, bands(positions))


def pictures(positions: Positions) -> Iterator[tuple[str, Figure]]:
    """Each picture with its file's name less the ending: the overview, then the single ones."""
    yield "overview", draw_sheets([overview(positions)])
    for name, band in single_bands(positions):
        yield name, draw_sheets([single(positions.heading, band)])


def single_bands(positions: Positions) -> Iterator[tuple[str, Band]]:
    """Each single picture with its name: the original's where it has one, and others of the same form."""
    grid, token = positions.grid, positions.token
    chosen = f"{token[0] * grid[1] + token[1]}thToken"
    if positions.encoding is not None:
        yield "PE_token_sim", encoding_band(positions.encoding, grid, token)
    for view in positions.views:
        by_patch = varies_by_patch(view, grid)
        name, whole = ORIGINAL_NAMES.get(view.name, (view.name, view.name))
        for layer in range(len(view.layers)):
            stem, band = f"{positions.join_type}_layer{view.first + layer}", layer_band(view, layer, grid)
            if "{head}" in whole:
                for head, panel in enumerate(band.panels):
                    yield f"{stem}_{whole.format(head=head)}", replace(band, panels=[panel])
            else:
                yield f"{stem}_{whole}", band
            if by_patch:
                yield f"{stem}_{name}_{chosen}", token_band(view, layer, grid, token)
    for layer, (title, points) in enumerate(zip(positions.layers, positions.frequencies, strict=True)):
        stem = f"{positions.join_type}_layer{layer}"
        yield f"{stem}_frequencies", frequency_band([title], [points], with_ticks=True)


def raw_values(positions: Positions) -> dict[str, NDArray[Any]]:
    """All numbers behind the pictures: a view's are (L, V, ...), by its name."""
    values = {view.name: torch.stack(view.values).numpy() for view in positions.views}
    if positions.encoding is not None:
        values["encoding"] = positions.encoding.numpy()
    if positions.frequencies:
        values["frequencies"] = torch.stack(positions.frequencies).numpy()
    return {**values, "grid": np.array(positions.grid), "token": np.array(positions.token)}
