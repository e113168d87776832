"""Panels and bands of the sheets: matrices, maps, mosaics of heads, and points in the plane.

Shapes: grid (H, W) of patches, V values side by side (heads or tables), L layers.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lape_vit.analysis.positions import PositionView, token_map
from lape_vit.analysis.views import mean_by_offset
from lape_vit.drawing.sheet import Band, Colours, Panel, spread
from lape_vit.places import Grid

SIGNED = "coolwarm"
"""Perceptually uniform and diverging: grey is 0."""
TICK_LABELS = 5
"""Most tick labels along the longer side of a panel."""

TILE_GAP = 0.05
"""Between the tiles of a mosaic, as a share of a tile."""

Token = tuple[int, int]


def colours_of(view: PositionView) -> Colours:
    """The scale of all layers of a view; its bounds are never cut off."""
    return Colours(SIGNED, view.limits)


def varies_by_patch(view: PositionView, grid: Grid) -> bool:
    """Whether a quantity between patches is more than a function of their offset, so that one patch's map is news."""
    if view.by_offset or view.rows:
        return False
    rounding = 1e-5 * view.limits[1]  # averages differ in the last bits from what they average
    return any((values - spread_offsets(values, grid)).abs().max() > rounding for values in view.values)


def spread_offsets(values: Tensor, grid: Grid) -> Tensor:
    """(V, H*W, H*W) with the mean over its offset in each place."""
    height, width = grid
    means = mean_by_offset(values, grid)
    rows = [
        means[:, height - 1 - y : 2 * height - 1 - y, width - 1 - x : 2 * width - 1 - x].flatten(1)
        for y in range(height)
        for x in range(width)
    ]
    return torch.stack(rows, dim=1)


# ---- drawing into axes


def mosaic_shape(count: int) -> tuple[int, int]:
    """Rows and columns of tiles, as near to a square as can be."""
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def mosaic_ratio(values: Tensor) -> float:
    """Height to width of the mosaic of (V, R, C), gaps included."""
    rows, columns = (side + TILE_GAP * (side - 1) for side in mosaic_shape(len(values)))
    return rows * values.shape[1] / (columns * values.shape[2])


def show(axes: Axes, values: Tensor, colours: Colours, mark: Token | None = None) -> None:
    """A matrix (R, C) in colours; a dot at the place of ``mark``."""
    axes.imshow(values.numpy(), aspect="auto", **colours.scale)
    if mark is not None:
        draw_mark(axes, mark[1], mark[0], 5)


def show_mosaic(axes: Axes, values: Tensor, colours: Colours, mark: Token | None = None) -> None:
    """(V, R, C) as tiles, row by row; a dot at the place of ``mark`` in each."""
    _, height, width = values.shape
    rows, columns = mosaic_shape(len(values))
    for number, tile in enumerate(values):
        row, column = divmod(number, columns)
        top, left = row * height * (1 + TILE_GAP), column * width * (1 + TILE_GAP)
        axes.imshow(
            tile.numpy(), extent=(left, left + width, top + height, top), aspect="auto", origin="upper", **colours.scale
        )
        axes.add_patch(Rectangle((left, top), width, height, fill=False, linewidth=0.5, clip_on=False))
        if mark is not None:
            draw_mark(axes, left + mark[1] + 0.5, top + mark[0] + 0.5, 6 / (1 + columns))
    right, bottom = (count * (1 + TILE_GAP) - TILE_GAP for count in (columns, rows))
    axes.set(xlim=(0, right * width), ylim=(bottom * height, 0))
    axes.spines[:].set_visible(False)


def draw_mark(axes: Axes, x: float, y: float, points: float) -> None:
    style: dict[str, Any] = {
        "markerfacecolor": "white",
        "markeredgecolor": "black",
        "markeredgewidth": 0.2 + points / 6,
    }
    axes.plot(x, y, marker="o", markersize=points, **style)


def show_matrix(axes: Axes, values: Tensor, colours: Colours, grid: Grid) -> None:
    """Every patch to every patch (H*W, H*W); a tick is where a row of patches begins."""
    show(axes, values, colours)
    starts = [row * grid[1] for row in spread(grid[0], TICK_LABELS)]
    axes.set(xticks=starts, yticks=starts, xlabel="key patch, row by row", ylabel="query patch, row by row")


def show_map(axes: Axes, values: Tensor, colours: Colours, grid: Grid, mark: Token) -> None:
    """Every patch at its place (H, W)."""
    show(axes, values, colours, mark)
    rows, columns = ticks(grid)
    axes.set(xticks=list(columns), yticks=list(rows), xlabel="column", ylabel="row")


def show_offsets(axes: Axes, values: Tensor, colours: Colours) -> None:
    """Every offset of the key from the query (2H-1, 2W-1)."""
    show(axes, values, colours)
    grid = [(side + 1) // 2 for side in values.shape]
    (rows, row_names), (columns, column_names) = (offset_ticks(side, max(grid)) for side in grid)
    axes.set_xticks(columns, column_names)
    axes.set_yticks(rows, row_names)
    axes.set(xlabel="columns to the key", ylabel="rows to the key")


def offset_ticks(side: int, longer_side: int) -> tuple[list[int], list[str]]:
    """Places and names of ticks at 0 and at even steps to both sides of it."""
    step = math.ceil(2 * longer_side / (TICK_LABELS + 1))
    offsets = range(-((side - 1) // step) * step, side, step)
    return [offset + side - 1 for offset in offsets], [signed(offset) for offset in offsets]


def show_rows(axes: Axes, values: Tensor, colours: Colours, names: Sequence[str]) -> None:
    """Every row of a table to every row (M, M)."""
    show(axes, values, colours)
    names = [name.replace("-", "\N{MINUS SIGN}") for name in names]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="offset in patches", ylabel="offset in patches")


def ticks(grid: Grid) -> tuple[range, range]:
    """Places of tick labels on the rows and columns, as far apart on both axes."""
    per_patch = TICK_LABELS / max(grid)
    return spread(grid[0], grid[0] * per_patch), spread(grid[1], grid[1] * per_patch)


def signed(offset: int) -> str:
    return f"{offset:+d}".replace("-", "\N{MINUS SIGN}") if offset else "0"


# ---- bands


def titles_of(view: PositionView, count: int) -> list[str]:
    """A title of each of the values side by side in one layer."""
    return list(view.panels) or ([f"head {head}" for head in range(count)] if count > 1 else [""])


def merged(layers: list[str], values: list[Tensor]) -> tuple[list[str], list[Tensor]]:
    """Titles and values of the layers; one for all where all layers are the same."""
    if len(values) == 1 or not all(torch.equal(value, values[0]) for value in values):
        return layers, values
    if not layers[0].startswith("block "):  # the path of a module of timm
        return [f"{layers[0]} to {layers[-1]}"], values[:1]
    block, _, join = layers[0].partition(",")
    return [f"{block.replace('block', 'blocks')} to {len(layers) - 1},{join}"], values[:1]


def layers_band(
    title: str, layers: list[str], values: list[Tensor], colours: Colours, mark: Token | None = None
) -> Band:
    """A panel for each layer, with its values (V, R, C) as a mosaic."""
    layers, values = merged(layers, values)
    panels = [
        Panel(layer, partial(show_mosaic, values=value, colours=colours, mark=mark))
        for layer, value in zip(layers, values, strict=True)
    ]
    return Band(title, panels, mosaic_ratio(values[0]), colours)


def view_bands(view: PositionView, grid: Grid, token: Token) -> list[Band]:
    """All layers of a view, and of the chosen patch where patches differ in more than their offset."""
    count, colours = len(view.values[0]), colours_of(view)
    tiles = "" if count == 1 else f": {', '.join(view.panels) or f'{count} heads'}, row by row"
    bands = [layers_band(view.title + tiles, view.layers, view.values, colours)]
    if varies_by_patch(view, grid):
        maps = [token_map(values, grid, token) for values in view.values]
        title = f"the same from the patch in row {token[0]}, column {token[1]} to every patch{tiles}"
        bands.append(layers_band(title, view.layers, maps, colours, mark=token))
    return bands


def layer_band(view: PositionView, layer: int, grid: Grid) -> Band:
    """One layer of a view, a panel for each of its values, with ticks."""
    values, colours = view.values[layer], colours_of(view)
    if view.rows:
        draw = partial(show_rows, names=view.rows)
    else:
        draw = partial(show_offsets) if view.by_offset else partial(show_matrix, grid=grid)
    panels = [
        Panel(title, partial(draw, values=value, colours=colours))
        for title, value in zip(titles_of(view, len(values)), values, strict=True)
    ]
    ratio = values.shape[1] / values.shape[2]
    return Band(f"{view.layers[layer]}: {view.title}", panels, ratio, colours, with_ticks=True)


def token_band(view: PositionView, layer: int, grid: Grid, token: Token) -> Band:
    """One layer of a view from the chosen patch to every patch, with ticks."""
    values, colours = token_map(view.values[layer], grid, token), colours_of(view)
    panels = [
        Panel(title, partial(show_map, values=value, colours=colours, grid=grid, mark=token))
        for title, value in zip(titles_of(view, len(values)), values, strict=True)
    ]
    title = f"{view.layers[layer]}: {view.title}, from the patch in row {token[0]}, column {token[1]}"
    return Band(title, panels, grid[0] / grid[1], colours, with_ticks=True)


def encoding_band(similarity: Tensor, grid: Grid, token: Token) -> Band:
    """The encoding itself, (T, H*W, H*W) of its tables, from the chosen patch to every patch."""
    colours = Colours(SIGNED, (-1.0, 1.0))
    titles = [f"table of block {table}" for table in range(len(similarity))] if len(similarity) > 1 else [""]
    panels = [
        Panel(title, partial(show_map, values=values, colours=colours, grid=grid, mark=token))
        for title, values in zip(titles, token_map(similarity, grid, token), strict=True)
    ]
    title = f"cosine similarity of the encoding itself, from the patch in row {token[0]}, column {token[1]}"
    return Band(title, panels, grid[0] / grid[1], colours, with_ticks=True)


def frequency_band(layers: list[str], frequencies: list[Tensor], with_ticks: bool = False) -> Band:
    """The frequencies (V, pairs, 2) of each layer as points in the plane, a colour for each head."""
    heads = len(frequencies[0])
    reach = 1.08 * max(points.abs().max().item() for points in frequencies) or 1.0
    cmap = ListedColormap(colormaps["viridis"](torch.linspace(0, 0.9, heads).numpy()))  # but for the palest
    layers, frequencies = merged(layers, frequencies)
    colours = Colours(
        cmap, (-0.5, heads - 0.5), "head", list(spread(heads, 6)), [str(head) for head in spread(heads, 6)]
    )
    panels = [
        Panel(layer, partial(show_frequencies, points=points, colours=colours, reach=reach, with_ticks=with_ticks))
        for layer, points in zip(layers, frequencies, strict=True)
    ]
    title = "frequencies in the plane (radians per patch to the right and down)"
    return Band(title, panels, 1.0, colours if heads > 1 else None, with_ticks)


def show_frequencies(axes: Axes, points: Tensor, colours: Colours, reach: float, with_ticks: bool) -> None:
    """Points (V, pairs, 2); the y axis goes down, as rows do."""
    heads = torch.arange(len(points))[:, None].expand(points.shape[:2])
    axes.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.6, zorder=0)
    x, y = points.flatten(0, 1).T.numpy()
    axes.scatter(x, y, c=heads.flatten().numpy(), s=9, linewidths=0, **colours.scale)
    axes.set(xlim=(-reach, reach), ylim=(reach, -reach))
    if with_ticks:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel="radians per patch to the right", ylabel="radians per patch down")
