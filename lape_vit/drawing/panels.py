"""Panels and bands of the sheets: matrices, maps, mosaics of heads, and points in the plane.

Shapes: grid (H, W) of patches, V values side by side (heads or tables), L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lape_vit.analysis.positions import PositionView, token_map
from lape_vit.analysis.views import mean_by_offset
from lape_vit.drawing.sheet import SIZES, Band, Colours, Panel, SharedAxes, spread, text_width
from lape_vit.places import Grid

SIGNED = "RdBu_r"
"""Diverging: white is 0. The page to explore has the same colours."""
TICK_LABELS = 5
"""Most tick labels along the longer side of a panel."""

TILE_GAP = 0.05
"""Between the tiles of a mosaic, as a share of a tile."""

STEPS = (1, 2, 5, 10, 20, 50, 100)
"""Between tick labels, in places."""
LABEL = (0.25, 0.16)
"""Room of a tick label across and down, in inches."""

QUANTILE = 0.99
"""Share of the absolute values that colours tell apart."""
WORTHWHILE = 0.8
"""Where the quantile is more than this share of the largest value, colours reach that."""

Token = tuple[int, int]
Scale = Literal["quantile", "range"] | float


def colours_of(view: PositionView) -> Colours:
    """The scale of all layers of a view."""
    return Colours(SIGNED, view.limits, cut=bool(cut_note(view.values, view.limits)))


def limits_of(
    values: Sequence[Tensor], scale: Scale, bounds: tuple[float, float], by_offset: bool = False
) -> tuple[float, float]:
    """Limits of the colours of all layers, symmetric about 0.

    Args:
        values: (V, R, C) of each layer.
        scale: ``quantile`` for what holds 99 % of the absolute values between different places, so that a few do not
            make the others pale; ``range`` for the bounds; or a limit.
        bounds: of all values.
        by_offset: whether (R, C) are offsets, as in a :class:`~lape_vit.analysis.positions.PositionView`.
    """
    different = torch.cat([value[:, ~same_place(value, by_offset)].flatten() for value in values])
    limit = limit_of(different, scale, bounds[1], max(value.abs().max().item() for value in values))
    return -limit, limit


def limit_of(values: Tensor, scale: Scale, bound: float, largest: float) -> float:
    """Where colours of values end, see :func:`limits_of`; `largest` is that of all that is drawn."""
    if not isinstance(scale, str):
        return scale
    if scale == "range" or not values.any():
        return bound
    limit = values.abs().kthvalue(math.ceil(QUANTILE * values.numel())).values.item()
    if limit == 0 or limit > WORTHWHILE * largest:
        return bound
    step = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return min(bound, math.ceil(limit / step) * step)  # two digits


def same_place(values: Tensor, by_offset: bool) -> Tensor:
    """Where (V, R, C) relates a place to itself, (R, C): the offset in the middle, or the diagonal."""
    _, rows, columns = values.shape
    if not by_offset:
        return torch.eye(rows, dtype=torch.bool)
    same = torch.zeros(rows, columns, dtype=torch.bool)
    same[rows // 2, columns // 2] = True
    return same


def cut_note(values: Sequence[Tensor], limits: tuple[float, float]) -> str:
    """Says that colours end before the values do; empty where they do not."""
    largest = max(value.abs().max().item() for value in values)
    sign = "±" if limits[0] < 0 else ""
    cut = largest > limits[1] * 1.001
    return f"colours end at {sign}{limits[1]:.2g}, the largest value is {largest:.2g}" if cut else ""


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
    """Rows and columns of tiles, as near to a square as can be without a gap."""
    rows = max(rows for rows in range(1, math.isqrt(count) + 1) if count % rows == 0)
    return rows, count // rows


def mosaic_ratio(values: Tensor, shape: tuple[int, int]) -> float:
    """Height to width of the mosaic of (V, R, C), gaps included."""
    rows, columns = (side + TILE_GAP * (side - 1) for side in shape)
    return rows * values.shape[1] / (columns * values.shape[2])


def show(axes: Axes, values: Tensor, colours: Colours, mark: Token | None = None) -> None:
    """A matrix (R, C) in colours; a dot at the place of ``mark``."""
    axes.imshow(values.numpy(), aspect="auto", **colours.scale)
    if mark is not None:
        draw_mark(axes, mark[1], mark[0], 5)


def show_mosaic(
    axes: Axes, values: Tensor, colours: Colours, shape: tuple[int, int], mark: Token | None = None
) -> None:
    """(V, R, C) as tiles, row by row; a dot at the place of ``mark`` in each."""
    _, height, width = values.shape
    rows, columns = shape
    for number, tile in enumerate(values):
        row, column = divmod(number, columns)
        top, left = row * height * (1 + TILE_GAP), column * width * (1 + TILE_GAP)
        axes.imshow(
            tile.numpy(), extent=(left, left + width, top + height, top), aspect="auto", origin="upper", **colours.scale
        )
        axes.add_patch(Rectangle((left, top), width, height, fill=False, linewidth=0.5, clip_on=False))
        if mark is not None:
            draw_mark(axes, left + mark[1] + 0.5, top + mark[0] + 0.5, min(3.0, 30 / (columns * width)))
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
    block, comma, join = layers[0].partition(",")
    return [f"{block.replace('block', 'blocks')} to {block_of(layers[-1])}{comma}{join}"], values[:1]


def block_of(title: str) -> str:
    """`3` of `block 3, LaPE`."""
    return title.partition(",")[0].removeprefix("block ")


def layers_band(title: str, layers: list[str], values: list[Tensor], colours: Colours) -> Band:
    """A panel for each layer, with its values (V, R, C) as a mosaic."""
    layers, values = merged(layers, values)
    shape = mosaic_shape(len(values[0]))
    panels = [
        Panel(layer, partial(show_mosaic, values=value, colours=colours, shape=shape))
        for layer, value in zip(layers, values, strict=True)
    ]
    return Band(title, panels, mosaic_ratio(values[0], shape), colours)


@dataclass(frozen=True)
class Axis:
    """Where the tick labels of one side of a tile may stand.

    Attributes:
        names: of every place.
        origin: the place whose label is always there.
        unit: places between neighbours that may both have a label.
    """

    names: Sequence[str]
    origin: int = 0
    unit: int = 1

    def ticks(self, inches: float, room: float) -> range:
        """Even steps from the origin, with room for each label."""
        per_unit = inches * self.unit / len(self.names)
        step = next((step for step in STEPS if step * per_unit >= room), len(self.names)) * self.unit
        return range(self.origin % step, len(self.names), step)


@dataclass(frozen=True)
class Tiles:
    """Values (V, R, C) of each layer, as tiles below each other, and what their axes are; beside them, if given, those
    of an untrained model."""

    title: str
    values: list[Tensor]
    rows: Axis
    columns: Axis
    caption: str
    names: Sequence[str] = ()
    mark: Token | None = None
    untrained: Tensor | None = None

    def band(self, layers: list[str], colours: Colours) -> Band:
        """A panel for each layer; one for all where they are alike."""
        layers, values = merged([short(layer) for layer in layers], self.values)
        if self.untrained is not None:
            layers, values = [*layers, "untrained"], [*values, self.untrained]
        shape = (len(values[0]), 1)
        panels = [
            Panel(layer, partial(show_mosaic, values=value, colours=colours, shape=shape, mark=self.mark))
            for layer, value in zip(layers, values, strict=True)
        ]
        note = cut_note(self.values, colours.limits)
        shared = SharedAxes(f"{self.caption}; {note}" if note else self.caption, self.draw_axes)
        ratios = (mosaic_ratio(values[0], shape), mosaic_ratio(values[0][:1], (1, 1)))
        return Band(self.title, panels, ratios[0], colours, shared=shared, tile_ratio=ratios[1])

    def draw_axes(self, axes: Axes, is_first: bool) -> None:
        """Ticks below the lowest tile and, of the first panel of a row, left of every tile, with the tile's name."""
        count, height, _ = self.values[0].shape
        wide, high = axes.bbox.transformed(cast("Figure", axes.get_figure(root=True)).dpi_scale_trans.inverted()).size
        columns = self.columns.ticks(wide, LABEL[0])
        axes.set_xticks([place + 0.5 for place in columns], [self.columns.names[place] for place in columns])
        axes.spines[:].set_visible(False)
        if not is_first:
            return
        rows = self.rows.ticks(high / count, LABEL[1])
        tops = [tile * height * (1 + TILE_GAP) for tile in range(count)]
        places = [(top + place + 0.5, self.rows.names[place]) for top in tops for place in rows]
        axes.set_yticks([place for place, _ in places], [name for _, name in places])
        for top, name in zip(tops, self.names, strict=False):
            axes.annotate(
                name,
                (0, top + height / 2),
                xytext=(-36, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                rotation=90 if high / count > text_width(name, "panel") else 0,
                ha="center",
                va="center",
                fontsize=SIZES["tick"],
            )


def short(layer: str) -> str:
    """`block 3` of `block 3, LaPE`: the heading of a sheet has the join."""
    return layer.partition(",")[0] if layer.startswith("block ") else layer


def view_bands(
    view: PositionView, grid: Grid, token: Token, with_matrix: bool, untrained: Tensor | None = None
) -> list[Band]:
    """All layers of a view: from patch to patch if asked, and of the chosen patch where patches differ in more than
    their offset; a view of which neither is drawn is shown by its mean over each offset.

    Args:
        untrained: the same from patch to patch in an untrained model, (V, H*W, H*W), to be shown beside the layers.
    """
    names = titles_of(view, len(view.values[0])) if len(view.values[0]) > 1 else []
    shown = []
    if view.rows:
        axis = Axis([name.replace("-", "\N{MINUS SIGN}") for name in view.rows])
        caption = "across and down: offset of the row of the table, in patches"
        shown.append(Tiles(view.title, view.values, axis, axis, caption, names))
    elif view.by_offset:
        shown.append(offset_tiles(view.title, view.values, names))
    else:
        if with_matrix:
            axis = Axis([str(patch) for patch in range(grid[0] * grid[1])], unit=grid[1])
            caption = "across: key patch, row by row; down: query patch, row by row"
            shown.append(Tiles(view.title, view.values, axis, axis, caption, names, untrained=untrained))
        if varies_by_patch(view, grid):
            maps = [token_map(values, grid, token) for values in view.values]
            title = f"{view.title}, from the patch in row {token[0]}, column {token[1]} to every patch"
            rows, columns = (Axis([str(place) for place in range(side)]) for side in grid)
            caption = "across: column of the key patch; down: its row"
            before = None if untrained is None else token_map(untrained, grid, token)
            shown.append(Tiles(title, maps, rows, columns, caption, names, token, before))
        if not shown:
            means = [mean_by_offset(values, grid) for values in view.values]
            shown.append(offset_tiles(f"{view.title}, by offset", means, names))
    return [tiles.band(view.layers, colours_of(view)) for tiles in shown]


def offset_tiles(title: str, values: list[Tensor], names: Sequence[str]) -> Tiles:
    """Values (V, 2H-1, 2W-1) by the key's offset from the query."""
    sides = [(side + 1) // 2 for side in values[0].shape[1:]]
    rows, columns = (Axis([signed(place) for place in range(1 - side, side)], side - 1) for side in sides)
    return Tiles(title, values, rows, columns, "across: columns to the key patch; down: rows to it", names)


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
    note = cut_note(view.values, view.limits)
    title = f"{view.layers[layer]}: {view.title}" + (f" ({note})" if note else "")
    return Band(title, panels, ratio, colours, with_ticks=True)


def token_band(view: PositionView, layer: int, grid: Grid, token: Token) -> Band:
    """One layer of a view from the chosen patch to every patch, with ticks."""
    values, colours = token_map(view.values[layer], grid, token), colours_of(view)
    panels = [
        Panel(title, partial(show_map, values=value, colours=colours, grid=grid, mark=token))
        for title, value in zip(titles_of(view, len(values)), values, strict=True)
    ]
    note = cut_note(view.values, view.limits)
    title = f"{view.layers[layer]}: {view.title}, from the patch in row {token[0]}, column {token[1]}"
    title += f" ({note})" if note else ""
    return Band(title, panels, grid[0] / grid[1], colours, with_ticks=True)


def encoding_band(
    similarity: Tensor, grid: Grid, token: Token, limits: tuple[float, float], untrained: Tensor | None = None
) -> Band:
    """The encoding itself, (T, H*W, H*W) of its tables, from the chosen patch to every patch; beside it, if given, an
    untrained table, (1, H*W, H*W)."""
    note = cut_note([similarity], limits)
    colours = Colours(SIGNED, limits, cut=bool(note))
    titles = [f"table of block {table}" for table in range(len(similarity))] if len(similarity) > 1 else [""]
    if untrained is not None:
        titles, similarity = (
            [title or "trained" for title in titles] + ["untrained"],
            torch.cat([similarity, untrained]),
        )
    panels = [
        Panel(title, partial(show_map, values=values, colours=colours, grid=grid, mark=token))
        for title, values in zip(titles, token_map(similarity, grid, token), strict=True)
    ]
    title = f"cosine similarity of the encoding itself, from the patch in row {token[0]}, column {token[1]}"
    title += f" ({note})" if note else ""
    return Band(title, panels, grid[0] / grid[1], colours, with_ticks=True)


def frequency_band(
    layers: list[str], frequencies: list[Tensor], starts: list[Tensor], with_ticks: bool = False
) -> Band:
    """The frequencies (V, pairs, 2) of each layer as points in the plane, a colour for each head.

    Args:
        starts: where they may have started, to which a line is drawn; or empty.
        with_ticks: on each panel; else panels share their axes.
    """
    heads = len(frequencies[0])
    reach = 1.08 * max(points.abs().max().item() for points in frequencies) or 1.0
    cmap = ListedColormap(colormaps["viridis"](torch.linspace(0, 0.9, heads).numpy()))  # without the palest
    layers, frequencies = merged(layers if with_ticks else [short(layer) for layer in layers], frequencies)
    colours = Colours(
        cmap, (-0.5, heads - 0.5), "head", list(spread(heads, 6)), [str(head) for head in spread(heads, 6)]
    )
    of_layers: list[Tensor | None] = [*starts] or [None] * len(layers)
    panels = [
        Panel(
            layer,
            partial(show_frequencies, points=points, start=start, colours=colours, reach=reach, with_names=with_ticks),
        )
        for layer, points, start in zip(layers, frequencies, of_layers, strict=False)
    ]
    title = "frequencies in the plane (radians per patch)"
    if starts:
        moved = torch.stack(frequencies).sub(torch.stack(starts)).norm(dim=-1).mean().item()
        title += f", grey: from the nearest start, {moved:.2g} away in the mean"
    shared = SharedAxes("across: radians per patch to the right; down: radians per patch down", plane_ticks)
    return Band(title, panels, 1.0, colours if heads > 1 else None, with_ticks, None if with_ticks else shared)


def plane_ticks(axes: Axes, is_first: bool) -> None:
    """Three ticks on each axis."""
    axes.xaxis.set_major_locator(MaxNLocator(2))
    if is_first:
        axes.yaxis.set_major_locator(MaxNLocator(2))


def show_frequencies(
    axes: Axes, points: Tensor, start: Tensor | None, colours: Colours, reach: float, with_names: bool
) -> None:
    """Points (V, pairs, 2); the y axis goes down, as rows do."""
    heads = torch.arange(len(points))[:, None].expand(points.shape[:2])
    axes.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.6, zorder=0)
    x, y = points.flatten(0, 1).T.numpy()
    if start is not None:
        from_x, from_y = start.flatten(0, 1).T.numpy()
        axes.plot([from_x, x], [from_y, y], color="0.55", linewidth=0.8, zorder=1)
    axes.scatter(x, y, c=heads.flatten().numpy(), s=9, linewidths=0, **colours.scale)
    axes.set(xlim=(-reach, reach), ylim=(reach, -reach))
    if with_names:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel="radians per patch to the right", ylabel="radians per patch down")
